"""variance_mask in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ... import digits
from ...bits import pack
from ...check import accumulator
from ...keep import Threshold
from . import chunks
from .kth_magnitude import Found, Keys, histogram, place, select_share
from .merge_deltas import kept


def variance_threshold(xs: list[Tensor], base: Tensor | None, share: float) -> Found:
    return select_share(_keys(xs, base), accumulator(xs[0].dtype), xs[0].numel(), share)


def digit_histogram(
    xs: list[Tensor], base: Tensor | None, prefix: int, shift: int, rounded: bool
) -> np.ndarray:
    return histogram(_keys(xs, base), prefix, shift)


def place_of_tie(
    xs: list[Tensor], base: Tensor | None, value: float, rank: int, rounded: bool
) -> tuple[int, int]:
    return place(_keys(xs, base), digits.value_key(value, accumulator(xs[0].dtype)), rank)


def variance_mask(
    bits: Tensor | None, xs: list[Tensor], base: Tensor | None, threshold: Threshold
) -> list[float]:
    squares = [0.0] * len(xs)
    for ds, first in _parts(xs, base):
        mask = kept(None if bits is None else threshold, _variance(ds), first)
        if bits is not None:
            packed = pack(mask)
            bits[first // 8 :][: len(packed)] = packed
        for i, d in enumerate(ds):
            squares[i] += float(torch.where(mask, d.double().square(), 0).sum())
    return squares


def _parts(xs: list[Tensor], base: Tensor | None) -> Iterator[tuple[list[Tensor], int]]:
    """Task vectors chunk by chunk, with the flat index of the first element."""
    acc = accumulator(xs[0].dtype)
    # Rows of a strided tensor need not begin at a whole byte of the mask.
    xs = [x.reshape(-1) for x in xs]
    base = None if base is None else base.reshape(-1)
    for begin, end, first in chunks.rows(xs):
        ds = [chunks.part(x, begin, end, acc) for x in xs]
        if base is not None:
            origin = chunks.part(base, begin, end, acc)
            ds = [d - origin for d in ds]
        yield ds, first


def _keys(xs: list[Tensor], base: Tensor | None) -> Keys:
    def keys() -> Iterator[tuple[Tensor, int]]:
        for ds, first in _parts(xs, base):
            yield chunks.magnitude_keys(_variance(ds)), first

    return keys


def _variance(ds: list[Tensor]) -> Tensor:
    n = chunks.scalar(len(ds), ds[0])
    mean, variance = torch.zeros_like(ds[0]), torch.zeros_like(ds[0])
    for d in ds:
        mean += d
    mean /= n
    for d in ds:
        variance += (d - mean) * (d - mean)
    return variance / n
