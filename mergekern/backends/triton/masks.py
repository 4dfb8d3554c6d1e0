"""Random draws and stored masks in Triton kernels; importing this imports triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Triton kernels have no Python types.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def draws(key, elements):
    """The 16-bit Philox draws of elements by their numbers, as csrc/philox.h lays them out."""
    return draws_in(key, elements >> 3, elements & 7)


@triton.jit
def draws_in(key, block, lane):
    """Those of elements 8 block + lane, the two of shapes that broadcast: blocks [n, 1] and lanes
    [1, 8] share the work for eight elements."""
    block = block.to(tl.int64)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(key, low, high, zero, zero)
    lane = lane.to(tl.uint32)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    return (word >> ((lane & 1) * 16) & 0xFFFF).to(tl.int32)


@triton.jit
def pack(bits, program, kept, numel, BLOCK: tl.constexpr):
    """Stores block `program` of a mask as numpy.packbits does, the first element on top.

    kept is false past `numel`.
    """
    eight = tl.reshape(kept.to(tl.int32), [BLOCK // 8, 8])
    octet = tl.sum(eight << (7 - tl.arange(0, 8))[None, :], 1)
    places = program * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(bits + places, octet.to(tl.uint8), mask=places * 8 < numel)
