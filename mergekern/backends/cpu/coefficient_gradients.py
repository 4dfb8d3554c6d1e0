"""coefficient_gradients by csrc/coefficient_gradients.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from . import runtime
from .gram import add_chunks


def coefficient_gradients(out: Tensor, grad: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    gradient, views = runtime.view(grad), [runtime.view(x) for x in xs]
    origin, n = runtime.optional_view(base), len(xs)

    def kernel(dots: int, begin: int, end: int) -> None:
        scratch = torch.empty(n * runtime._cpu.GRAM_LANES, dtype=torch.float64)
        runtime._cpu.coefficient_gradients(
            grad=gradient,
            xs=views,
            base=origin,
            scratch=scratch.data_ptr(),
            dots=dots,
            begin=begin,
            end=end,
        )

    add_chunks(out, kernel, grad.numel())
