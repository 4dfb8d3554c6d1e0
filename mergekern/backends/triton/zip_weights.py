"""zip_weights in Triton; importing this file imports triton.

The members of groups are listed once for labels that several tensors share, on the device. A tile
takes the k-th member of every group at once, so additions to an element keep their order.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...check import sum_accumulator
from .. import tables
from ..moves import Groups
from .common import DTYPES, narrow, pointer, widen

# Fusion to FMA would skip the rounding of each product.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def zip_weights_kernel(
    plans,  # int64 [results, 9]: out, divisors, by_row, height, width, inner, inputs from, to, tile
    inputs,  # int64 [all, 6]: x, row stride, starts and members of row groups, the same of columns
    factors,  # [all] of the accumulator's type
    owners,  # int32: the result of each tile
    TYPE: tl.constexpr,
    STAY: tl.constexpr,  # columns have no labels
    WIDE: tl.constexpr,  # addresses in bytes, strides and widths are multiples of 16
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    plan = plans + tl.load(owners + tile).to(tl.int64) * 9
    height = tl.load(plan + 3)
    width = tl.load(plan + 4)
    inner = tl.load(plan + 5)
    tile -= tl.load(plan + 8)
    across = tl.cdiv(width, COLUMNS)
    if WIDE:
        width = tl.multiple_of(width, [16])
    down = tile // across
    r = down * ROWS + tl.arange(0, ROWS)
    c = (tile - down * across) * COLUMNS + tl.arange(0, COLUMNS)
    group = c // inner
    within = c - group * inner  # a second 64-bit division takes registers
    total = tl.full((ROWS, COLUMNS), -0.0, factors.dtype.element_ty)
    for i in range(tl.load(plan + 6), tl.load(plan + 7)):
        x = pointer(inputs, i * 6, TYPE, WIDE)
        stride = tl.load(inputs + i * 6 + 1)
        if WIDE:
            stride = tl.multiple_of(stride, [16])
        factor = tl.load(factors + i)
        starts = pointer(inputs, i * 6 + 2, tl.int64, False)
        members = pointer(inputs, i * 6 + 3, tl.int64, False)
        begin = tl.load(starts + r, mask=r < height, other=0)
        end = tl.load(starts + r + 1, mask=r < height, other=0)
        most = tl.max(end - begin, 0)
        if STAY:
            total += _rows_of(
                x, c, c < width, stride, members, begin, end, most, factor, ROWS, COLUMNS
            )
        else:
            heads = pointer(inputs, i * 6 + 4, tl.int64, False)
            lists = pointer(inputs, i * 6 + 5, tl.int64, False)
            head = tl.load(heads + group, mask=c < width, other=0)
            tail = tl.load(heads + group + 1, mask=c < width, other=0)
            for k in range(tl.max(tail - head, 0)):
                there = head + k < tail
                column = tl.load(lists + head + k, mask=there, other=0) * inner + within
                total += _rows_of(
                    x, column, there, stride, members, begin, end, most, factor, ROWS, COLUMNS
                )
    by_row = tl.load(plan + 2)
    mask = (r < height)[:, None] & (c < width)[None, :]
    at = r[:, None] * by_row + group[None, :] * (1 - by_row)
    divisor = tl.load(pointer(plan, 1, tl.float64, False) + at, mask=mask, other=1.0)
    divisor = divisor.to(total.dtype)
    # For float32 `/` is approximate, and div_rn takes nothing else.
    total = total / divisor if total.dtype == tl.float64 else tl.div_rn(total, divisor)
    out = pointer(plan, 0, TYPE, WIDE) + r[:, None] * width + c[None, :]
    tl.store(out, narrow(total, TYPE), mask=mask)


@triton.jit
def _rows_of(
    x, column, there, stride, members, begin, end, most, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One column for each of the tile, products added over the rows of each group; else -0."""
    part = tl.full((ROWS, COLUMNS), -0.0, factor.dtype)
    for k in range(most):
        row = tl.load(members + begin + k, mask=begin + k < end, other=0)
        mask = (begin + k < end)[:, None] & there[None, :]
        value = tl.load(x + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
        part = tl.where(mask, part + widen(value).to(part.dtype) * factor, part)
    return part


def tile_shape(itemsize: int, width: int, wide: bool) -> tuple[int, int]:
    """(rows, columns) of one program.

    A thread reads 16 bytes of an input at a time, or 8 where it does so one by one, which takes
    registers. Tiles are one row high, or 16 columns wide where rows are so short that most of a
    tile would lie past their end; there a thread takes four elements one by one, as with fewer the
    compiler saves registers at the price of the stack.
    """
    threads = 32 * LAUNCH["num_warps"]
    block = threads * (16 if wide else 8) // itemsize
    if 2 * width > block:
        return 1, block
    return (block if wide else 4 * threads) // 16, 16


class _Plan(NamedTuple):
    out: Tensor  # [height, columns, inner]
    divisors: Tensor
    by_row: bool
    inputs: list[list[int]]
    factors: list[float]
    held: list[Tensor]


def zip_weights(
    outs: list[Tensor],
    xs: list[list[Tensor]],
    rows: list[list[Tensor] | None],
    cols: list[list[Tensor] | None],
    factors: list[list[float]],
    divisors: list[Tensor],
    by_row: list[bool],
) -> None:
    """One launch for all results of one dtype, shape of tile and kind of access."""
    if not outs:
        return
    launches: dict[tuple[torch.dtype, bool, bool, int, int], list[_Plan]] = {}
    groups = Groups(outs[0].device)
    for out, x, r, c, f, d, by in zip(outs, xs, rows, cols, factors, divisors, by_row, strict=True):
        if not out.numel():
            continue
        plan = _plan(out, x, r, c, f, d, by, groups)
        width = out.shape[1] * out.shape[2]
        wide = c is None and width % 16 == 0 and out.data_ptr() % 16 == 0
        wide = wide and all(p[0] % 16 == 0 and p[1] % 16 == 0 for p in plan.inputs)
        key = out.dtype, c is None, wide, *tile_shape(out.element_size(), width, wide)
        launches.setdefault(key, []).append(plan)
    for (dtype, stay, wide, height, width), plans in launches.items():
        _launch(plans, dtype, STAY=stay, WIDE=wide, ROWS=height, COLUMNS=width)


def _plan(
    out: Tensor,
    xs: list[Tensor],
    rows: list[Tensor] | None,
    cols: list[Tensor] | None,
    factors: list[float],
    divisors: Tensor,
    by_row: bool,
    groups: Groups,
) -> _Plan:
    held, inputs, used = [], [], []
    for i, x in enumerate(xs):
        if not x.numel():
            continue
        if not x.is_contiguous() and not x[:1].is_contiguous():
            x = x.contiguous()
        listed = [*groups.of(None if rows is None else rows[i], out.shape[0])]
        if cols is not None:
            listed += groups.of(cols[i], out.shape[1])
        addresses = [t.data_ptr() for t in listed]
        inputs.append([x.data_ptr(), x.stride(0), *addresses, *[0] * (4 - len(addresses))])
        used.append(factors[i])
        held += [x, *listed]
    return _Plan(out, divisors, by_row, inputs, used, held)


def _launch(plans: list[_Plan], dtype: torch.dtype, **constants: int) -> None:
    device = plans[0].out.device
    table: list[int] = []
    inputs: list[int] = []
    factors: list[float] = []
    counts: list[int] = []
    tiles = 0
    for p in plans:
        height, width, inner = p.out.shape[0], p.out.shape[1] * p.out.shape[2], p.out.shape[2]
        table += [p.out.data_ptr(), p.divisors.data_ptr(), int(p.by_row), height, width, inner]
        table += [len(factors), len(factors) + len(p.factors), tiles]
        inputs += [value for each in p.inputs for value in each]
        factors += p.factors
        counts.append(
            triton.cdiv(height, constants["ROWS"]) * triton.cdiv(width, constants["COLUMNS"])
        )
        tiles += counts[-1]
    # Triton launches on the current device and stream; its interpreter is numpy, which warns.
    with torch.cuda.device_of(plans[0].out), np.errstate(all="ignore"):
        zip_weights_kernel[(tiles,)](
            tables.upload(table, torch.int64, device),
            tables.upload(inputs, torch.int64, device),
            tables.upload(factors, sum_accumulator(dtype), device),
            tables.owners(counts, device),
            TYPE=DTYPES[dtype],
            **constants,
            **LAUNCH,
        )
