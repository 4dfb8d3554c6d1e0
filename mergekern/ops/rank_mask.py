"""rank_mask: the random mask of DELLA, whose chances follow the ranks within each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ..keep import MagPrune, Mask
from ._cost import Cost


class RankMask(NamedTuple):
    """A mask, and the L1 norms of the task vector before and after it."""

    mask: Mask
    everything: float
    kept: float


def rank_mask(
    x: Tensor,
    rule: MagPrune,
    *,
    base: Tensor | None = None,
    first: int = 0,
    backend: str = "auto",
) -> RankMask:
    """keep_e = draw_e < limit(rank of |x - base|_e within its row), by `MagPrune`.

    Shapes: any, any strides; `base` as x. A row runs along axis 1; a tensor with fewer axes is
    one row, and a row of one element is kept with probability density. first: the index of x's
    first element in the tensor that draws are numbered in (x may be a part of it).
    Result: exact ranks, the same bits on every backend, thread count and split; norms in float64.

    Cost: one read, one bit written per element; each row is ordered by bins of its leading bits.
    Scratch: some 20 bytes per element of eight rows.
    Raises: ArgumentError unless 0 <= density - epsilon and density + epsilon <= 1.
    Source: MAGPRUNE (Deep et al., 2406.11617); mergekit `sparsify.della_magprune`, which fails on
    rows of one element and on scalars.

    >>> import torch
    >>> rank_mask(torch.tensor([[3.0, 1.0]]), MagPrune(0.5, 0.5)).mask.bits  # the larger one stays
    tensor([128], dtype=torch.uint8)
    """
    op = "rank_mask"
    x = check.tensor(op, x, "x")
    if base is not None:
        base = check.tensor(op, base, "base")
        check.same(op, "base", base, "x", x)
    low, high = rule.density - rule.epsilon, rule.density + rule.epsilon
    if not (rule.epsilon >= 0 and low >= 0 and high <= 1):
        got = f"{low:g} to {high:g}"
        raise ArgumentError.of(op, "density -+ epsilon is out of range", got, "within 0 to 1")
    chosen = dispatch.select(backend, op, x.device, x.dtype)
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
    everything, kept = dispatch.load(chosen, op)(bits, x, base, rule, first)
    return RankMask(Mask(bits), everything, kept)


def cost(numel: int, itemsize: int, *, base: bool = False) -> Cost:
    """One read, one bit per element written."""
    return Cost(numel * itemsize * (2 if base else 1) + numel // 8, numel)
