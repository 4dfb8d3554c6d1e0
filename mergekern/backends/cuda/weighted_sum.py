"""CUDA kernels of mergekern._cuda, on torch's current stream.

Kernels take contiguous tensors; strided ones are copied first. Addresses and weights travel in
tables on the device, which torch's allocator may reuse as soon as the call returns: later work of
the same stream runs after the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...check import sum_accumulator
from .. import tables
from .runtime import DTYPES, _cuda, place


def weighted_sum(out: Tensor, xs: list[Tensor], weights: list[float], divisor: float) -> None:
    if not out.numel():
        return
    device = out.device
    xs = [x.contiguous() for x in xs]
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=device)
    addresses = tables.upload([x.data_ptr() for x in xs], torch.int64, device)
    factors = tables.upload(weights, sum_accumulator(xs[0].dtype), device)
    _cuda.weighted_sum(
        out=target.data_ptr(),
        out_dtype=DTYPES[out.dtype],
        xs=addresses.data_ptr(),
        x_dtype=DTYPES[xs[0].dtype],
        weights=factors.data_ptr(),
        n=len(xs),
        numel=out.numel(),
        divisor=divisor,
        wide=tables.aligned([target, *xs]),
        **place(device),
    )
    if target is not out:
        out.copy_(target)
