"""weighted_rows by csrc/cuda/weighted_rows.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ...check import sum_accumulator
from .. import tables
from .runtime import DTYPES, _cuda, place


def weighted_rows(out: Tensor, xs: list[Tensor], weights: Tensor, inner: int) -> None:
    if not out.numel():
        return
    device = out.device
    xs = [x.contiguous() for x in xs]
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=device)
    addresses = tables.upload([x.data_ptr() for x in xs], torch.int64, device)
    factors = weights.to(sum_accumulator(xs[0].dtype))
    _cuda.weighted_rows(
        out=target.data_ptr(),
        out_dtype=DTYPES[out.dtype],
        xs=addresses.data_ptr(),
        x_dtype=DTYPES[xs[0].dtype],
        weights=factors.data_ptr(),
        n=len(xs),
        numel=out.numel(),
        k=weights.shape[1],
        inner=inner,
        wide=tables.aligned([target, *xs]),
        **place(device),
    )
    if target is not out:
        out.copy_(target)
