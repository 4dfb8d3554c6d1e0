"""weighted_sum by csrc/weighted_sum.cpp."""

from __future__ import annotations

from torch import Tensor

from . import runtime


def weighted_sum(out: Tensor, xs: list[Tensor], weights: list[float], divisor: float) -> None:
    target, views = runtime.view(out, output=True), [runtime.view(x) for x in xs]

    def kernel(begin: int, end: int) -> None:
        runtime._cpu.weighted_sum(
            out=target, xs=views, weights=weights, divisor=divisor, begin=begin, end=end
        )

    runtime.chunks(kernel, out.numel())
