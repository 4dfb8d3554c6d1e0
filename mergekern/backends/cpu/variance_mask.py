"""variance_mask by csrc/variance_mask.cpp, with the selection of kth_magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import digits
from ...check import accumulator
from . import kth_magnitude, runtime

_cpu = runtime._cpu


def variance_mask(
    bits: Tensor | None, xs: list[Tensor], base: Tensor | None, share: float
) -> list[float]:
    total, acc = xs[0].numel(), accumulator(xs[0].dtype)
    source = _cpu.KeySource(
        xs=[runtime.view(x) for x in xs], base=runtime.optional_view(base), variance=True
    )
    threshold = cut = 0
    if bits is not None:
        value, _, _, cut = kth_magnitude.select_share(source, total, acc, share)
        threshold = digits.value_key(value, acc)
    sums = torch.zeros(-(-total // runtime.CHUNK), len(xs), dtype=torch.float64)

    def kernel(begin: int, end: int) -> None:
        _cpu.variance_mask(
            source=source,
            all=bits is None,
            threshold=threshold,
            cut=cut,
            bits=0 if bits is None else bits.data_ptr(),
            squares=sums[begin // runtime.CHUNK].data_ptr(),
            begin=begin,
            end=end,
        )

    runtime.chunks(kernel, total)
    squares: list[float] = sums.sum(0).tolist()
    return squares
