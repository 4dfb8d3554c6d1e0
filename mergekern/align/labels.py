"""Labels of features, and what a model demands of them.

Every index of every axis of every parameter is a label. Running a model over labels instead of
numbers (`rules`) collects facts: which labels are one feature, which features lie inside which
block (a head, a group), which differ in a way that no reordering may touch. `resolve` makes spaces
of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Layer(NamedTuple):
    """Labels along `axes` of a value: ids has the value's size there and 1 on all other axes."""

    axes: tuple[int, ...]
    ids: Tensor


@dataclass
class Value:
    """What is known of a tensor without its numbers.

    const: its numbers, where no input and no parameter bears on them. data: whether inputs do.
    seen: where its features were last read at every sample (call, argument, layers).
    """

    shape: tuple[int, ...]
    layers: list[Layer] = field(default_factory=list)
    const: Tensor | None = None
    data: bool = False
    seen: tuple[str, int, list[Layer]] | None = None

    @property
    def parameter(self) -> bool:
        return not self.data and self.const is None


class Axis(NamedTuple):
    """An axis of a tensor of the state: its labels are start, start + 1, ..."""

    name: str
    axis: int
    start: int
    size: int


class Facts:
    """Labels and what relates them."""

    def __init__(self) -> None:
        self.count = 0
        self.axes: list[Axis] = []
        self.same: list[tuple[Tensor, Tensor]] = []
        self.inside: list[tuple[Tensor, Tensor]] = []
        self.pinned: list[tuple[Tensor, str]] = []
        self.marks: list[tuple[Tensor, Tensor, str]] = []
        self.roles: list[tuple[Tensor, str]] = []
        self.notes: list[tuple[Tensor, str]] = []
        self.probes: list[tuple[str, int, str, Layer]] = []

    def fresh(self, *shape: int) -> Tensor:
        n = int(torch.Size(shape).numel())
        ids = torch.arange(self.count, self.count + n).view(shape)
        self.count += n
        return ids

    def parameter(self, name: str, shape: Sequence[int]) -> Value:
        """A tensor of the state, one layer for every axis of more than one index."""
        layers = []
        for axis, size in enumerate(shape):
            if size > 1:
                self.axes.append(Axis(name, axis, self.count, size))
                ids = self.fresh(size)
                layers.append(Layer((axis,), _spread(ids, (axis,), len(shape))))
        return Value(tuple(shape), layers)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """The same features."""
        self.same.append(_pairs(a, b))

    def put_inside(self, features: Tensor, blocks: Tensor) -> None:
        """Features that stay in their block wherever it goes."""
        self.inside.append(_pairs(features, blocks))

    def pin(self, ids: Tensor, reason: str) -> None:
        self.pinned.append((distinct(ids), reason))

    def mark(self, ids: Tensor, keys: Tensor, reason: str) -> None:
        """Features with different keys may not change places."""
        a, b = _pairs(ids, keys)
        self.marks.append((a, b, reason))

    def play(self, layers: Iterable[Layer], role: str) -> None:
        self.roles += [(distinct(layer.ids), role) for layer in layers]

    def note(self, layers: Iterable[Layer], text: str) -> None:
        self.notes += [(distinct(layer.ids), text) for layer in layers]

    def blocks(self, ids: Tensor) -> Tensor:
        """One label for each row [..., k] of features that are summed up or normalised together."""
        rows, inverse = _distinct_rows(ids.reshape(-1, ids.shape[-1]))
        if (rows == rows[:, :1]).all():  # a row of one feature is that feature
            return rows[inverse, 0].view(ids.shape[:-1])
        made = self.fresh(len(rows))
        self.put_inside(rows, made[:, None])
        return made[inverse].view(ids.shape[:-1])

    # ---- two values meet ---------------------------------------------------------------------

    def meet(self, a: Value, b: Value) -> list[Layer]:
        """The layers of an elementwise function of two values that broadcast, axis by axis."""
        layers = list(a.layers)
        for mine in b.layers:
            layers = self._add(layers, mine)
        kept = []
        for layer in layers:
            for value in (a, b):
                others = [x for x in value.layers if set(x.axes) & set(layer.axes)]
                wide = [axis for axis in layer.axes if value.shape[axis] > 1]
                if wide and not others and not self._differ(layer, value, wide):
                    break
            else:
                kept.append(layer)
        return kept

    def _add(self, layers: list[Layer], new: Layer) -> list[Layer]:
        """`layers` with one more; of two that overlap, the finer one stays."""
        apart = [x for x in layers if not set(x.axes) & set(new.axes)]
        for old in layers:
            if not set(old.axes) & set(new.axes):
                continue
            if old.axes == new.axes:
                self.tie(old.ids, new.ids)
                new = old
                continue
            fine, coarse = (old, new) if len(old.axes) > len(new.axes) else (new, old)
            rest = set(fine.axes) - set(coarse.axes)
            if not set(coarse.axes) < set(fine.axes):
                self.pin(fine.ids, "lies across features of another kind")
                self.pin(coarse.ids, "lies across features of another kind")
            elif max(coarse.axes) < min(rest):  # [heads, features of a head]
                self.put_inside(fine.ids, coarse.ids)
            else:
                self.mark(fine.ids, coarse.ids, "is shared by all heads")
                self.pin(coarse.ids, "is shared by all heads")
            new = fine
        return [*apart, new]

    def _differ(self, layer: Layer, value: Value, wide: list[int]) -> bool:
        """Features meet values that are none; whether the layer stays one of features.

        Constants that are equal for two features do not tell them apart; inputs do.
        """
        if value.const is not None:
            keys = contents(value.const, wide)
            self.mark(layer.ids, keys, "meets constants that differ")
            return True
        sizes = [size if axis in wide else 1 for axis, size in enumerate(value.shape)]
        keys = torch.arange(int(torch.Size(sizes).numel())).view(sizes)
        self.mark(layer.ids, keys, "meets an input or positions, which are no features")
        return set(wide) != set(layer.axes)

    def reduce(self, layers: list[Layer], axes: Iterable[int]) -> list[Layer]:
        """Layers after a sum over axes, which keeps them with size 1."""
        gone, kept = set(axes), []
        for layer in layers:
            rest = tuple(axis for axis in layer.axes if axis not in gone)
            if rest == layer.axes:
                kept.append(layer)
            elif rest:
                inner = [axis for axis in layer.axes if axis in gone]
                outer = [axis for axis in range(layer.ids.ndim) if axis not in inner]
                rows = layer.ids.permute(*outer, *inner).flatten(len(outer))
                kept.append(Layer(rest, _spread(self.blocks(rows), outer, layer.ids.ndim)))
        return kept


def collapsed(ids: Tensor) -> Layer | None:
    """The axes along which labels differ; None where there is one label only."""
    axes = []
    for axis in range(ids.ndim):
        first = ids.narrow(axis, 0, 1)
        if ids.shape[axis] > 1 and not torch.equal(first.expand_as(ids), ids):
            axes.append(axis)
        else:
            ids = first
    return Layer(tuple(axes), ids) if axes else None


def _spread(ids: Tensor, axes: Sequence[int], ndim: int) -> Tensor:
    """ids, whose axes are `axes` of a value of ndim axes, with 1 in the place of the others."""
    sizes = [1] * ndim
    for axis, size in zip(axes, ids.shape, strict=True):
        sizes[axis] = size
    return ids.reshape(sizes)


def distinct(ids: Tensor) -> Tensor:
    return torch.from_numpy(np.unique(ids.numpy()))


def _distinct_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of a matrix, and which of them each row is."""
    rows, inverse = np.unique(x.numpy(), axis=0, return_inverse=True)
    return torch.from_numpy(rows), torch.from_numpy(inverse.reshape(-1))


def _pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct pairs of two tensors that broadcast, of numbers from 0 to 2**31."""
    pairs = distinct((a << 32) + b)
    return pairs >> 32, pairs & (2**32 - 1)


def contents(x: Tensor, axes: list[int]) -> Tensor:
    """A number for each index of `axes`, equal where x is equal along all other axes."""
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    rows = x.permute(*axes, *rest).reshape(*[x.shape[axis] for axis in axes], -1)
    numbers = _distinct_rows(rows.reshape(-1, rows.shape[-1]).double())[1]
    return _spread(numbers.view(rows.shape[:-1]), axes, x.ndim)
