"""gram and gram_rows by csrc/gram.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from . import runtime


def gram(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    views, origin, n = [runtime.view(x) for x in xs], runtime.optional_view(base), len(xs)
    total = xs[0].numel()
    parts = torch.empty(-(-total // runtime.CHUNK), n, n, dtype=torch.float64)

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty(runtime._cpu.gram_scratch(n=n), dtype=torch.float64)
        dots = parts[begin // runtime.CHUNK].data_ptr()
        runtime._cpu.gram(
            xs=views, base=origin, scratch=scratch.data_ptr(), dots=dots, begin=begin, end=end
        )

    runtime.chunks(kernel, total)
    if total:
        out.copy_(parts.cumsum(0)[-1])  # in order, where sum(0) picks one by the shape
    else:
        out.zero_()


def gram_rows(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    """Rows that do not lie one after the other in memory are copied, a chunk at a time."""
    tensors = xs if base is None else [*xs, base]
    rows, width = xs[0].shape
    step = max(1, 4 * runtime.CHUNK // max(1, width))
    if all(x.is_contiguous() for x in tensors):
        step = max(1, rows)
    for begin in range(0, rows, step):
        part = [x[begin : begin + step].contiguous() for x in tensors]
        _rows(out[begin : begin + step], part, len(xs))


def _rows(out: Tensor, tensors: list[Tensor], n: int) -> None:
    """All contiguous: n matrices, and the base if there is one more."""
    rows, width = tensors[0].shape
    views = [runtime.view(x) for x in tensors]
    origin = views.pop() if len(views) > n else None

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty(runtime._cpu.gram_scratch(n=n), dtype=torch.float64)
        runtime._cpu.gram_rows(
            xs=views,
            base=origin,
            width=width,
            scratch=scratch.data_ptr(),
            dots=out.data_ptr(),
            begin=begin,
            end=end,
        )

    runtime.chunks(kernel, rows, max(1, runtime.CHUNK // max(1, width)))
