"""weighted_rows by csrc/weighted_rows.cpp."""

from __future__ import annotations

from torch import Tensor

from . import runtime


def weighted_rows(out: Tensor, xs: list[Tensor], weights: Tensor, inner: int) -> None:
    target, views = runtime.view(out, output=True), [runtime.view(x) for x in xs]
    address, k = weights.data_ptr(), weights.shape[1]

    def kernel(begin: int, end: int) -> None:
        runtime._cpu.weighted_rows(
            out=target, xs=views, weights=address, k=k, inner=inner, begin=begin, end=end
        )

    runtime.chunks(kernel, out.numel())
