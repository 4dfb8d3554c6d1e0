"""variance_mask by csrc/cuda/variance_mask.cu, with the selection of kth_magnitude."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ... import digits
from ...keep import Threshold
from .. import selection
from .kth_magnitude import Source
from .runtime import _cuda


def variance_threshold(xs: list[Tensor], base: Tensor | None, share: float) -> selection.Found:
    return selection.select_share(Source(xs, base, variance=True), share)


def digit_histogram(
    xs: list[Tensor], base: Tensor | None, prefix: int, shift: int, rounded: bool
) -> np.ndarray:
    return selection.histogram(Source(xs, base, variance=True), prefix, shift)


def place_of_tie(
    xs: list[Tensor], base: Tensor | None, value: float, rank: int, rounded: bool
) -> tuple[int, int]:
    return selection.place(Source(xs, base, variance=True), value, rank)


def variance_mask(
    bits: Tensor | None, xs: list[Tensor], base: Tensor | None, threshold: Threshold
) -> list[float]:
    source = Source(xs, base, variance=True)
    shape = -(-source.numel // _cuda.VARIANCE_TILE), len(xs)
    sums = torch.empty(shape, dtype=torch.float64, device=source.device)
    _cuda.variance_mask(
        source=source.table,
        threshold=digits.value_key(threshold.value, source.acc),
        cut=threshold.cut,
        bits=0 if bits is None else bits.data_ptr(),
        squares=sums.data_ptr(),
        **source.place,
    )
    squares: list[float] = sums.sum(0).tolist()
    return squares
