"""Tensors as matrices of offsets, and the members of groups: what GPU kernels that move elements
take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Axis(NamedTuple):
    """size steps, each of `stride` elements, or to where `positions` say; x has `source` there."""

    size: int
    stride: int
    positions: Tensor | None
    source: int


def unit_of(out: Tensor, x: Tensor) -> int:
    """Bytes that are moved as one: an element, half of a complex128, or bytes at odd addresses."""
    unit = min(8, x.element_size())
    return unit if (out.data_ptr() | x.data_ptr()) % unit == 0 else 1


def axes_of(out: Tensor, x: Tensor, index: dict[int, Tensor], unit: int) -> list[Axis]:
    """The axes of the result in units; plain neighbours are merged."""
    pieces = x.element_size() // unit
    given = [
        Axis(size, x.stride(d) * pieces, index.get(d), x.shape[d])
        for d, size in enumerate(out.shape)
        if size != 1 or d in index
    ]
    axes: list[Axis] = []
    for a in [*given, *([Axis(pieces, 1, None, pieces)] if pieces > 1 else [])]:
        before = axes[-1] if axes else None
        if (
            before
            and before.positions is None
            and a.positions is None
            and before.stride == a.size * a.stride
        ):
            size = before.size * a.size
            axes[-1] = Axis(size, a.stride, None, size)
        else:
            axes.append(a)
    return axes or [Axis(1, 1, None, 1)]


class Offsets:
    """Vectors of offsets; a model's tensors share most of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[tuple[object, ...], tuple[list[Axis], Tensor]] = {}

    def of(self, axes: list[Axis], dtype: torch.dtype = torch.int64) -> Tensor:
        key = (dtype, *((a.size, a.stride, id(a.positions)) for a in axes))
        if key not in self._made:
            total = torch.zeros(1, dtype=torch.int64, device=self._device)
            for a in axes:
                steps = (
                    torch.arange(a.size, device=self._device)
                    if a.positions is None
                    else a.positions
                )
                total = (total[:, None] + steps * a.stride).view(-1)
            self._made[key] = axes, total.to(dtype)
        return self._made[key][1]


class Groups:
    """Where the members of each group start, and the members of all groups."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[tuple[object, ...], tuple[Tensor | None, Tensor, Tensor]] = {}

    def of(
        self, labels: Tensor | None, count: int, dtype: torch.dtype = torch.int64
    ) -> tuple[Tensor, Tensor]:
        """Without labels every feature is a group."""
        key = (id(labels), count, dtype)
        if key not in self._made:
            starts = torch.arange(count + 1, device=self._device)
            members = starts
            if labels is not None:
                ordered, members = torch.sort(labels, stable=True)
                starts = torch.searchsorted(ordered, starts)
            self._made[key] = labels, starts.to(dtype), members.to(dtype)
        return self._made[key][1:]


class Pieces:
    """Tensors that move into buffers, one after another.

    to, source, nbytes: int64 arrays of addresses and sizes. They are valid while this object, which
    holds contiguous copies of strided tensors, is alive.
    """

    def __init__(self, buffers: Sequence[Tensor], tensors: Sequence[Sequence[Tensor]]) -> None:
        counts = [len(xs) for xs in tensors]
        self._held = [x.contiguous() for xs in tensors for x in xs]
        self.nbytes = np.array([x.nbytes for x in self._held], np.int64)
        self.source = np.array([x.data_ptr() for x in self._held], np.int64)
        before = np.concatenate([[0], np.cumsum(self.nbytes)])
        first = np.cumsum([0, *counts[:-1]])
        begins = np.array([b.data_ptr() for b in buffers], np.int64) - before[first]
        self.to = before[:-1] + np.repeat(begins, counts)

    def by_unit(self) -> dict[int, np.ndarray]:
        """Unit in bytes -> which pieces move in it: 16, or for the others one that divides all."""
        bits = self.to | self.source | self.nbytes | 16
        units = bits & -bits
        there = self.nbytes > 0
        found = {16: np.flatnonzero(there & (units == 16))}
        others = np.flatnonzero(there & (units < 16))
        if len(others):
            found[int(units[others].min())] = others
        return {unit: which for unit, which in found.items() if len(which)}
