"""weighted_rows in Triton; importing this file imports triton."""

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
from .common import DTYPES, narrow, pointer, widen
from .keys import LAUNCH


@triton.jit
def factors_at(factors, place, there, ROW: tl.constexpr):
    """Of elements [m, g], or of rows [m]."""
    factor = tl.load(factors + place, mask=there, other=0.0)
    if ROW:
        factor = factor[:, None]
    return factor


@triton.jit(do_not_specialize=["n"])
def weighted_rows_kernel(
    out,  # contiguous, `numel` elements
    addresses,  # int64 [n]: contiguous tensors of type IN
    factors,  # [n, k] of the accumulator's type
    n,
    numel,
    k,
    inner,
    IN: tl.constexpr,
    WIDE: tl.constexpr,  # all n addresses are multiples of 16
    GROUP: tl.constexpr,  # elements in 16 bytes
    LIE: tl.constexpr,  # groups: in a "row", in "columns" side by side, or "anywhere"
    LONG: tl.constexpr,  # numbers of elements need 64 bits, whose divisions take far longer
    BLOCK: tl.constexpr,
):
    groups = tl.program_id(0).to(tl.int64 if LONG else tl.int32) * (BLOCK // GROUP)
    groups += tl.arange(0, BLOCK // GROUP)
    lane = tl.arange(0, GROUP)[None, :]
    offsets = groups.to(tl.int64)[:, None] * GROUP + lane
    mask = offsets < numel
    there = mask
    if LIE == "row":
        place = groups // (inner // GROUP)
        there = groups.to(tl.int64) * GROUP < numel
    elif LIE == "columns":
        place = (groups % (k // GROUP) * GROUP)[:, None] + lane
    else:
        place = (groups[:, None] * GROUP + lane) // inner % k
    x = widen(tl.load(pointer(addresses, 0, IN, WIDE) + offsets, mask=mask, other=0.0))
    total = x.to(factors.dtype.element_ty) * factors_at(factors, place, there, LIE == "row")
    for i in tl.range(1, n, loop_unroll_factor=2):  # overlaps the loads of several inputs
        x = widen(tl.load(pointer(addresses, i, IN, WIDE) + offsets, mask=mask, other=0.0))
        factors += k
        total += x.to(total.dtype) * factors_at(factors, place, there, LIE == "row")
    tl.store(out + offsets, narrow(total, out.dtype.element_ty), mask=mask)


def weighted_rows(out: Tensor, xs: list[Tensor], weights: Tensor, inner: int) -> None:
    numel, k = out.numel(), weights.shape[1]
    if not numel:
        return
    device, dtype = out.device, xs[0].dtype
    xs = [x.contiguous() for x in xs]
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=device)
    group = 16 // dtype.itemsize
    block = 32 * LAUNCH["num_warps"] * group
    # Of rows there is one period: `inner` is 1, or k times it are all elements.
    columns = inner == 1 and k % group == 0
    lie = "row" if inner % group == 0 else "columns" if columns else "anywhere"
    # Triton launches on the current device and stream; its interpreter is numpy, which warns.
    with torch.cuda.device_of(out), np.errstate(all="ignore"):
        weighted_rows_kernel[(triton.cdiv(numel, block),)](
            target,
            tables.upload([x.data_ptr() for x in xs], torch.int64, device),
            weights.to(sum_accumulator(dtype)),
            len(xs),
            numel,
            k,
            inner,
            IN=DTYPES[dtype],
            WIDE=tables.aligned(xs),
            GROUP=group,
            LIE=lie,
            LONG=numel > (1 << 31) - block,
            BLOCK=block,
            **LAUNCH,
        )
    if target is not out:
        out.copy_(target)
