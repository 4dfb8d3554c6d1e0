"""gram and gram_rows in Triton, in two stages: partial sums of chunks, then these in order.

A program takes two vectors and forms their three products, so that N vectors are read N - 1 times,
but programs of one chunk run side by side and all reads but the first come from the L2 cache.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

import itertools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tables
from .common import DTYPES, pointer, widen

# The specified arithmetic rounds each product.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
LANES = 1024  # sums that a program keeps side by side
LONGEST = 1 << 15  # elements of a chunk: a program's loads hide the reduction at its end
SUMMED = 512  # partial sums that a program of the second stage takes at a time


@triton.jit
def _read(table, i, n, row, column, mask, IN: tl.constexpr, WIDE: tl.constexpr):
    """Elements of tensor i in float64: its address and two strides stand n entries apart."""
    x = pointer(table, i, IN, WIDE)
    if WIDE:  # contiguous; the product with 16 tells the compiler where rows begin
        offsets = row * (tl.load(table + n + i) // 16 * 16) + column
    else:
        offsets = row * tl.load(table + n + i) + column * tl.load(table + 2 * n + i)
    return widen(tl.load(x + offsets, mask=mask, other=0.0)).to(tl.float64)


@triton.jit(do_not_specialize=["tensors", "pairs", "chunks"])
def dots_kernel(
    partial,  # float64 [3, pairs, rows, chunks]: <x, x>, <x, y>, <y, y>
    table,  # int64: addresses, row strides and column strides of the tensors, the base the last
    # one; then the first of each pair and the second of each pair
    tensors,
    pairs,
    rows,
    width,
    chunks,  # of each row
    IN: tl.constexpr,
    BASED: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    pair, chunk = program % pairs, program // pairs % chunks
    i = tl.load(table + 3 * tensors + pair)
    j = tl.load(table + 3 * tensors + pairs + pair)
    row = program // pairs // chunks * ROWS + tl.arange(0, ROWS)
    xx = tl.zeros([ROWS, COLUMNS], tl.float64)
    xy = tl.zeros([ROWS, COLUMNS], tl.float64)
    yy = tl.zeros([ROWS, COLUMNS], tl.float64)
    for begin in range(0, CHUNK, COLUMNS):
        column = chunk * CHUNK + begin + tl.arange(0, COLUMNS)[None, :]
        mask = (row[:, None] < rows) & (column < width)
        x = _read(table, i, tensors, row[:, None], column, mask, IN, WIDE)
        y = _read(table, j, tensors, row[:, None], column, mask, IN, WIDE)
        if BASED:
            base = _read(table, tensors - 1, tensors, row[:, None], column, mask, IN, WIDE)
            x -= base
            y -= base
        xx += x * x
        xy += x * y
        yy += y * y
    to = partial + (pair * rows + row) * chunks + chunk
    step = pairs.to(tl.int64) * rows * chunks
    tl.store(to, tl.sum(xx, 1), mask=row < rows)
    tl.store(to + step, tl.sum(xy, 1), mask=row < rows)
    tl.store(to + 2 * step, tl.sum(yy, 1), mask=row < rows)


@triton.jit
def _totals(partial, row, rows, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of each row's partial sums."""
    lanes = tl.zeros([ROWS, BLOCK], tl.float64)
    for begin in range(0, chunks, BLOCK):
        chunk = begin + tl.arange(0, BLOCK)
        mask = (row < rows)[:, None] & (chunk < chunks)[None, :]
        lanes += tl.load(partial + row[:, None] * chunks + chunk[None, :], mask=mask, other=0.0)
    return tl.sum(lanes, 1)


@triton.jit(do_not_specialize=["n", "tensors", "pairs", "rows", "chunks"])
def sums_kernel(
    out,  # float64 [rows, n, n], contiguous
    partial,  # as `dots_kernel` leaves it
    table,
    n,
    tensors,
    pairs,
    rows,
    chunks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    pair = program % pairs
    row = program // pairs * ROWS + tl.arange(0, ROWS)
    i = tl.load(table + 3 * tensors + pair)
    j = tl.load(table + 3 * tensors + pairs + pair)
    step = pairs.to(tl.int64) * rows * chunks
    of = partial + pair * rows * chunks
    to = out + row * n * n
    if j <= i + 1:  # each square comes from one pair
        tl.store(to + i * n + i, _totals(of, row, rows, chunks, ROWS, BLOCK), mask=row < rows)
        if j == n - 1:
            square = _totals(of + 2 * step, row, rows, chunks, ROWS, BLOCK)
            tl.store(to + j * n + j, square, mask=row < rows)
    if i != j:
        product = _totals(of + step, row, rows, chunks, ROWS, BLOCK)
        tl.store(to + i * n + j, product, mask=row < rows)
        tl.store(to + j * n + i, product, mask=row < rows)


def gram(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    flat = [x.contiguous().view(1, -1) for x in xs]
    whole = out if out.is_contiguous() else torch.empty_like(out)
    gram_rows(whole[None], flat, None if base is None else base.contiguous().view(1, -1))
    if whole is not out:
        out.copy_(whole)


def gram_rows(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    """Into a contiguous `out`."""
    rows, width = xs[0].shape
    if not rows * width:
        out.zero_()
        return
    n, tensors = len(xs), xs if base is None else [*xs, base]
    pairs = list(itertools.combinations(range(n), 2)) or [(0, 0)]
    columns = min(LANES, triton.next_power_of_2(width))
    chunk = min(LONGEST, triton.cdiv(width, columns) * columns)
    chunks, height = triton.cdiv(width, chunk), LANES // columns
    entries = [x.data_ptr() for x in tensors]
    entries += [x.stride(d) for d in (0, 1) for x in tensors]
    entries += [pair[side] for side in (0, 1) for pair in pairs]
    table = tables.upload(entries, torch.int64, out.device)
    shape = 3, len(pairs), rows, chunks
    partial = torch.empty(shape, dtype=torch.float64, device=out.device)
    # Triton launches on the current device and stream; its interpreter is numpy, which warns.
    with torch.cuda.device_of(out), np.errstate(all="ignore"):
        dots_kernel[(triton.cdiv(rows, height) * chunks * len(pairs),)](
            partial,
            table,
            len(tensors),
            len(pairs),
            rows,
            width,
            chunks,
            IN=DTYPES[xs[0].dtype],
            BASED=base is not None,
            WIDE=_wide(tensors),
            CHUNK=chunk,
            ROWS=height,
            COLUMNS=columns,
            **LAUNCH,
        )
        block = min(SUMMED, triton.next_power_of_2(chunks))
        sums_kernel[(triton.cdiv(rows, SUMMED // block) * len(pairs),)](
            out,
            partial,
            table,
            n,
            len(tensors),
            len(pairs),
            rows,
            chunks,
            ROWS=SUMMED // block,
            BLOCK=block,
            **LAUNCH,
        )


def _wide(tensors: list[Tensor]) -> bool:
    """Whether all rows are contiguous and begin at multiples of 16 elements."""
    steps = all(x.stride(1) == 1 and (x.stride(0) % 16 == 0 or len(x) == 1) for x in tensors)
    return steps and tables.aligned(tensors)
