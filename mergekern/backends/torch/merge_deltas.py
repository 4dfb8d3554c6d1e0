"""merge_deltas in plain torch, with the bits of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...check import accumulator
from ...keep import Bernoulli, Keep, Threshold
from .. import digits
from . import chunks


def merge_deltas(
    out: Tensor,
    base: Tensor | None,
    xs: list[Tensor],
    weights: list[float],
    factors: list[float],
    keep: list[Keep],
    elect: str | None,
    normalize: bool,
    total: float,
    scale: float,
) -> None:
    acc = accumulator(xs[0].dtype)
    flat = chunks.flat([out, *xs] if base is None else [out, base, *xs])
    out, base, xs = (flat[0], None, flat[1:]) if base is None else (flat[0], flat[1], flat[2:])
    for begin, end, first in chunks.rows(xs):
        origin = None if base is None else chunks.part(base, begin, end, acc)
        vs = []
        for x, factor, k in zip(xs, factors, keep, strict=True):
            d = chunks.part(x, begin, end, acc)
            d = d if origin is None else d - origin
            vs.append(torch.where(_kept(k, d, first), d, 0) * chunks.scalar(factor, d))
        m = torch.zeros_like(vs[0])
        for v in vs:
            m += v
        if elect:
            m, q = _elected(vs, m, weights, elect)
        else:
            q = chunks.scalar(total, m)
        if normalize:
            m /= torch.where(q == 0, 1, q)
        m *= chunks.scalar(scale, m)
        chunks.store(out, begin, end, m if origin is None else origin + m)


def _elected(
    vs: list[Tensor], s: Tensor, weights: list[float], elect: str
) -> tuple[Tensor, Tensor]:
    """The sum of values that agree with the elected sign, and the sum of their weights."""
    votes = s
    if elect == "count":
        votes = torch.zeros_like(s)
        for v in vs:
            votes += (v > 0).to(s.dtype) - (v < 0).to(s.dtype)
    m, q = torch.zeros_like(s), torch.zeros_like(s)
    for v, w in zip(vs, weights, strict=True):
        agrees = torch.where(votes >= 0, ~(v <= 0), ~(v >= 0))
        m += torch.where(agrees, v, 0)
        q += torch.where(agrees, chunks.scalar(w, s), chunks.scalar(0, s))
    if elect == "sum":
        m = torch.where(s.isnan(), s, m)
    return m, q


def l1_norms(base: Tensor | None, xs: list[Tensor], keep: list[Keep]) -> list[tuple[float, float]]:
    acc = accumulator(xs[0].dtype)
    flat = chunks.flat(xs if base is None else [base, *xs])
    base, xs = (None, flat) if base is None else (flat[0], flat[1:])
    norms = []
    for x, k in zip(xs, keep, strict=True):
        everything = kept = 0.0
        for begin, end, first in chunks.rows([x]):
            d = chunks.part(x, begin, end, acc)
            d = d if base is None else d - chunks.part(base, begin, end, acc)
            everything += float(d.abs().sum(dtype=torch.float64))
            kept += float(torch.where(_kept(k, d, first), d, 0).abs().sum(dtype=torch.float64))
        norms.append((everything, kept))
    return norms


def _kept(keep: Keep, d: Tensor, first: int) -> Tensor:
    """Which of the elements from flat index `first` on survive."""
    if isinstance(keep, Threshold):
        keys = chunks.magnitude_keys(d)
        key = digits.value_key(keep.value, d.dtype)
        ties = max(0, min(keep.cut - first, d.numel()))
        mask = keys > key
        mask[:ties] = keys[:ties] >= key
        return mask
    if isinstance(keep, Bernoulli) and keep.limit < 65536:
        return _draws(keep.key, first, d.numel(), d.device) < keep.limit
    return torch.ones((), dtype=torch.bool, device=d.device)


def _draws(key: tuple[int, int], first: int, n: int, device: torch.device) -> Tensor:
    """Philox4x32-10: the 16-bit draws of elements [first, first + n), as int64."""
    low, high = 0xFFFFFFFF, 32
    q = torch.arange(first // 8, (first + n - 1) // 8 + 1, dtype=torch.int64, device=device)
    c0, c1, c2, c3 = q & low, q >> high, torch.zeros_like(q), torch.zeros_like(q)
    k0, k1 = key
    for _ in range(10):
        # Products wrap at 64 bits; both halves are right after masking.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> high & low) ^ c1 ^ k0,
            p1 & low,
            (p0 >> high & low) ^ c3 ^ k1,
            p0 & low,
        )
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    words = torch.stack([c0, c1, c2, c3], 1)
    halves = torch.stack([words & 0xFFFF, words >> 16], 2).view(-1)
    return halves[first % 8 :][:n]
