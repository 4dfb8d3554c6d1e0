"""rank_mask by csrc/rank_mask.cpp, over whole units of rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...keep import MagPrune
from . import runtime

_cpu = runtime._cpu


def rank_mask(
    bits: Tensor, x: Tensor, base: Tensor | None, rule: MagPrune, first: int
) -> tuple[float, float]:
    units, length, inner = (
        (x.shape[0], x.shape[1], math.prod(x.shape[2:])) if x.ndim > 1 else (1, x.numel(), 1)
    )
    limits = rule.limits(length)
    k0, k1 = rule.key
    args = _cpu.RankMask(
        source=_cpu.KeySource(xs=[runtime.view(x)], base=runtime.optional_view(base)),
        units=units,
        length=length,
        inner=inner,
        limits=limits.ctypes.data,
        k0=k0,
        k1=k1,
        first=first,
        bits=bits.data_ptr(),
    )
    whole = _cpu.MASK_UNITS
    chunk = max(whole, runtime.CHUNK // max(1, length * inner) // whole * whole)
    sums = torch.zeros(-(-units // chunk), 2, dtype=torch.float64)

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty(args.scratch_bytes + 64, dtype=torch.uint8)
        _cpu.rank_mask(
            args=args,
            scratch=-(-scratch.data_ptr() // 64) * 64,
            sums=sums[begin // chunk].data_ptr(),
            begin=begin,
            end=end,
        )

    runtime.chunks(kernel, units, chunk)
    everything, kept = sums.sum(0).tolist()
    return everything, kept
