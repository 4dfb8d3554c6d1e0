"""permute by csrc/cuda/permute.cu.

A tensor is a matrix of offsets: out[r, c] = x[rows[r] + columns[c]]. The axes are split so that
both vectors are short beside the tensor. What lies together is moved in words of 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import tables
from ..moves import Axis, Offsets, Pieces, axes_of, unit_of
from .runtime import _cuda, bits, place

_WORD = 16
_RUN = 256  # bytes from which those that stay together are a row by themselves
_SHORT = 256  # else axes are taken into the columns up to so many
_SHARED = 48 << 10  # bytes of shared memory that every GPU has
_STAGED = 32 << 10  # of them for a tile of short rows: several blocks run on a multiprocessor
_ROWS = 1024  # of a tile at most
_WIDEST = 1 << 20  # columns of a tile at most: its elements are counted in 32 bits


class _Move(NamedTuple):
    out: Tensor
    x: Tensor
    rows: Tensor
    columns: Tensor | None  # None: together
    numel: int
    width: int
    source: int = 0  # staged: units of x behind each of `rows`
    height: int = 0  # staged: rows of a tile

    def tiles(self) -> int:
        if self.height:
            return -(-self.numel // self.width // self.height)
        return -(-self.numel // _cuda.MOVE_TILE)


def permute(outs: list[Tensor], xs: list[Tensor], indices: list[dict[int, Tensor]]) -> None:
    """One launch for all tensors of one size of unit and kind of access."""
    launches: dict[tuple[int, str], list[_Move]] = {}
    offsets = None
    for out, x, index in zip(outs, xs, indices, strict=True):
        if not out.numel():
            continue
        offsets = offsets or Offsets(out.device)
        unit, axes = _in_words(out, x, unit_of(out, x), index)
        kind, move = _move(out, x, axes, unit, offsets)
        launches.setdefault((unit, kind), []).append(move)
    for (unit, kind), moves in launches.items():
        _launch(moves, unit, kind)


def end_to_end(buffers: list[Tensor], tensors: Sequence[Sequence[Tensor]]) -> None:
    """buffers[i] = the elements of tensors[i] one after another; a launch for each unit."""
    device = buffers[0].device
    pieces = Pieces(buffers, tensors)
    start = tables.upload([0], torch.int64, device)  # the one row of each
    for unit, which in pieces.by_unit().items():
        width = pieces.nbytes[which] // unit
        counts = -(-width // _cuda.MOVE_TILE)
        zero = np.zeros_like(width)
        columns = [pieces.to[which], pieces.source[which], zero + start.data_ptr(), zero]
        columns += [width, width, (1 / width).view(np.int64), zero, zero]
        table = np.stack([*columns, np.cumsum(counts) - counts], 1).reshape(-1)
        _enqueue(table, counts, 0, unit, "rows", device)


def _in_words(
    out: Tensor, x: Tensor, unit: int, index: dict[int, Tensor]
) -> tuple[int, list[Axis]]:
    """The unit and the axes; 16 bytes where they are never divided."""
    axes = axes_of(out, x, index, unit)
    *others, last = axes
    pieces = _WORD // unit
    whole = last.positions is None and last.stride == 1 and last.size % pieces == 0
    if not whole or any(a.stride % pieces for a in others) or not tables.aligned([out, x]):
        return unit, axes
    wide = [a._replace(stride=a.stride // pieces) for a in others]
    size = last.size // pieces
    if size > 1 or not wide:
        wide.append(Axis(size, 1, None, size))
    return _WORD, wide


def _move(
    out: Tensor, x: Tensor, axes: list[Axis], unit: int, offsets: Offsets
) -> tuple[str, _Move]:
    numel, last = out.nbytes // unit, axes[-1]
    if last.positions is None and last.stride == 1 and (last.size * unit >= _RUN or len(axes) == 1):
        return "rows", _Move(out, x, offsets.of(axes[:-1]), None, numel, last.size)
    split = _staged(axes, unit)
    if split is not None:
        rows, columns = offsets.of(axes[:split]), offsets.of(axes[split:], torch.int32)
        source = _source(axes[split:])
        height = max(1, min(_ROWS, _STAGED // _bytes(source, unit)))
        return "staged", _Move(out, x, rows, columns, numel, len(columns), source, height)
    split, width = len(axes) - 1, last.size
    while split and width < _SHORT:
        split -= 1
        width *= axes[split].size
    rows, columns = offsets.of(axes[:split]), offsets.of(axes[split:])
    return "gather", _Move(out, x, rows, columns, numel, width)


def _staged(axes: list[Axis], unit: int) -> int | None:
    """Where the columns begin that are gathered in shared memory: wide ones, if there are."""
    fitting = [
        (split, math.prod(a.size for a in axes[split:]))
        for split in range(len(axes))
        if any(a.positions is not None for a in axes[split:])
        and 0 < _bytes(_source(axes[split:]), unit) <= _SHARED
    ]
    fitting = [(split, width) for split, width in fitting if width <= _WIDEST]
    wide = [split for split, width in fitting if width >= _SHORT]
    return max(wide) if wide else min(fitting)[0] if fitting else None


def _source(axes: list[Axis]) -> int:
    """The elements of x that the axes reach, if these lie together; else 0."""
    steps = 1
    for a in reversed(axes):
        if a.stride != steps:
            return 0
        steps *= a.source
    return steps


def _bytes(source: int, unit: int) -> int:
    """Shared memory that a staged row takes; 0 for none."""
    return source * unit + _cuda.MOVE_PADDING if source else 0


def _launch(moves: list[_Move], unit: int, kind: str) -> None:
    device = moves[0].out.device
    counts = [m.tiles() for m in moves]
    table: list[int] = []
    first = 0
    for m, count in zip(moves, counts, strict=True):
        columns = 0 if m.columns is None else m.columns.data_ptr()
        table += [m.out.data_ptr(), m.x.data_ptr(), m.rows.data_ptr(), columns, m.numel, m.width]
        table += [bits(1 / m.width), m.source, m.height, first]
        first += count
    shared = max(m.height * _bytes(m.source, unit) for m in moves)
    _enqueue(table, counts, shared, unit, kind, device)


def _enqueue(
    table: Sequence[int] | np.ndarray,
    counts: Sequence[int] | np.ndarray,
    shared: int,
    unit: int,
    kind: str,
    device: torch.device,
) -> None:
    described = tables.upload(table, torch.int64, device)
    owners = tables.owners(counts, device)
    _cuda.permute(
        moves=described.data_ptr(),
        owners=owners.data_ptr(),
        tiles=len(owners),
        shared=shared,
        unit=unit,
        moving=getattr(_cuda.Moving, kind),
        **place(device),
    )
