"""gram by csrc/gram.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from . import runtime


def gram(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    views, origin, n = [runtime.view(x) for x in xs], runtime.optional_view(base), len(xs)
    total = xs[0].numel()
    partial = torch.zeros(-(-total // runtime.CHUNK), n, n, dtype=torch.float64)

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty(n * runtime._cpu.GRAM_BLOCK, dtype=torch.float64)
        dots = partial[begin // runtime.CHUNK].data_ptr()
        runtime._cpu.gram(
            xs=views, base=origin, scratch=scratch.data_ptr(), dots=dots, begin=begin, end=end
        )

    runtime.chunks(kernel, total)
    upper = partial.sum(0)
    out.copy_(upper + upper.triu(1).T)
