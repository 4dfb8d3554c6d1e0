"""Matching of weights without any data, by coordinate descent (Git Re-Basin)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..check import FLOATS
from ..ops.gram import gram
from ..ops.permute import permute
from .heads import assign_groups
from .spaces import Place, Space, Spaces

Order = Mapping[str, Tensor]  # space -> index: feature f becomes what feature index[f] was

STARTS = ("best", "anchored", "identity")

_WAVE = 2**29  # bytes of scores, as float64, that are worked on side by side
_ROUNDING = 1e-9
_GAIN = 1e-12  # of sum |a||b|: steps that gain less are rounding


class Objective(NamedTuple):
    """sum over tensors <W_0, P W_i>, before and after; rounds over all spaces until none gained."""

    before: float
    after: float
    sweeps: int


def match_weights(
    spaces: Spaces, first: nn.Module, other: nn.Module, seed: int, start: str = "best"
) -> tuple[dict[str, Tensor], Objective]:
    """The orders of the features of `other` that bring its parameters closest to those of `first`.

    Maximises sum over parameters <W_0, P W_i> one group of spaces at a time, in random order, with
    all others fixed: the score of two features is the dot product of what they have in all
    parameters. A group is skipped while no space that it shares a tensor with has moved. Those in
    line that share none are solved side by side, with the same result.
    start: "identity", as Git Re-Basin; "anchored", where each group is matched first by those of
    its tensors alone whose other axes are fixed or matched already, from the inputs on, so that
    features still in disorder add no noise; "best" descends from both and keeps what is better.

    Result: index of each space. The objective never decreases: it is computed in float64 after each
    step, and a step that does not gain is not made. Scores are float32 (float64 for float64
    models): with K entries of a feature in all tensors, a step is within
    2 size K 2**-24 max|row_0| max|row_i| of the best one.
    Cost: for a round, a product [size, K] x [K, size] and an assignment of each space that is not
    skipped, and a permuted copy of its tensors, twice.
    """
    pair = _Pair(spaces, first, other)
    before = pair.objective()
    found = []
    for way in STARTS[1:] if start == "best" else [start]:
        pair.reset()
        if way == "anchored":
            pair.anchor()
        sweeps = pair.descend(seed)
        found.append((dict(pair.order), Objective(before, pair.objective(), sweeps)))
        if pair.objective() >= (1 - _ROUNDING) * pair.scale:  # Cauchy-Schwarz: none is better
            break
    return max(found, key=lambda result: result[1].after)


def _take(
    line: list[str],
    waiting: set[str],
    neighbours: Mapping[str, set[str]],
    groups: Mapping[str, list[Space]],
) -> list[str]:
    """The next groups in line that do not bear on each other; leaves out those not waiting."""
    wave: list[str] = []
    room = _WAVE
    while line and not any(line[0] in neighbours[name] for name in wave):
        if line[0] in waiting:
            room -= 8 * sum(space.size**2 for space in groups[line[0]])
            if wave and room < 0:
                break
            wave.append(line[0])
        del line[0]
    return wave


def _neighbours(
    places: Mapping[str, list[tuple[Space, Place]]], groups: Mapping[str, list[Space]]
) -> dict[str, set[str]]:
    """Groups with spaces on other axes of the same tensors."""
    group_of = {space.name: name for name, spaces in groups.items() for space in spaces}
    found: dict[str, set[str]] = {name: set() for name in groups}
    for here in places.values():
        for space, place in here:
            found[group_of[space.name]] |= {
                group_of[s.name] for s, p in here if p.axis != place.axis
            }
    return found


class _Pair:
    """The parameters of two models, and the order of the second one's features so far."""

    def __init__(self, spaces: Spaces, first: nn.Module, other: nn.Module) -> None:
        self.a, self.b = parameters_of(first), parameters_of(other)
        self.dtype = accumulator_of(self.a | self.b)
        self.places = parameter_places(spaces, self.a)
        self.spaces, self.groups = spaces, spaces.groups()
        self.neighbours = _neighbours(self.places, self.groups)
        grams = {name: gram([self.a[name], self.b[name]]) for name in self.places}
        self.scale = math.fsum(float((g[0, 0] * g[1, 1]).sqrt()) for g in grams.values())
        self._unmoved = {name: float(g[0, 1]) for name, g in grams.items()}
        self.reset()

    def reset(self) -> None:
        """All features as they were."""
        self.order = {s.name: torch.arange(s.size) for s in self.spaces.movable.values()}
        self.dots = dict(self._unmoved)

    def objective(self) -> float:
        return math.fsum(self.dots.values())

    def anchor(self) -> None:
        """Matches each group once, the one with most known about it first."""
        left, known = dict(self.groups), set[str]()
        while left:
            entries = {name: self._entries(spaces, known) for name, spaces in left.items()}
            name = max(entries, key=lambda n: entries[n])
            spaces = left.pop(name)
            if entries[name]:
                found = assign_groups([[(s, self._score(s, known)) for s in spaces]])
                self.order = self.order | found
            known |= {s.name for s in spaces}
        self.dots = {name: self._dot(name, self.order) for name in self.places}

    def _entries(self, spaces: Sequence[Space], known: set[str]) -> float:
        """The share of the numbers about features that lie among known ones."""
        mine = {s.name for s in spaces}
        sizes = {True: 0, False: 0}
        for name, places in self.places.items():
            if any(s.name in mine for s, _ in places):
                sizes[self._is_known(name, known | mine)] += self.a[name].numel()
        return sizes[True] / sum(sizes.values())

    def _is_known(self, name: str, known: set[str]) -> bool:
        return all(s.name in known for s, _ in self.places[name])

    def descend(self, seed: int) -> int:
        """Steps until none gains; the number of rounds."""
        generator = torch.Generator().manual_seed(seed)
        waiting, sweeps = set(self.groups), 0
        while waiting:
            sweeps += 1
            names = list(self.groups)
            line = [names[i] for i in torch.randperm(len(names), generator=generator)]
            while line:
                wave = _take(line, waiting, self.neighbours, self.groups)
                waiting -= set(wave)
                for name in self.step({name: self.groups[name] for name in wave}):
                    waiting |= self.neighbours[name]
        return sweeps

    def step(self, groups: Mapping[str, Sequence[Space]]) -> list[str]:
        """Takes the best order of each group if it gains; returns the names of those that moved."""
        scores = [[(s, self._score(s)) for s in spaces] for spaces in groups.values()]
        found = assign_groups(scores)
        moved = []
        for name, spaces in groups.items():
            order = {**self.order, **{s.name: found[s.name] for s in spaces}}
            mine = {s.name for s in spaces}
            touched = [n for n, ps in self.places.items() if any(s.name in mine for s, _ in ps)]
            dots = {n: self._dot(n, order) for n in touched}
            gain = math.fsum([*dots.values(), *(-self.dots[n] for n in touched)])
            if gain > _GAIN * self.scale:
                self.order, self.dots = order, self.dots | dots
                moved.append(name)
        return moved

    def _score(self, space: Space, known: set[str] | None = None) -> Tensor:
        """[size, size]: dot products of the features of both models, all other spaces in order.

        known: of tensors alone whose other spaces are among these.
        """
        device = next(iter(self.a.values())).device
        total = torch.zeros(space.size, space.size, dtype=self.dtype, device=device)
        for name, places in self.places.items():
            if known is not None and not self._is_known(name, known | {space.name}):
                continue
            for place in (place for own, place in places if own is space):
                y = self._permuted(name, self.order, place.axis)
                x, y = (rows_of(v, place).to(self.dtype) for v in (self.a[name], y))
                total.addmm_(x, y.T)
        return total

    def _dot(self, name: str, order: Order) -> float:
        return float(gram([self.a[name], self._permuted(name, order, None)])[0, 1])

    def _permuted(self, name: str, order: Order, except_axis: int | None) -> Tensor:
        """The second model's tensor with its features in order, on all axes but one."""
        x = self.b[name]
        axes: dict[int, Tensor] = {}
        for space, place in self.places[name]:
            if place.axis != except_axis:
                index = axes.setdefault(place.axis, torch.arange(x.shape[place.axis]))
                index[place.positions.flatten()] = place.positions[order[space.name]].flatten()
        return permute(x, axes)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """By name, tied ones under each of their names."""
    return {n: x.detach() for n, x in model.named_parameters(remove_duplicate=False)}


def parameter_places(
    spaces: Spaces, parameters: Mapping[str, Tensor]
) -> dict[str, list[tuple[Space, Place]]]:
    """The movable spaces on each floating parameter; tied ones count once."""
    found: dict[str, list[tuple[Space, Place]]] = {}
    for space in spaces.movable.values():
        for place in space.places:
            name = spaces.program.aliases[place.name][0]
            if name in parameters and parameters[name].dtype in FLOATS:
                found.setdefault(name, []).append((space, place))
    return found


def rows_of(x: Tensor, place: Place) -> Tensor:
    """[size, K]: all that each feature has in a tensor."""
    x = x.movedim(place.axis, 0)
    if not torch.equal(place.positions, torch.arange(len(x))[:, None]):
        x = x[place.positions.to(x.device).flatten()]
    return x.reshape(len(place.positions), -1)


def accumulator_of(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """What their products are summed in: float32, of float64 models float64."""
    wide = any(x.dtype == torch.float64 for x in parameters.values())
    return torch.float64 if wide else torch.float32
