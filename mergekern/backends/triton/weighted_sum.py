"""weighted_sum in Triton; importing this file imports triton.

Whether the kernel is compiled or interpreted (TRITON_INTERPRET=1, CPU tensors) is settled when
`triton.jit` decorates it. The bits are the same.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...check import sum_accumulator
from .. import tables
from .common import DTYPES, divide, narrow, pointer, widen

# Fusion to FMA would skip the rounding of each product.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["n"])
def weighted_sum_kernel(
    out,  # contiguous, `numel` elements
    addresses,  # int64 [n]: contiguous tensors of type IN
    factors,  # [n + 1] of the accumulator's type: the weights, then the divisor
    n,
    numel,  # masked 16-byte access needs a multiple of 16; other sizes go element by element
    IN: tl.constexpr,
    WIDE: tl.constexpr,  # all n addresses are multiples of 16
    DIVIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    x = widen(tl.load(pointer(addresses, 0, IN, WIDE) + offsets, mask=mask, other=0.0))
    total = x.to(factors.dtype.element_ty) * tl.load(factors)
    for i in tl.range(1, n, loop_unroll_factor=4):  # overlaps the loads of several inputs
        x = widen(tl.load(pointer(addresses, i, IN, WIDE) + offsets, mask=mask, other=0.0))
        total += x.to(total.dtype) * tl.load(factors + i)
    if DIVIDE:
        total = divide(total, tl.load(factors + n))
    tl.store(out + offsets, narrow(total, out.dtype.element_ty), mask=mask)


def block_size(numel: int, itemsize: int) -> int:
    """Elements of one program.

    A thread reads 16 bytes of an input at a time. It does so once for small tensors, to spread
    them over as many multiprocessors as possible, and twice from 2**22 elements on, where programs
    abound and loads in flight count.
    """
    reads = 1 if numel < 1 << 22 else 2
    return reads * 32 * LAUNCH["num_warps"] * 16 // itemsize


def weighted_sum(out: Tensor, xs: list[Tensor], weights: list[float], divisor: float) -> None:
    numel = out.numel()
    if not numel:
        return
    device, dtype = out.device, xs[0].dtype
    xs = [x.contiguous() for x in xs]
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=device)
    block = block_size(numel, dtype.itemsize)
    # Triton launches on the current device and stream; its interpreter is numpy, which warns.
    with torch.cuda.device_of(out), np.errstate(all="ignore"):
        weighted_sum_kernel[(triton.cdiv(numel, block),)](
            target,
            tables.upload([x.data_ptr() for x in xs], torch.int64, device),
            tables.upload([*weights, divisor], sum_accumulator(dtype), device),
            len(xs),
            numel,
            IN=DTYPES[dtype],
            WIDE=tables.aligned(xs),
            DIVIDE=divisor != 1.0,
            BLOCK=block,
            **LAUNCH,
        )
    if target is not out:
        out.copy_(target)
