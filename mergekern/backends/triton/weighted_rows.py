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
from .keys import BLOCK, LAUNCH


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
    EIGHT: tl.constexpr,  # eight elements lie in one "row", in "columns" side by side, or anywhere
    LONG: tl.constexpr,  # numbers of elements need 64 bits, whose divisions take far longer
    BLOCK: tl.constexpr,
):
    octet = tl.program_id(0).to(tl.int64 if LONG else tl.int32) * (BLOCK // 8)
    octet = (octet + tl.arange(0, BLOCK // 8))[:, None]
    lane = tl.arange(0, 8)[None, :]
    offsets = octet.to(tl.int64) * 8 + lane
    mask = offsets < numel
    there = mask
    if EIGHT == "row":
        row = octet // (inner // 8)
        there = octet.to(tl.int64) * 8 < numel
    elif EIGHT == "columns":
        row = octet % (k // 8) * 8 + lane
    else:
        row = (octet * 8 + lane) // inner % k
    x = widen(tl.load(pointer(addresses, 0, IN, WIDE) + offsets, mask=mask, other=0.0))
    total = x.to(factors.dtype.element_ty) * tl.load(factors + row, mask=there, other=0.0)
    for i in tl.range(1, n, loop_unroll_factor=4):  # overlaps the loads of several inputs
        x = widen(tl.load(pointer(addresses, i, IN, WIDE) + offsets, mask=mask, other=0.0))
        factors += k
        total += x.to(total.dtype) * tl.load(factors + row, mask=there, other=0.0)
    tl.store(out + offsets, narrow(total, out.dtype.element_ty), mask=mask)


def weighted_rows(out: Tensor, xs: list[Tensor], weights: Tensor, inner: int) -> None:
    numel, k = out.numel(), weights.shape[1]
    if not numel:
        return
    device, dtype = out.device, xs[0].dtype
    xs = [x.contiguous() for x in xs]
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=device)
    # Rows have no period: `inner` is 1, or k times it are all elements.
    eight = "row" if inner % 8 == 0 else "columns" if inner == 1 and k % 8 == 0 else "anywhere"
    # Triton launches on the current device and stream; its interpreter is numpy, which warns.
    with torch.cuda.device_of(out), np.errstate(all="ignore"):
        weighted_rows_kernel[(triton.cdiv(numel, BLOCK),)](
            target,
            tables.upload([x.data_ptr() for x in xs], torch.int64, device),
            weights.to(sum_accumulator(dtype)),
            len(xs),
            numel,
            k,
            inner,
            IN=DTYPES[dtype],
            WIDE=tables.aligned(xs),
            EIGHT=eight,
            LONG=numel > (1 << 31) - BLOCK,
            BLOCK=BLOCK,
            **LAUNCH,
        )
    if target is not out:
        out.copy_(target)
