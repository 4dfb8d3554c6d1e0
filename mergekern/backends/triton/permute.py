"""permute in Triton; importing this file imports triton.

A tensor is a matrix of offsets: out[r, c] = x[rows[r] + columns[c]]. The axes are split so that
both vectors are short beside the tensor; elements are moved as integers of their size.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tables
from ..moves import Axis, Offsets, Pieces, axes_of, unit_of
from .common import pointer

LAUNCH = {"num_warps": 4}
UNITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}

_RUN = 64  # elements from which those that stay together are a row's end by themselves
_SHORT = 256  # else axes are taken into the columns up to so many


@triton.jit
def permute_kernel(
    plans,  # int64 [tensors, 7]: out, x, rows, columns, their two sizes, the first tile
    owners,  # int32: the tensor of each tile
    UNIT: tl.constexpr,
    TOGETHER: tl.constexpr,  # columns[c] = c, which is not read
    WIDE: tl.constexpr,  # addresses in bytes, offsets of rows and widths are multiples of 16
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    plan = plans + tl.load(owners + tile).to(tl.int64) * 7
    height = tl.load(plan + 4)
    width = tl.load(plan + 5)
    tile -= tl.load(plan + 6)
    across = tl.cdiv(width, COLUMNS)
    r = tile // across * ROWS + tl.arange(0, ROWS)
    c = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(pointer(plan, 2, tl.int64, False) + r, mask=r < height, other=0)
    if WIDE:
        width = tl.multiple_of(width, [16])
        row = row // 16 * 16  # unchanged; says so to the compiler
    column = c
    if not TOGETHER:
        column = tl.load(pointer(plan, 3, tl.int64, False) + c, mask=c < width, other=0)
    mask = (r < height)[:, None] & (c < width)[None, :]
    x = pointer(plan, 1, UNIT, WIDE) + row[:, None] + column[None, :]
    out = pointer(plan, 0, UNIT, WIDE) + r[:, None] * width + c[None, :]
    tl.store(out, tl.load(x, mask=mask, other=0), mask=mask)


def tile_shape(unit: int, width: int, wide: bool) -> tuple[int, int]:
    """(rows, columns) of one program, of elements of `unit` bytes.

    A thread moves 16 bytes, or 8 where it does so one by one, which takes registers. Tiles are one
    row high, or 64 columns wide where rows are so short that most of a tile would lie past their
    end.
    """
    block = 32 * LAUNCH["num_warps"] * (16 if wide else 8) // unit
    return (1, block) if 2 * width > block else (block // 64, 64)


class _Plan(NamedTuple):
    out: Tensor
    x: Tensor
    rows: Tensor
    columns: Tensor | None  # None: together
    width: int


def permute(outs: list[Tensor], xs: list[Tensor], indices: list[dict[int, Tensor]]) -> None:
    """One launch for all tensors of one size of element, shape of tile and kind of access."""
    launches: dict[tuple[int, bool, bool, int, int], list[_Plan]] = {}
    offsets = None
    for out, x, index in zip(outs, xs, indices, strict=True):
        if not out.numel():
            continue
        offsets = offsets or Offsets(out.device)
        unit = unit_of(out, x)
        plan = _plan(out, x, axes_of(out, x, index, unit), offsets)
        together = plan.columns is None
        wide = together and tables.aligned([out, x]) and plan.width % 16 == 0
        wide = wide and all(s * x.element_size() // unit % 16 == 0 for s in _strides(x))
        key = unit, together, wide, *tile_shape(unit, plan.width, wide)
        launches.setdefault(key, []).append(plan)
    for (unit, together, wide, rows, columns), plans in launches.items():
        _launch(plans, UNIT=UNITS[unit], TOGETHER=together, WIDE=wide, ROWS=rows, COLUMNS=columns)


def end_to_end(buffers: list[Tensor], tensors: Sequence[Sequence[Tensor]]) -> None:
    """buffers[i] = the elements of tensors[i] one after another; a launch for each unit."""
    device = buffers[0].device
    pieces = Pieces(buffers, tensors)
    start = tables.upload([0], torch.int64, device)  # the one row of each
    for unit, which in pieces.by_unit().items():
        wide, unit = unit == 16, min(unit, 8)
        width = pieces.nbytes[which] // unit
        wide = wide and not (width % 16).any()
        _, columns = tile_shape(unit, int(width.max()), wide)
        counts = -(-width // columns)
        zero = np.zeros_like(width)
        table = [pieces.to[which], pieces.source[which], zero + start.data_ptr(), zero]
        table += [zero + 1, width, np.cumsum(counts) - counts]
        shape = {"ROWS": 1, "COLUMNS": columns}
        flat = np.stack(table, 1).reshape(-1)
        _enqueue(flat, counts, device, UNIT=UNITS[unit], TOGETHER=True, WIDE=wide, **shape)


def _strides(x: Tensor) -> list[int]:
    """Strides between rows of elements that lie together."""
    return [s for s, size in zip(x.stride(), x.shape, strict=True) if s != 1 and size != 1]


def _plan(out: Tensor, x: Tensor, axes: list[Axis], offsets: Offsets) -> _Plan:
    last = axes[-1]
    if last.positions is None and last.stride == 1 and (last.size >= _RUN or len(axes) == 1):
        return _Plan(out, x, offsets.of(axes[:-1]), None, last.size)
    split, width = len(axes) - 1, last.size
    while split and width < _SHORT:
        split -= 1
        width *= axes[split].size
    return _Plan(out, x, offsets.of(axes[:split]), offsets.of(axes[split:]), width)


def _launch(plans: list[_Plan], **constants: Any) -> None:
    device = plans[0].out.device
    height, width = constants["ROWS"], constants["COLUMNS"]
    counts = [triton.cdiv(len(p.rows), height) * triton.cdiv(p.width, width) for p in plans]
    table: list[int] = []
    tiles = 0
    for p, count in zip(plans, counts, strict=True):
        addresses = [t.data_ptr() for t in (p.out, p.x, p.rows)]
        columns = 0 if p.columns is None else p.columns.data_ptr()
        table += [*addresses, columns, len(p.rows), p.width, tiles]
        tiles += count
    _enqueue(table, counts, device, **constants)


def _enqueue(
    table: Sequence[int] | np.ndarray,
    counts: Sequence[int] | np.ndarray,
    device: torch.device,
    **constants: Any,
) -> None:
    owners = tables.owners(counts, device)
    # Triton launches on the current device and stream; its interpreter is numpy, which warns.
    with torch.cuda.device_of(owners), np.errstate(all="ignore"):
        permute_kernel[(len(owners),)](
            tables.upload(table, torch.int64, device), owners, **constants, **LAUNCH
        )
