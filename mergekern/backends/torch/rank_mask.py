"""rank_mask in plain torch: stable sorts of a few rows at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...bits import pack
from ...check import accumulator
from ...keep import MagPrune
from . import chunks
from .merge_deltas import draws


def rank_mask(
    bits: Tensor, x: Tensor, base: Tensor | None, rule: MagPrune, first: int
) -> tuple[float, float]:
    acc = accumulator(x.dtype)
    units, length, inner = (
        (x.shape[0], x.shape[1], math.prod(x.shape[2:])) if x.ndim > 1 else (1, x.numel(), 1)
    )
    shape = (units, length, inner)
    x = x.reshape(shape)
    base = None if base is None else base.reshape(shape)
    limits = torch.from_numpy(rule.limits(length).astype("int64")).to(x.device)
    unit = length * inner
    if not units * unit:
        return 0.0, 0.0
    step = max(8, chunks.CHUNK // unit // 8 * 8)  # whole bytes of the mask
    everything = survivors = 0.0
    for begin in range(0, units, step):
        d = x[begin : begin + step].to(acc).contiguous()
        if base is not None:
            d = d - base[begin : begin + step].to(acc).contiguous()
        order = chunks.magnitude_keys(d).argsort(dim=1, stable=True)
        limit = torch.empty_like(order).scatter_(1, order, limits[None, :, None].expand_as(order))
        draw = draws(rule.key, first + begin * unit, d.numel(), x.device)
        mask = draw < limit.view(-1)
        packed = pack(mask)
        bits[begin * unit // 8 :][: len(packed)] = packed
        magnitudes = d.reshape(-1).abs().double()
        everything += float(magnitudes.sum())
        survivors += float(torch.where(mask, magnitudes, 0).sum())
    return everything, survivors
