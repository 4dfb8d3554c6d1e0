"""The kernels of kth_magnitude; importing this imports triton.

Programs are numbered with the brackets of a chunk side by side, so that what they share of it
comes from memory once and from the caches after that.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Triton kernels have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

from .keys import keys_of

RUN = tl.constexpr(16)  # neighbours that are sampled together: a cache line or less


@triton.jit(do_not_specialize=["n"])
def sample_kernel(
    sample,  # [vectors, runs * RUN]
    addresses,
    base,
    n,
    vectors,
    runs,
    numel,  # at least 32 per run
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    ROUNDED: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys of one run in each of `runs` equal strata, at a place that a hash decides."""
    vector = (tl.program_id(0) % vectors).to(tl.int64)
    i = (tl.program_id(0) // vectors).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < runs * RUN
    run = i // RUN
    place = (run * 2654435761 >> 7) % (numel // runs - RUN + 1)
    offsets = run * numel // runs + place + i % RUN
    key = keys_of(addresses, base, n, vector, offsets, mask, IN, WIDE, BASE, ROUNDED, VARIANCE)
    tl.store(sample + vector * runs * RUN + i, key, mask=mask)


@triton.jit(do_not_specialize=["n"])
def count_kernel(
    counts,  # int32 [brackets, chunks, 4]
    kept,  # [brackets, chunks, room]
    edges,  # [brackets, 2]: low, high
    of,  # int64 [brackets]: the vector
    addresses,
    base,
    n,
    brackets,
    chunks,
    steps,
    room,
    numel,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    ROUNDED: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys > high, == high, between, == low != high; those between in order, as room allows."""
    bracket = tl.program_id(0) % brackets
    chunk = (tl.program_id(0) // brackets).to(tl.int64)
    slot = bracket * chunks + chunk
    low, high = tl.load(edges + 2 * bracket), tl.load(edges + 2 * bracket + 1)
    vector = tl.load(of + bracket)
    tally = tl.zeros([BLOCK], tl.int32)  # three counts of a byte, as there are 32 steps at most
    filled = 0
    for step in tl.range(0, steps):
        offsets = (chunk * steps + step) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < numel
        key = keys_of(addresses, base, n, vector, offsets, mask, IN, WIDE, BASE, ROUNDED, VARIANCE)
        tally += tl.where(key > high, 1, tl.where(key == high, 1 << 8, 0))
        tally += tl.where((key == low) & (low < high), 1 << 16, 0)
        inside = (key > low) & (key < high)
        place = filled + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(kept + slot * room + place, key, mask=inside & (place < room))
        filled += tl.sum(inside.to(tl.int32), 0)
    tl.store(counts + 4 * slot, tl.sum(tally & 0xFF, 0))
    tl.store(counts + 4 * slot + 1, tl.sum(tally >> 8 & 0xFF, 0))
    tl.store(counts + 4 * slot + 2, filled)
    tl.store(counts + 4 * slot + 3, tl.sum(tally >> 16, 0))


@triton.jit
def descend(histogram, left):
    """The bin of 256 that holds the left-th entry from the top, entries above it, entries in it."""
    bins = 255 - tl.arange(0, 256)
    count = tl.load(histogram + bins)
    passed = tl.cumsum(count, 0) < left
    digit = tl.maximum(255 - tl.sum(passed.to(tl.int32), 0), 0)  # 0: there are fewer than `left`
    return digit, tl.sum(tl.where(passed, count, 0), 0), tl.load(histogram + digit)


@triton.jit
def advance(state, histograms, bracket, brackets, round):
    """Where a selection stands before a round that is not the first: bytes, rank, entries."""
    last = (round - 1) * brackets + bracket
    left = tl.load(state + 2 * last + 1)
    digit, larger, equal = descend(histograms + last * 256, left)
    return tl.load(state + 2 * last) << 8 | digit, left - larger, equal


@triton.jit(do_not_specialize=["round", "shift"])
def digit_kernel(
    state,  # int64 [rounds + 1, brackets, 2]
    histograms,  # int64 [rounds, brackets, 256]
    kept,
    counts,
    edges,
    brackets,
    chunks,
    room,
    round,
    shift,  # of this round's byte
    FIRST: tl.constexpr,  # round is 0
    BLOCK: tl.constexpr,
):
    """Counts this round's byte of key - low where the bytes above it are the chosen ones.

    Every program takes the step from the round before by itself, which saves a launch.
    """
    bracket = tl.program_id(0) % brackets
    slot = bracket * chunks + (tl.program_id(0) // brackets).to(tl.int64)
    low = tl.load(edges + 2 * bracket)
    filled = tl.minimum(tl.load(counts + 4 * slot + 2), room)
    here = round * brackets + bracket
    if not FIRST:
        prefix, left, _ = advance(state, histograms, bracket, brackets, round)
        if slot == bracket * chunks:
            tl.store(state + 2 * here, prefix)
            tl.store(state + 2 * here + 1, left)
    count = tl.zeros([256], tl.int32)
    for first in tl.range(0, filled, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < filled
        distance = tl.load(kept + slot * room + i, mask=mask, other=0) - low
        if not FIRST:
            mask = mask & (distance >> (shift + 8) == prefix)
        digit = (distance >> shift & 0xFF).to(tl.int32)
        count += tl.histogram(digit, 256, mask)
    bins = tl.arange(0, 256)
    tl.atomic_add(histograms + here * 256 + bins, count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["round"])
def tie_kernel(
    found,  # int64 [brackets, 6]: key, above, equal, a place to fill, the rank, was it here?
    ties,  # int32 [brackets, chunks]
    totals,  # int64 [brackets, 4]
    wanted,  # int64 [brackets]
    state,
    histograms,
    kept,
    counts,
    edges,
    brackets,
    chunks,
    room,
    round,
    BLOCK: tl.constexpr,
):
    """The selected key, and how often each chunk holds it."""
    bracket = tl.program_id(0) % brackets
    slot = bracket * chunks + (tl.program_id(0) // brackets).to(tl.int64)
    low, high = tl.load(edges + 2 * bracket), tl.load(edges + 2 * bracket + 1)
    k = tl.load(wanted + bracket)
    above = tl.load(totals + 4 * bracket)
    to_high = above + tl.load(totals + 4 * bracket + 1)
    to_inside = to_high + tl.load(totals + 4 * bracket + 2)
    to_low = to_inside + tl.load(totals + 4 * bracket + 3)
    distance, left, equal = advance(state, histograms, bracket, brackets, round)
    inside = (k > to_high) & (k <= to_inside)
    key = tl.where(inside, low + distance, tl.where(k <= to_high, high, low)).to(low.dtype)
    if inside:
        count = tl.zeros([BLOCK], tl.int32)
        filled = tl.minimum(tl.load(counts + 4 * slot + 2), room)
        for first in tl.range(0, filled, BLOCK):
            i = first + tl.arange(0, BLOCK)
            same = tl.load(kept + slot * room + i, mask=i < filled, other=-1) == key
            count += same.to(tl.int32)
        tl.store(ties + slot, tl.sum(count, 0))
    else:
        tl.store(ties + slot, tl.load(counts + 4 * slot + tl.where(k <= to_high, 1, 3)))
    if slot == bracket * chunks:
        row = found + 6 * bracket
        at_end = tl.where(k <= to_high, to_high - above, to_low - to_inside)
        larger = tl.where(inside, k - left, tl.where(k <= to_high, above, to_inside))
        tl.store(row, key.to(tl.int64))
        tl.store(row + 1, larger)
        tl.store(row + 2, tl.where(inside, equal, at_end))
        tl.store(row + 4, k)
        tl.store(row + 5, ((k > above) & (k <= to_low)).to(tl.int64))


@triton.jit(do_not_specialize=["n"])
def find_kernel(
    index,  # int64 [brackets]
    wanted,  # int64 [brackets, 2]: a key, a rank from 1
    chunk,  # int64 [brackets]: where that element lies
    before,  # int64 [brackets, chunks]: elements of that key up to the end of each chunk
    of,
    addresses,
    base,
    n,
    chunks,
    steps,
    numel,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    ROUNDED: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The index of the rank-th element of that key; -1 if there are fewer."""
    bracket = tl.program_id(0)
    vector, here = tl.load(of + bracket), tl.load(chunk + bracket)
    wanted_key, rank = tl.load(wanted + 2 * bracket), tl.load(wanted + 2 * bracket + 1)
    seen = tl.load(before + bracket * chunks + here - 1, mask=here > 0, other=0)
    found = 0  # one past its place in the chunk
    for step in tl.range(0, steps):
        places = step * BLOCK + tl.arange(0, BLOCK)
        offsets = here * steps * BLOCK + places
        mask = offsets < numel
        key = keys_of(addresses, base, n, vector, offsets, mask, IN, WIDE, BASE, ROUNDED, VARIANCE)
        same = key == wanted_key
        order = seen + tl.cumsum(same.to(tl.int32), 0)
        found += tl.sum(tl.where(same & (order == rank), places + 1, 0), 0)
        seen += tl.sum(same.to(tl.int32), 0)
    tl.store(index + bracket, tl.where(found > 0, here * steps * BLOCK + found - 1, -1))


@triton.jit(do_not_specialize=["n", "prefix", "shift", "over"])
def histogram_kernel(
    counts,  # int64 [LANES, 65536]
    addresses,
    base,
    n,
    prefix,
    shift,
    over,
    numel,
    LANES: tl.constexpr,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    ROUNDED: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the digit at `shift` of every key that is `prefix` from bit `over` on."""
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    key = keys_of(addresses, base, n, 0, offsets, mask, IN, WIDE, BASE, ROUNDED, VARIANCE)
    digit = (key >> shift & 0xFFFF).to(tl.int32)
    ones = tl.full([BLOCK], 1, tl.int64)
    place = counts + program % LANES * 65536 + digit
    tl.atomic_add(place, ones, mask=mask & (key >> over == prefix), sem="relaxed")
