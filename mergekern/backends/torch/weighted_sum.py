"""weighted_sum in plain torch, with the bits of the kernels."""

from __future__ import annotations

from torch import Tensor

from ...check import sum_accumulator
from . import chunks


def weighted_sum(out: Tensor, xs: list[Tensor], weights: list[float], divisor: float) -> None:
    acc = sum_accumulator(xs[0].dtype)
    out, *xs = chunks.flat([out, *xs])
    for begin, end, _ in chunks.rows(xs):
        total = chunks.part(xs[0], begin, end, acc)
        total = total * chunks.scalar(weights[0], total)
        for x, w in zip(xs[1:], weights[1:], strict=True):
            total += chunks.part(x, begin, end, acc) * chunks.scalar(w, total)
        if divisor != 1.0:
            total /= chunks.scalar(divisor, total)
        chunks.store(out, begin, end, total)
