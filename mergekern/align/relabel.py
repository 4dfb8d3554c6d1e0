"""Labels of features, laid out along the axes of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from .. import check
from ..errors import ArgumentError
from .match import Match
from .spaces import Space, Spaces

Labels = dict[str, list[Tensor]]  # space -> for each model, the merged feature of each feature


class Carried(NamedTuple):
    """A space along some axes of a value: with these last and flattened, as in a Probe."""

    space: str
    axes: tuple[int, ...]
    positions: Tensor


def read_labels(op: str, match: Match, n: int) -> Labels:
    """The labels of the spaces in which any feature moves, on the CPU.

    Raises: ArgumentError for spaces that may not move, for other than n models, and for labels that
    do not use each merged feature.
    """
    found = {}
    for name, given in match.labels.items():
        if name not in match.spaces.movable:
            what = f"{name!r} is no space that moves"
            raise ArgumentError.of(op, what, f"labels of {name!r}", some_of(match.spaces))
        if len(given) != n:
            what = f"the labels of {name!r} are not those of the models"
            raise ArgumentError.of(op, what, f"{len(given)} vectors", f"{n}, one for each model")
        vectors = [check.integers(op, f"labels of {name!r}", v).cpu() for v in given]
        _check(op, match.spaces[name], vectors)
        stay = torch.arange(match.spaces[name].size)
        if not all(torch.equal(v, stay) for v in vectors):
            found[name] = vectors
    return found


def _check(op: str, space: Space, vectors: list[Tensor]) -> None:
    size = space.size
    for i, v in enumerate(vectors):
        low, high = (int(x) for x in torch.aminmax(v)) if len(v) else (0, 0)
        if len(v) != size or low < 0 or high >= size:
            what = f"the labels of {space.name!r} do not fit models[{i}]"
            got = f"{len(v)} labels from {low} to {high}"
            raise ArgumentError.of(op, what, got, f"{size} from 0 to {size - 1}")
    unused = torch.bincount(torch.cat(vectors), minlength=size) == 0
    if unused.any():
        what = f"the labels of {space.name!r} leave a merged feature empty"
        raise ArgumentError.of(op, what, f"none for {int(unused.nonzero()[0])}", "each of them")


def some_of(spaces: Spaces) -> str:
    """The names that may move, or the first few, and how many there are."""
    names = list(spaces.movable)
    few = ", ".join(map(repr, names[:5]))
    return f"one of the {len(names)} that do: {few}{', ...' if len(names) > 5 else ''}"


def carried(spaces: Spaces) -> dict[str, list[Carried]]:
    """Call -> the spaces that its value carries: by the layout, and where layers read them."""
    nodes = {n.name: n for n in spaces.program.graph.nodes}
    found = {name: [Carried(*c) for c in given] for name, given in spaces.layout.items()}
    for space in spaces.values():
        for probe in space.probes:
            value = nodes[probe.node].args[probe.arg]
            if isinstance(value, fx.Node) and value.name not in spaces.layout:
                here = found.setdefault(value.name, [])
                if not any((c.space, c.axes) == (space.name, probe.axes) for c in here):
                    here.append(Carried(space.name, probe.axes, probe.positions))
    return found


def is_permutation(vectors: Sequence[Tensor]) -> bool:
    return all(torch.equal(v.sort().values, torch.arange(len(v))) for v in vectors)


def normalized(op: str, weights: Sequence[float], n: int) -> list[float]:
    """Weights of n models, which sum to 1."""
    numbers = check.numbers(op, "weights", weights, n)
    total = math.fsum(numbers)
    if total == 0:
        raise ArgumentError.of(op, "weights cannot be normalized", "a sum of 0", "any other")
    return [w / total for w in numbers]


class Relabelling:
    """Vectors of labels along whole axes. Tensors that ask for the same get the same object."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._known: dict[tuple[object, ...], list[Tensor]] = {}

    def moves(self, space: str) -> bool:
        return space in self.labels

    def along(self, size: int, parts: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """For each model, labels of `size` entries, of which features of spaces have `positions`.

        Entry positions[f, j] goes to entry positions[label of f, j]; the others stay.
        """
        key = (size, *((space, positions.numpy().tobytes()) for space, positions in parts))
        if key not in self._known:
            self._known[key] = self._lay(size, parts)
        return self._known[key]

    def _lay(self, size: int, parts: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        count = len(self.labels[parts[0][0]])
        vectors = [torch.arange(size) for _ in range(count)]
        for space, positions in parts:
            for vector, labels in zip(vectors, self.labels[space], strict=True):
                vector[positions.flatten()] = positions[labels].flatten()
        return vectors
