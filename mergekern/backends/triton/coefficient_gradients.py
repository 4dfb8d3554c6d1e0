"""coefficient_gradients in Triton, in two stages: partial sums of chunks, then their sum by torch.

A program takes one task vector. Programs of one chunk run side by side, so that the gradient and
the base are read from memory once and come from the L2 cache for the other task vectors.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tables
from .common import DTYPES, pointer, widen
from .gram import LANES, LAUNCH, LONGEST


@triton.jit
def _read(x, offsets, mask):
    return widen(tl.load(x + offsets, mask=mask, other=0.0)).to(tl.float64)


@triton.jit(do_not_specialize=["n"])
def products_kernel(
    partial,  # float64 [chunks, n]
    grad,
    table,  # int64: addresses of the n tensors, then of the base
    n,
    numel,
    IN: tl.constexpr,
    BASED: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    begin = program // n * CHUNK
    x = pointer(table, program % n, IN, WIDE)
    base = pointer(table, n, IN, WIDE) if BASED else x
    sums = tl.zeros([LANES], tl.float64)
    for step in range(0, CHUNK, LANES):
        offsets = begin + step + tl.arange(0, LANES)
        mask = offsets < numel
        d = _read(x, offsets, mask)
        if BASED:
            d -= _read(base, offsets, mask)
        sums += d * _read(grad, offsets, mask)
    tl.store(partial + program, tl.sum(sums, 0))


def coefficient_gradients(out: Tensor, grad: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    numel, n = grad.numel(), len(xs)
    if not numel:
        out.zero_()
        return
    grad, *tensors = [x.contiguous() for x in ([grad, *xs] if base is None else [grad, *xs, base])]
    lanes = min(LANES, triton.next_power_of_2(numel))
    chunk = min(LONGEST, triton.cdiv(numel, lanes) * lanes)
    chunks = triton.cdiv(numel, chunk)
    table = tables.upload([x.data_ptr() for x in tensors], torch.int64, out.device)
    partial = torch.empty(chunks, n, dtype=torch.float64, device=out.device)
    # Triton launches on the current device and stream; its interpreter is numpy, which warns.
    with torch.cuda.device_of(out), np.errstate(all="ignore"):
        products_kernel[(chunks * n,)](
            partial,
            grad,
            table,
            n,
            numel,
            IN=DTYPES[xs[0].dtype],
            BASED=base is not None,
            WIDE=tables.aligned(tensors),
            CHUNK=chunk,
            LANES=lanes,
            **LAUNCH,
        )
    out.copy_(partial.sum(0))
