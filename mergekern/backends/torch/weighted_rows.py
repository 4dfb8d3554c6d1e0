"""weighted_rows in plain torch, with the bits of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...check import sum_accumulator
from . import chunks


def weighted_rows(out: Tensor, xs: list[Tensor], weights: Tensor, inner: int) -> None:
    acc = sum_accumulator(xs[0].dtype)
    factors = weights.to(acc)
    out, *xs = chunks.flat([out, *xs])
    for begin, end, at in chunks.rows(xs):
        total = chunks.part(xs[0], begin, end, acc)
        elements = torch.arange(at, at + total.numel(), device=total.device)
        row = elements // inner % weights.shape[1]
        total = total * factors[0][row]
        for x, w in zip(xs[1:], factors[1:], strict=True):
            total += chunks.part(x, begin, end, acc) * w[row]
        chunks.store(out, begin, end, total)
