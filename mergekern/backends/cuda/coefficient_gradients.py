"""coefficient_gradients by csrc/cuda/coefficient_gradients.cu, in two stages: partial sums of
chunks, then their sum by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tables
from .runtime import DTYPES, _cuda, place

_CHUNK = 1 << 14  # elements of a block: 64 a thread, so that loads hide the sums at its end


def coefficient_gradients(out: Tensor, grad: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    numel, n, device = grad.numel(), len(xs), out.device
    if not numel:
        out.zero_()
        return
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
    tensors = [x.contiguous() for x in (xs if base is None else [*xs, base])]
    addresses = tables.upload([x.data_ptr() for x in tensors], torch.int64, device)
    chunks = -(-numel // _CHUNK)
    partial = torch.empty(chunks, n, dtype=torch.float64, device=device)
    _cuda.coefficient_gradients(
        partial=partial.data_ptr(),
        grad=grad.data_ptr(),
        xs=addresses.data_ptr(),
        grad_dtype=DTYPES[grad.dtype],
        dtype=DTYPES[xs[0].dtype],
        based=base is not None,
        wide=tables.aligned([grad, *tensors]),
        n=n,
        numel=numel,
        chunk=_CHUNK,
        chunks=chunks,
        **place(device),
    )
    out.copy_(partial.sum(0))
