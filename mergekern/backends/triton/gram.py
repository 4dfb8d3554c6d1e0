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
SUMMED = 512  # partial sums that the second stage takes at a time


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
def _total(partial, chunks, BLOCK: tl.constexpr):
    lanes = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, chunks, BLOCK):
        chunk = begin + tl.arange(0, BLOCK)
        lanes += tl.load(partial + chunk, mask=chunk < chunks, other=0.0)
    return tl.sum(lanes, 0)


@triton.jit(do_not_specialize=["n", "tensors", "pairs", "rows", "chunks"])
def sums_kernel(out, partial, table, n, tensors, pairs, rows, chunks, BLOCK: tl.constexpr):
    """Partial sums of one pair and row into out [rows, n, n], which is contiguous."""
    program = tl.program_id(0).to(tl.int64)
    pair, row = program % pairs, program // pairs
    i = tl.load(table + 3 * tensors + pair)
    j = tl.load(table + 3 * tensors + pairs + pair)
    of = partial + (pair * rows + row) * chunks
    step = pairs.to(tl.int64) * rows * chunks
    to = out + row * n * n
    if j <= i + 1:  # each square comes from one pair
        tl.store(to + i * n + i, _total(of, chunks, BLOCK))
        if j == n - 1:
            tl.store(to + j * n + j, _total(of + 2 * step, chunks, BLOCK))
    if i != j:
        product = _total(of + step, chunks, BLOCK)
        tl.store(to + i * n + j, product)
        tl.store(to + j * n + i, product)


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
        sums_kernel[(rows * len(pairs),)](
            out,
            partial,
            table,
            n,
            len(tensors),
            len(pairs),
            rows,
            chunks,
            BLOCK=min(SUMMED, triton.next_power_of_2(chunks)),
            **LAUNCH,
        )


def _wide(tensors: list[Tensor]) -> bool:
    """Whether all rows are contiguous and begin at multiples of 16 elements."""
    steps = all(x.stride(1) == 1 and (x.stride(0) % 16 == 0 or len(x) == 1) for x in tensors)
    return steps and tables.aligned(tensors)
