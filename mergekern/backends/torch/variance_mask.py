"""variance_mask in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...bits import pack
from ...check import accumulator
from ...keep import Threshold
from . import chunks
from .kth_magnitude import select_share
from .merge_deltas import kept


def variance_mask(
    bits: Tensor | None, xs: list[Tensor], base: Tensor | None, share: float
) -> list[float]:
    acc = accumulator(xs[0].dtype)
    # Rows of a strided tensor need not begin at a whole byte of the mask.
    xs = [x.reshape(-1) for x in xs]
    base = None if base is None else base.reshape(-1)
    total = xs[0].numel()

    def parts() -> Iterator[tuple[list[Tensor], int]]:
        for begin, end, first in chunks.rows(xs):
            ds = [chunks.part(x, begin, end, acc) for x in xs]
            if base is not None:
                origin = chunks.part(base, begin, end, acc)
                ds = [d - origin for d in ds]
            yield ds, first

    def keys() -> Iterator[tuple[Tensor, int]]:
        for ds, first in parts():
            yield chunks.magnitude_keys(_variance(ds)), first

    threshold = None if bits is None else Threshold(*select_share(keys, acc, total, share))
    squares = [0.0] * len(xs)
    for ds, first in parts():
        mask = kept(threshold, _variance(ds), first)
        if bits is not None:
            packed = pack(mask)
            bits[first // 8 :][: len(packed)] = packed
        for i, d in enumerate(ds):
            squares[i] += float(torch.where(mask, d.double().square(), 0).sum())
    return squares


def _variance(ds: list[Tensor]) -> Tensor:
    n = chunks.scalar(len(ds), ds[0])
    mean, variance = torch.zeros_like(ds[0]), torch.zeros_like(ds[0])
    for d in ds:
        mean += d
    mean /= n
    for d in ds:
        variance += (d - mean) * (d - mean)
    return variance / n
