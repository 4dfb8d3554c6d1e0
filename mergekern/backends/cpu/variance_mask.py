"""variance_mask by csrc/variance_mask.cpp, with the selection of kth_magnitude."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ... import digits
from ...check import accumulator
from ...keep import Threshold
from . import kth_magnitude, runtime

_cpu = runtime._cpu


def _source(xs: list[Tensor], base: Tensor | None) -> kth_magnitude.Source:
    keys = _cpu.KeySource(
        xs=[runtime.view(x) for x in xs], base=runtime.optional_view(base), variance=True
    )
    return kth_magnitude.Source(keys, xs[0].numel(), accumulator(xs[0].dtype))


def variance_threshold(xs: list[Tensor], base: Tensor | None, share: float) -> kth_magnitude.Found:
    return kth_magnitude.select_share(_source(xs, base), share)


def digit_histogram(
    xs: list[Tensor], base: Tensor | None, prefix: int, shift: int, rounded: bool
) -> np.ndarray:
    return kth_magnitude.histogram(_source(xs, base), prefix, shift)


def place_of_tie(
    xs: list[Tensor], base: Tensor | None, value: float, rank: int, rounded: bool
) -> tuple[int, int]:
    return kth_magnitude.place(_source(xs, base), value, rank)


def variance_mask(
    bits: Tensor | None, xs: list[Tensor], base: Tensor | None, threshold: Threshold
) -> list[float]:
    source = _source(xs, base)
    total = source.total
    sums = torch.zeros(-(-total // runtime.CHUNK), len(xs), dtype=torch.float64)

    def kernel(begin: int, end: int) -> None:
        _cpu.variance_mask(
            source=source.keys,
            all=bits is None,
            threshold=digits.value_key(threshold.value, source.acc),
            cut=threshold.cut,
            bits=0 if bits is None else bits.data_ptr(),
            squares=sums[begin // runtime.CHUNK].data_ptr(),
            begin=begin,
            end=end,
        )

    runtime.chunks(kernel, total)
    squares: list[float] = sums.sum(0).tolist()
    return squares
