"""rank_mask in Triton; importing this imports triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...keep import MagPrune
from .. import row_ranks
from .keys import BLOCK, LAUNCH
from .kth_magnitude import Source
from .masks import draws, pack


@triton.jit
def row_of(e, length, inner):
    """The row of an element of [units, length, inner], rows being numbered [units, inner]."""
    return e // (length * inner) * inner + e % inner


@triton.jit
def bin_of(key, rows, row, mask, HALF: tl.constexpr):
    """Of 2 HALF bins the upper ones cut up the octaves below the largest key, the others the rest.

    rows: int64 [rows, 5]: least key, where the upper bins begin, largest key, shifts of both.
    """
    least = tl.load(rows + 5 * row, mask=mask, other=0)
    floor = tl.load(rows + 5 * row + 1, mask=mask, other=0)
    lower = key - least >> tl.load(rows + 5 * row + 3, mask=mask, other=0)
    upper = key - floor >> tl.load(rows + 5 * row + 4, mask=mask, other=0)
    return tl.where(key < floor, lower, upper + HALF)


@triton.jit
def bin_kernel(
    counts,  # int32 [rows, 2 HALF], added to
    keys,
    rows,
    numel,
    length,
    inner,
    LONG: tl.constexpr,  # numbers of elements need 64 bits, whose divisions take far longer
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64 if LONG else tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = e < numel
    row = row_of(e, length, inner)
    key = tl.load(keys + e, mask=mask, other=0).to(tl.int64)
    place = row.to(tl.int64) * (2 * HALF) + bin_of(key, rows, row, mask, HALF)
    tl.atomic_add(counts + place, tl.full([BLOCK], 1, tl.int32), mask=mask, sem="relaxed")


@triton.jit
def rank(keys, p, length, inner, BLOCK: tl.constexpr):
    """The rank of element p within its row, by counting."""
    key = tl.load(keys + p)
    start = p // (length * inner) * (length * inner) + p % inner
    count = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, length, BLOCK):
        j = first + tl.arange(0, BLOCK).to(start.dtype)
        other = tl.load(keys + start + j * inner, mask=j < length, other=0)
        before = (other < key) | ((other == key) & (start + j * inner < p))
        count += (before & (j < length)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit(do_not_specialize=["seed", "first"])
def rank_mask_kernel(
    bits,
    sums,  # float64 [programs, 2]: sum of magnitudes, of those kept
    keys,
    rows,
    ends,  # int32 [rows, 2 HALF]: elements in each bin and those below
    limits,  # int32 [length]
    seed,  # the Philox key
    first,
    numel,
    length,
    inner,
    LONG: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    e = program.to(tl.int64 if LONG else tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = e < numel
    row = row_of(e, length, inner)
    stored = tl.load(keys + e, mask=mask, other=0)
    key = stored.to(tl.int64)
    chosen = bin_of(key, rows, row, mask, HALF)
    place = ends + row.to(tl.int64) * (2 * HALF) + chosen
    start = tl.load(place - 1, mask=mask & (chosen > 0), other=0)
    last = tl.load(place, mask=mask, other=1) - 1
    # The ranks of a row of equal keys are its indices.
    least = tl.load(rows + 5 * row, mask=mask, other=0)
    equal = least == tl.load(rows + 5 * row + 2, mask=mask, other=1)
    j = (e // inner % length).to(tl.int32)
    start, last = tl.where(equal, j, start), tl.where(equal, j, last)
    draw = draws(seed, first + e.to(tl.int64))
    kept = mask & (draw < tl.load(limits + start, mask=mask, other=0))
    undecided = mask & ~kept & (draw < tl.load(limits + last, mask=mask, other=0))
    while tl.max(undecided.to(tl.int32), 0) > 0:
        p = tl.min(tl.where(undecided, e, numel), 0)
        # Equal keys after it in the row follow it in rank.
        same = (row == row_of(p, length, inner)) & (stored == tl.load(keys + p)) & (e >= p) & mask
        ranks = rank(keys, p, length, inner, BLOCK) + tl.cumsum(same.to(tl.int32), 0) - 1
        kept = tl.where(same, draw < tl.load(limits + ranks, mask=same, other=0), kept)
        undecided = undecided & ~same
    pack(bits, program, kept, numel, BLOCK)
    if stored.dtype == tl.int64:
        magnitude = stored.to(tl.float64, bitcast=True)
    else:
        magnitude = stored.to(tl.float32, bitcast=True).to(tl.float64)
    tl.store(sums + 2 * program, tl.sum(magnitude, 0))
    tl.store(sums + 2 * program + 1, tl.sum(tl.where(kept, magnitude, 0.0), 0))


def rank_mask(
    bits: Tensor, x: Tensor, base: Tensor | None, rule: MagPrune, first: int
) -> tuple[float, float]:
    return row_ranks.rank_mask(bits, x, base, rule, first, Source, _mask)


def _mask(
    bits: Tensor, binned: row_ranks.Binned, limits: Tensor, key: tuple[int, int], first: int
) -> Tensor:
    """The mask of whole units, and the sums of each block."""
    keys = binned.keys
    _, length, inner = keys.shape
    programs = triton.cdiv(keys.numel(), BLOCK)
    sums = torch.empty(programs, 2, dtype=torch.float64, device=keys.device)
    shared = {
        "keys": keys,
        "rows": binned.rows,
        "numel": keys.numel(),
        "length": length,
        "inner": inner,
        "LONG": keys.numel() > (1 << 31) - BLOCK,
        "HALF": binned.half,
        "BLOCK": BLOCK,
        **LAUNCH,
    }
    with torch.cuda.device_of(keys), np.errstate(all="ignore"):
        bin_kernel[(programs,)](counts=binned.counts, **shared)
        rank_mask_kernel[(programs,)](
            bits=bits,
            sums=sums,
            ends=binned.ends(),
            limits=limits,
            seed=key[0] | key[1] << 32,
            first=first,
            **shared,
        )
    return sums
