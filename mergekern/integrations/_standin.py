"""`merge_deltas` with the options of the hosts' elections, for those the op does not have yet.

Its arguments are those of the op; calls that the op serves go there. The rest is the same
arithmetic in torch, piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..check import accumulator
from ..keep import Keep, Threshold
from ..ops import merge_deltas as op
from ._pieces import pieces


def merge_deltas(
    base: Tensor | None,
    xs: Sequence[Tensor],
    weights: Sequence[float],
    *,
    keep: Sequence[Keep] | None = None,
    elect: str | None = None,
    zero: str = "positive",
    weigh: str = "before",
    combine: str = "sum",
    normalize: bool | str = False,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """out = base + scale * combine_i(w_i keep_i(x_i - base)), as `ops.merge_deltas`.

    zero: the sign of a tied vote; "none" leaves such elements at 0. weigh="after": votes are
    unweighted. combine="max": the first of the largest magnitudes. normalize="count": divide by
    the number of those that take part.
    """
    ones = all(w == 1 for w in weights)
    counts = normalize == "count"
    if combine == "sum" and zero == "positive" and (ones or not (counts or weigh == "after")):
        return op.merge_deltas(
            base,
            xs,
            weights,
            keep=keep,
            elect=elect,
            normalize=bool(normalize),
            scale=scale,
            out_dtype=out_dtype,
            out=out,
        )
    acc = accumulator(xs[0].dtype)
    if out is None:
        out = torch.empty(xs[0].shape, dtype=out_dtype or xs[0].dtype, device=xs[0].device)
    for p in pieces([out, *xs] if base is None else [out, base, *xs]):
        origin = None if base is None else p.of(base)
        us = [
            op.merge_deltas(None, [d], [1.0], keep=[_from(k, p.first)])
            for d, k in zip(
                [p.of(x).to(acc) if origin is None else p.of(x).to(acc) - origin for x in xs],
                keep or [None] * len(xs),
                strict=True,
            )
        ]
        ws = torch.tensor(weights, dtype=acc, device=out.device)
        before = [u * w for u, w in zip(us, ws)] if weigh == "before" else us
        votes = torch.zeros_like(us[0])
        for u in before:
            votes += u.sign() if elect == "count" else u
        m, q = torch.zeros_like(votes), torch.zeros_like(votes)
        for u, w in zip(us, ws):
            agrees = (
                u != 0 if elect is None else _agrees(u * w if weigh == "before" else u, votes, zero)
            )
            v = torch.where(agrees, u * w, 0)
            q += torch.where(agrees, 1 if counts else w, 0)
            m = m + v if combine == "sum" else torch.where(v.abs() > m.abs(), v, m)
        if normalize:
            m /= torch.where(q == 0, 1, q)
        m *= torch.tensor(scale, dtype=acc)
        p.of(out).copy_(m if origin is None else origin + m)
    return out


def _agrees(u: Tensor, votes: Tensor, zero: str) -> Tensor:
    positive = votes >= 0 if zero == "positive" else votes > 0
    negative = ~(votes > 0) if zero == "negative" else ~(votes >= 0)
    return positive & ~(u <= 0) | negative & ~(u >= 0)


def _from(keep: Keep, first: int) -> Keep:
    """The same threshold for a part that begins at that index."""
    return keep._replace(cut=max(0, keep.cut - first)) if isinstance(keep, Threshold) else keep
