"""rank_mask by csrc/cuda/rank_mask.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ...keep import MagPrune
from .. import row_ranks
from .kth_magnitude import Source
from .runtime import _cuda, place


def rank_mask(
    bits: Tensor, x: Tensor, base: Tensor | None, rule: MagPrune, first: int
) -> tuple[float, float]:
    return row_ranks.rank_mask(bits, x, base, rule, first, Source, _mask)


def _mask(
    bits: Tensor, binned: row_ranks.Binned, limits: Tensor, key: tuple[int, int], first: int
) -> Tensor:
    """The mask of whole units, and the sums of each block."""
    keys = binned.keys
    _, length, inner = keys.shape
    bins = _cuda.RowBins(
        keys=keys.data_ptr(),
        wide=keys.dtype == torch.int64,
        numel=keys.numel(),
        length=length,
        inner=inner,
        rows=binned.rows.data_ptr(),
        half=binned.half,
    )
    where = place(keys.device)
    _cuda.count_bins(bins=bins, counts=binned.counts.data_ptr(), **where)
    ends = binned.ends()
    tiles = -(-keys.numel() // _cuda.RANK_TILE)
    sums = torch.empty(tiles, 2, dtype=torch.float64, device=keys.device)
    _cuda.rank_mask(
        bins=bins,
        ends=ends.data_ptr(),
        limits=limits.data_ptr(),
        k0=key[0],
        k1=key[1],
        first=first,
        bits=bits.data_ptr(),
        sums=sums.data_ptr(),
        **where,
    )
    return sums
