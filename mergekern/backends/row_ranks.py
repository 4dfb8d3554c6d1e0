"""rank_mask on a GPU: bins of each row settle most draws.

A draw needs the rank of its element only where a limit lies between the limits of the first and
the last rank of its bin. With about one bin for every element these are a handful in a row; each
is ranked against its whole row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..keep import MagPrune
from . import tables
from .selection import Source, all_keys

# Elements at a time, or eight units if these are more: their keys and bins stay in the L2 cache.
_PIECE = 1 << 22


class Binned(NamedTuple):
    """Keys of whole rows, in 2 half bins each: the upper ones cut up the octaves below the largest
    key, the others the rest."""

    keys: Tensor  # [units, length, inner]; rows are numbered [units, inner]
    rows: Tensor  # int64 [rows, 5]: least key, where the upper bins begin, largest, both shifts
    half: int
    counts: Tensor  # int32 [rows, 2 half], zeros

    @classmethod
    def of(cls, keys: Tensor) -> Binned:
        """Together about a bin for every element."""
        width = min(15, max(1, (keys.shape[1] - 1).bit_length() - 1))  # bits of a number below half
        octaves = 8 << (52 if keys.dtype == torch.int64 else 23)
        least, most = (v.reshape(-1).long() for v in keys.aminmax(dim=1))
        floor = torch.maximum(least, most - octaves)

        def shift(span: Tensor) -> Tensor:
            return (torch.frexp(span.double()).exponent.long() - width).clamp(min=0)

        columns = [least, floor, most, shift(floor - least), shift(most - floor)]
        half = 1 << width
        counts = torch.zeros(len(least), 2 * half, dtype=torch.int32, device=keys.device)
        return cls(keys, torch.stack(columns, 1), half, counts)

    def ends(self) -> Tensor:
        """Elements in each bin and those below, once they are counted."""
        return self.counts.cumsum(1, dtype=torch.int32)


# (bits, binned, limits by rank, Philox key, number of the first element): sums of magnitudes and of
# those kept, [any, 2]
Mask = Callable[[Tensor, Binned, Tensor, tuple[int, int], int], Tensor]


def rank_mask(
    bits: Tensor,
    x: Tensor,
    base: Tensor | None,
    rule: MagPrune,
    first: int,
    source: Callable[[list[Tensor], Tensor | None], Source],
    mask: Mask,
) -> tuple[float, float]:
    units, length, inner = (
        (x.shape[0], x.shape[1], math.prod(x.shape[2:])) if x.ndim > 1 else (1, x.numel(), 1)
    )
    unit = length * inner
    if not units * unit:
        return 0.0, 0.0
    x, base = x.contiguous().view(-1), None if base is None else base.contiguous().view(-1)
    limits = tables.upload(rule.limits(length).tolist(), torch.int32, x.device)
    step = max(8, _PIECE // unit // 8 * 8) * unit  # whole bytes of the mask
    sums = []
    for begin in range(0, x.numel(), step):
        part = slice(begin, begin + step)
        keys = all_keys(source([x[part]], None if base is None else base[part]))
        binned = Binned.of(keys.view(-1, length, inner))
        sums.append(mask(bits[begin // 8 :], binned, limits, rule.key, first + begin))
    everything, kept = torch.cat(sums).sum(0).tolist()
    return everything, kept
