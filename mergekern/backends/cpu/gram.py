"""gram and gram_rows by csrc/gram.cpp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import runtime


def gram(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    views, origin, n = [runtime.view(x) for x in xs], runtime.optional_view(base), len(xs)

    def kernel(dots: int, begin: int, end: int) -> None:
        scratch = torch.empty(runtime._cpu.gram_scratch(n=n), dtype=torch.float64)
        runtime._cpu.gram(
            xs=views, base=origin, scratch=scratch.data_ptr(), dots=dots, begin=begin, end=end
        )

    add_chunks(out, kernel, xs[0].numel())


def add_chunks(out: Tensor, kernel: Callable[[int, int, int], None], total: int) -> None:
    """The sum over chunks of what kernel(address, begin, end) puts there: values like `out`."""
    parts = torch.empty(-(-total // runtime.CHUNK), *out.shape, dtype=torch.float64)
    runtime.chunks(
        lambda begin, end: kernel(parts[begin // runtime.CHUNK].data_ptr(), begin, end), total
    )
    if total:
        out.copy_(parts.cumsum(0)[-1])  # in order, where sum(0) picks one by the shape
    else:
        out.zero_()


def gram_rows(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    """Dot products of rows; where columns are next to each other in memory, column by column.

    Other rows are copied, a chunk at a time.
    """
    tensors = xs if base is None else [*xs, base]
    rows, width = xs[0].shape
    if all(x.is_contiguous() for x in tensors):
        _rows(out, tensors, len(xs))
    elif all(x.stride(0) == 1 for x in tensors):
        _columns(out, [x.T for x in tensors], len(xs))
    else:
        step = max(1, 4 * runtime.CHUNK // max(1, width))
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


def _columns(out: Tensor, tensors: list[Tensor], n: int) -> None:
    """The same for columns of matrices with a last stride of 1."""
    length, columns = tensors[0].shape
    views = [runtime.matrix(x) for x in tensors]
    origin = views.pop() if len(views) > n else None
    block = runtime._cpu.GRAM_BLOCK

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty((n * (n + 1) // 2 + n) * block, dtype=torch.float64)
        runtime._cpu.gram_columns(
            xs=views,
            base=origin,
            length=length,
            scratch=scratch.data_ptr(),
            dots=out.data_ptr(),
            begin=begin,
            end=end,
        )

    runtime.chunks(kernel, columns, max(block, runtime.CHUNK // max(1, length) // block * block))
