"""Magnitudes as integers of the same order: what the selecting ops have in common.

A key is the bits of |d|, where d is a difference or a variance; every NaN has one key above
infinity. Importing this imports triton.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

from .common import divide, narrow, pointer, widen

# A thread takes eight neighbours: one 16-byte load of a 16-bit tensor. More would cost registers
# that the loads of other programs need.
BLOCK = 2048
# Fusion to FMA would skip the rounding of the squares of a variance.
LAUNCH = {"num_warps": BLOCK // 256, "enable_fp_fusion": False}


@triton.jit
def delta(x, base, offsets, mask, BASE: tl.constexpr, ROUNDED: tl.constexpr):
    """x, or x - base, in the accumulator's type; 0 where masked."""
    d = widen(tl.load(x + offsets, mask=mask, other=0.0))
    if BASE:
        d -= widen(tl.load(base + offsets, mask=mask, other=0.0))
        if ROUNDED:
            d = widen(narrow(d, x.dtype.element_ty))
    return d


@triton.jit
def variance(
    addresses, base, n, offsets, mask, IN: tl.constexpr, WIDE: tl.constexpr, BASE: tl.constexpr
):
    """By the two passes of the definition; the second finds the tensors in the caches."""
    origin = widen(tl.load(base + offsets, mask=mask, other=0.0)) if BASE else 0.0
    mean = widen(tl.load(pointer(addresses, 0, IN, WIDE) + offsets, mask=mask, other=0.0)) - origin
    for i in tl.range(1, n):
        x = pointer(addresses, i, IN, WIDE)
        mean += widen(tl.load(x + offsets, mask=mask, other=0.0)) - origin
    count = n.to(mean.dtype)
    mean = divide(mean, count)
    total = tl.zeros_like(mean)
    for i in tl.range(0, n):
        x = pointer(addresses, i, IN, WIDE)
        d = widen(tl.load(x + offsets, mask=mask, other=0.0)) - origin - mean
        total += d * d
    return divide(total, count)


@triton.jit
def key_of(d):
    if d.dtype == tl.float64:
        bits = d.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        key = tl.minimum(bits, 0x7FF0000000000001)
    else:
        bits = d.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        key = tl.minimum(bits, 0x7F800001)
    return key


@triton.jit
def keys_of(
    addresses,  # int64 [n]: contiguous tensors of type IN
    base,
    n,
    which,  # of the tensors, unless VARIANCE
    offsets,
    mask,
    IN: tl.constexpr,
    WIDE: tl.constexpr,  # all addresses are multiples of 16
    BASE: tl.constexpr,
    ROUNDED: tl.constexpr,
    VARIANCE: tl.constexpr,
):
    """Keys of elements; -1, below every key, where masked."""
    if VARIANCE:
        d = variance(addresses, base, n, offsets, mask, IN, WIDE, BASE)
    else:
        d = delta(pointer(addresses, which, IN, WIDE), base, offsets, mask, BASE, ROUNDED)
    return tl.where(mask, key_of(d), -1)


@triton.jit(do_not_specialize=["n"])
def keys_kernel(
    out,  # [vectors, numel]
    addresses,
    base,
    n,
    vectors,
    numel,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    ROUNDED: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    vector = (tl.program_id(0) % vectors).to(tl.int64)  # side by side: they share the base
    offsets = (tl.program_id(0) // vectors).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    key = keys_of(addresses, base, n, vector, offsets, mask, IN, WIDE, BASE, ROUNDED, VARIANCE)
    tl.store(out + vector * numel + offsets, key, mask=mask)
