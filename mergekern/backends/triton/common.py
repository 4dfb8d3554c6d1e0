"""Element types and conversions shared by the Triton kernels; importing this imports triton.

bfloat16 is converted on its bits. Compiled code has instructions for that, but Triton's
interpreter truncates where they round and gets subnormal numbers wrong; the integer form gives
the same bits in both worlds and costs a few operations an element, far below the memory time.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Triton kernels have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def widen(x):
    """x in its accumulator's type: float64 for float64, else float32. Exact."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        y = bits.to(tl.float32, bitcast=True)
    elif x.dtype == tl.float64:
        y = x
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def _to_odd(x):
    # float64 to float32, rounded to odd: rounding that to 16 bits rounds x only once.
    y = x.to(tl.float32)
    back = y.to(tl.float64)
    bits = y.to(tl.int32, bitcast=True)
    inexact = (back != x) & (x == x)
    bits = tl.where(inexact & (tl.abs(back) > tl.abs(x)), bits - 1, bits)
    return tl.where(inexact, bits | 1, bits).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, OUT: tl.constexpr):
    """An accumulator x rounded once to OUT: to nearest, ties to even."""
    if x.dtype == tl.float64 and OUT.primitive_bitwidth == 16:
        x = _to_odd(x)
    if OUT == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        y = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(OUT)
    return y


@triton.jit
def divide(x, y):
    """x / y correctly rounded, in the type of x."""
    # For float32 `/` is approximate, and div_rn takes nothing else.
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def pointer(addresses, i, IN: tl.constexpr, WIDE: tl.constexpr):
    """Entry i of a table of int64 addresses, as a pointer to IN.

    The compiler knows nothing of an address that it reads; WIDE says it is a multiple of 16.
    """
    x = tl.load(addresses + i).to(tl.pointer_type(IN))
    if WIDE:
        x = tl.multiple_of(x, [16])
    return x
