"""From facts about labels to spaces of features."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..spaces import Layout, Place, Probe, Space
from .labels import Facts, Layer
from .names import titles
from .program import Program


@dataclass
class _Feature:
    """Labels that are one feature: where it lies, and what sets it apart."""

    places: dict[int, list[int]] = field(default_factory=dict)  # axis number -> positions
    marks: set[tuple[int, int]] = field(default_factory=set)
    fixed: str | None = None
    blocks: set[int] = field(default_factory=set)
    features: set[int] = field(default_factory=set)

    @property
    def where(self) -> tuple[tuple[int, int], ...]:
        """On which axes, and how often."""
        return tuple(sorted((number, len(p)) for number, p in self.places.items()))


@dataclass
class _Cell:
    """Features that are alike, in the order of heads: [heads, features of a head]."""

    rows: list[list[int]]
    group: Hashable = None
    inside: str | None = None
    fixed: str | None = None
    mixed: bool = False  # fixed for what was found here, not before

    @property
    def members(self) -> list[int]:
        return [c for row in self.rows for c in row]


class Resolver:
    """Spaces of a program from the facts that an interpreter found."""

    def __init__(self, program: Program, facts: Facts) -> None:
        self.program, self.facts = program, facts
        self.of = _components(facts)
        self.features: dict[int, _Feature] = defaultdict(_Feature)
        self.reasons: dict[int, str] = {}
        self._collect()

    def _collect(self) -> None:
        facts, of = self.facts, self.of
        touched = self._touched()
        for number, axis in enumerate(facts.axes):
            if not touched[axis.start : axis.start + axis.size].any():
                continue
            for position in range(axis.size):
                feature = self.features[int(of[axis.start + position])]
                feature.places.setdefault(number, []).append(position)
        for children, parents in facts.inside:
            for child, parent in {*zip(self._of(children), self._of(parents), strict=True)}:
                if child != parent:
                    self.features[child].blocks.add(parent)
                    self.features[parent].features.add(child)
        for number, (ids, keys, reason) in enumerate(facts.marks):
            self.reasons[number] = reason
            for c, key in zip(self._of(ids), keys.tolist(), strict=True):
                self.features[c].marks.add((number, key))
        for ids, reason in facts.pinned:
            for c in self._of(ids):
                self.features[c].fixed = self.features[c].fixed or reason

    def _of(self, ids: Tensor) -> list[int]:
        """The features of labels."""
        return self.of[ids.numpy()].tolist()

    def _touched(self) -> np.ndarray:
        """Labels that any fact is about."""
        touched = np.zeros(self.facts.count, dtype=bool)
        for group in (self.facts.same, self.facts.inside, self.facts.pinned, self.facts.roles):
            for fact in group:
                for ids in fact:
                    if isinstance(ids, Tensor):
                        touched[ids.numpy()] = True
        return touched

    # ---- which features are alike ------------------------------------------------------------

    def _colours(self) -> dict[int, int]:
        """Equal for features that only their names tell apart (colour refinement)."""
        colours = _numbered(
            {
                c: (feature.where, frozenset(feature.marks), c if feature.fixed else None)
                for c, feature in self.features.items()
            }
        )
        while True:
            refined = _numbered(
                {
                    c: (
                        colours[c],
                        tuple(sorted(colours[b] for b in feature.blocks)),
                        tuple(sorted(colours[b] for b in feature.features)),
                    )
                    for c, feature in self.features.items()
                }
            )
            if len({*refined.values()}) == len({*colours.values()}):
                return refined
            colours = refined

    def _heads(self) -> dict[int, int]:
        """The head that each feature, and each block, belongs to."""
        parents: dict[int, int] = {}

        def root(c: int) -> int:
            while parents.setdefault(c, c) != c:
                parents[c] = parents[parents[c]]
                c = parents[c]
            return c

        for feature in self.features.values():
            blocks = [*feature.blocks]
            for other in blocks:
                parents[root(blocks[0])] = root(other)
        return {
            c: root(next(iter(feature.blocks), c))
            for c, feature in self.features.items()
            if feature.blocks or feature.features
        }

    def _first(self, c: int) -> tuple[int, int]:
        """Where a feature is met first: its order."""
        number, positions = min(self.features[c].places.items())
        return number, positions[0]

    def cells(self) -> list[_Cell]:
        """Features that are fixed hold the blocks they lie in: until no more are found."""
        while True:
            cells = self._cells()
            new = [cell for cell in cells if cell.fixed and cell.mixed]
            if not new:
                return self._joined(cells)
            for cell in new:
                for c in cell.members:
                    self.features[c].fixed = cell.fixed

    def _cells(self) -> list[_Cell]:
        alike: dict[int, list[int]] = defaultdict(list)
        pinned: dict[tuple[Hashable, str], list[int]] = defaultdict(list)
        colours, head = self._colours(), self._heads()
        for c, feature in self.features.items():
            if feature.fixed and feature.places:
                pinned[feature.where, feature.fixed].append(c)
            elif feature.places:
                alike[colours[c]].append(c)
        cells = [self._cell(sorted(members, key=self._first), head) for members in alike.values()]
        for (_, reason), members in pinned.items():
            cells.append(_Cell([sorted(members, key=self._first)], fixed=reason))
        return cells

    def _cell(self, members: list[int], head: Mapping[int, int]) -> _Cell:
        rows: dict[int, list[int]] = defaultdict(list)
        for c in members:
            rows[head.get(c, -1)].append(c)
        if len(rows) == 1:
            return _Cell([members])
        structures = {frozenset(self.features[c].blocks) for c in members}
        blocks = set().union(*structures)
        nested = {head.get(b) for b in blocks for _ in self.features[b].blocks}
        lengths = {len(row) for row in rows.values()}
        inner = any(self.features[c].blocks for c in members)
        if (inner and len(structures) != len(rows)) or len(nested) > 1 or len(lengths) > 1:
            reason = "its features lie in blocks of two kinds"
            return _Cell([members], fixed=reason, mixed=True)
        return _Cell([*rows.values()], group=frozenset(rows))

    def _joined(self, cells: list[_Cell]) -> list[_Cell]:
        """Features that are alike but for marks: heads move, features within a head do not."""
        whole: dict[tuple[Hashable, Hashable], list[_Cell]] = defaultdict(list)
        kept = []
        for cell in cells:
            first = self.features[cell.rows[0][0]]
            if cell.fixed is None and len(cell.members) == 1:
                whole[first.where, None].append(cell)
            elif cell.group is not None and len(cell.rows[0]) == 1:
                whole[first.where, cell.group].append(cell)
            else:
                kept.append(cell)
        for (_, group), parts in whole.items():
            if group is None:
                members = sorted((c for cell in parts for c in cell.members), key=self._first)
                kept.append(_Cell([members], fixed=self._why(members)))
            elif len(parts) == 1:
                kept += parts
            else:
                head = {id(p): {self._head_of(r[0]): r[0] for r in p.rows} for p in parts}
                order = [self._head_of(row[0]) for row in parts[0].rows]
                rows = [sorted((head[id(p)][h] for p in parts), key=self._first) for h in order]
                rows.sort(key=lambda row: self._first(row[0]))
                kept.append(_Cell(rows, group, inside=self._why(rows[0])))
        return sorted(kept, key=lambda cell: self._first(cell.rows[0][0]))

    def _head_of(self, c: int) -> frozenset[int]:
        feature = self.features[c]
        return frozenset(feature.blocks) if feature.blocks else frozenset([c])

    def _why(self, members: Iterable[int]) -> str:
        marks = [m for c in members for m in self.features[c].marks]
        reasons = sorted({self.reasons[number] for number, _ in marks})
        return "; ".join(reasons) or "it has no equal"

    # ---- spaces ------------------------------------------------------------------------------

    def spaces(self, layout: Mapping[str, list[Layer]]) -> tuple[list[Space], Layout]:
        cells = self.cells()
        owner: dict[int, tuple[int, int]] = {}
        for i, cell in enumerate(cells):
            owner.update({c: (i, f) for f, c in enumerate(cell.members)})
        probes: dict[int, list[Probe]] = defaultdict(list)
        for node, arg, module, layer in self.facts.probes:
            for i, axes, positions in self._found(layer, owner, cells):
                probes[i].append(Probe(node, arg, axes, positions, module))
        roles, notes = self._roles(), self._notes()
        places = [self._places(cell, roles) for cell in cells]
        fixed, heads = [c.fixed is not None for c in cells], [c.group for c in cells]
        named, groups = titles(places, fixed, heads)
        spaces = [
            Space(
                named[i],
                len(cell.members),
                tuple(places[i]),
                tuple(_distinct(probes[i])),
                len(cell.rows),
                None if cell.group is None else groups[cell.group],
                cell.inside,
                cell.fixed,
                next((notes[c] for c in cell.members if c in notes), None),
            )
            for i, cell in enumerate(cells)
        ]
        found: Layout = {}
        for node, layers in layout.items():
            found[node] = [
                (named[i], axes, positions)
                for layer in layers
                for i, axes, positions in self._found(layer, owner, cells)
            ]
        return spaces, found

    def _places(self, cell: _Cell, role: Mapping[int, str]) -> list[Place]:
        places = []
        first = self.features[cell.members[0]]
        for number in sorted(first.places):
            axis = self.facts.axes[number]
            rows = [self.features[c].places[number] for c in cell.members]
            for name in self.program.architecture.aliases[axis.name]:
                place = Place(name, axis.axis, torch.tensor(rows), role.get(number, "rides"))
                places.append(place)
        return places

    def _found(
        self, layer: Layer, owner: Mapping[int, tuple[int, int]], cells: list[_Cell]
    ) -> list[tuple[int, tuple[int, ...], Tensor]]:
        """The spaces that lie along a layer, with the positions of their features."""
        at: dict[int, dict[int, list[int]]] = defaultdict(dict)
        for position, c in enumerate(self._of(layer.ids.flatten())):
            if c in owner:
                i, feature = owner[c]
                at[i].setdefault(feature, []).append(position)
        found = []
        for i, rows in at.items():
            whole = len(rows) == len(cells[i].members)
            if whole and len({len(r) for r in rows.values()}) == 1:
                ordered = [rows[f] for f in range(len(rows))]
                found.append((i, layer.axes, torch.tensor(ordered)))
        return found

    def _roles(self) -> dict[int, str]:
        """The role of each axis; one that both produces and consumes has "both"."""
        starts = np.array([axis.start for axis in self.facts.axes])
        found: dict[int, set[str]] = defaultdict(set)
        for ids, role in self.facts.roles:
            numbers = np.searchsorted(starts, ids.numpy(), side="right") - 1
            for number in np.unique(numbers).tolist():
                axis = self.facts.axes[number]
                if ((ids >= axis.start) & (ids < axis.start + axis.size)).any():
                    found[number].add(role)
        return {
            number: "both"
            if {"produces", "consumes"} <= roles or "both" in roles
            else next(r for r in ("produces", "consumes", "rides") if r in roles)
            for number, roles in found.items()
        }

    def _notes(self) -> dict[int, str]:
        """Why a zip of features is approximate."""
        found: dict[int, dict[str, None]] = defaultdict(dict)
        for ids, text in self.facts.notes:
            for c in set(self._of(ids)):
                found[c][text] = None
        return {c: "; ".join(texts) for c, texts in found.items()}


def _numbered(keys: Mapping[int, Hashable]) -> dict[int, int]:
    """Equal keys get one number."""
    numbers: dict[Hashable, int] = {}
    return {c: numbers.setdefault(key, len(numbers)) for c, key in keys.items()}


def _distinct(probes: list[Probe]) -> list[Probe]:
    """A value that several calls read counts once."""
    found: dict[tuple[str, int], Probe] = {}
    for probe in probes:
        found.setdefault((probe.node, probe.arg), probe)
    return [*found.values()]


def _components(facts: Facts) -> np.ndarray:
    """The number of the feature that each label belongs to."""
    ends = [torch.cat([pair[i] for pair in facts.same]).numpy() for i in (0, 1)]
    graph = coo_matrix((np.ones(len(ends[0]), bool), ends), (facts.count, facts.count))
    return connected_components(graph, directed=False)[1]
