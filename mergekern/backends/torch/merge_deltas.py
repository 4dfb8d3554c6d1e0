"""merge_deltas in plain torch, with the bits of the kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import bits, digits
from ...check import accumulator
from ...keep import Band, Bernoulli, Keep, Mask, Recipe, Threshold
from . import chunks


def merge_deltas(out: Tensor, base: Tensor | None, xs: list[Tensor], recipe: Recipe) -> None:
    acc, dtype = accumulator(xs[0].dtype), xs[0].dtype
    flat = chunks.flat([out, *xs] if base is None else [out, base, *xs])
    out, base, xs = (flat[0], None, flat[1:]) if base is None else (flat[0], flat[1], flat[2:])

    def step(v: Tensor) -> Tensor:
        return v.to(dtype).to(acc) if recipe.stepwise else v

    for begin, end, first in chunks.rows(xs):
        origin = None if base is None else chunks.part(base, begin, end, acc)
        us = []
        for x, k, r, w in zip(xs, recipe.keep, recipe.rescale, recipe.before, strict=True):
            d = chunks.part(x, begin, end, acc)
            d = d if origin is None else step(d - origin)
            u = torch.where(kept(k, d, first), d, d * 0 if recipe.stepwise else 0)
            if recipe.stepwise and r != 1:
                factor = chunks.scalar(r, d)
                u = step(u / factor if recipe.divide else u * factor)
            us.append(step(u * chunks.scalar(w, d)))
        s = torch.zeros_like(us[0])
        for u in us:
            s += u
        m, q, alone = _combined(us, step(s), recipe, step)
        if recipe.normalize:
            least, instead = chunks.scalar(recipe.least, m), chunks.scalar(recipe.instead, m)
            m = step(m / torch.where(q.abs() <= least, instead, q))
        if alone is not None:
            m = torch.where(q == 1, alone, m)
        if not recipe.stepwise or recipe.scale != 1:
            m = step(m * chunks.scalar(recipe.scale, m))
        chunks.store(out, begin, end, m if origin is None else origin + m)


def _combined(
    us: list[Tensor], s: Tensor, recipe: Recipe, step: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """m, q and, if asked for, what stands where one model is alone."""
    if recipe.elect == "everyone":
        return s, chunks.scalar(recipe.total, s), None
    votes = s
    if recipe.elect == "count":
        votes = torch.zeros_like(s)
        for u in us:
            votes += (u > 0).to(s.dtype) - (u < 0).to(s.dtype)
    positive = votes >= 0 if recipe.zero == "positive" else votes > 0
    negative = ~(votes > 0) if recipe.zero == "negative" else ~(votes >= 0)
    m, q, alone = torch.zeros_like(s), torch.zeros_like(s), torch.zeros_like(s)
    zero = chunks.scalar(0, s)
    for i, u in enumerate(us):
        agrees = (
            u != 0 if recipe.elect == "present" else positive & ~(u <= 0) | negative & ~(u >= 0)
        )
        v = u if recipe.after[i] == 1 else step(u * chunks.scalar(recipe.after[i], u))
        q += torch.where(agrees, chunks.scalar(recipe.weights[i], s), zero)
        if recipe.alone:
            alone += torch.where(agrees, u * chunks.scalar(recipe.alone[i], u), 0)
        if recipe.combine == "max":
            larger = chunks.magnitude_keys(v) > chunks.magnitude_keys(m)
            m = torch.where(agrees & larger, v, m)
        else:
            m += torch.where(agrees, v, 0)
    if recipe.elect == "sum":
        m = torch.where(s.isnan(), s, m)
    return step(m), step(q), alone if recipe.alone else None


def l1_norms(
    base: Tensor | None, xs: list[Tensor], keep: list[Keep], rounded: bool
) -> list[tuple[float, float]]:
    acc, dtype = accumulator(xs[0].dtype), xs[0].dtype
    flat = chunks.flat(xs if base is None else [base, *xs])
    base, xs = (None, flat) if base is None else (flat[0], flat[1:])
    norms = []
    for x, k in zip(xs, keep, strict=True):
        everything = survivors = 0.0
        for begin, end, first in chunks.rows([x]):
            d = chunks.part(x, begin, end, acc)
            d = d if base is None else d - chunks.part(base, begin, end, acc)
            d = d.to(dtype).to(acc) if rounded else d
            everything += float(d.abs().sum(dtype=torch.float64))
            survivors += float(torch.where(kept(k, d, first), d, 0).abs().sum(dtype=torch.float64))
        norms.append((everything, survivors))
    return norms


def count_kept(
    base: Tensor | None,
    xs: list[Tensor],
    keep: list[Keep],
    rounded: bool,
    first: int,
    last: int,
) -> tuple[list[int], int]:
    acc, dtype = accumulator(xs[0].dtype), xs[0].dtype
    xs, base = [x.reshape(-1) for x in xs], None if base is None else base.reshape(-1)
    counts, conflicts = [0] * len(xs), 0
    for begin in range(first, last, chunks.CHUNK):
        end = min(last, begin + chunks.CHUNK)
        origin = None if base is None else chunks.part(base, begin, end, acc)
        positive = torch.zeros(end - begin, dtype=torch.bool, device=xs[0].device)
        negative = positive.clone()
        for i, (x, k) in enumerate(zip(xs, keep, strict=True)):
            d = chunks.part(x, begin, end, acc)
            d = d if origin is None else d - origin
            d = d.to(dtype).to(acc) if rounded else d
            mask = kept(k, d, begin).expand(d.shape)
            counts[i] += int(mask.sum())
            positive |= mask & (d > 0)
            negative |= mask & (d < 0)
        conflicts += int((positive & negative).sum())
    return counts, conflicts


def kept(keep: Keep, d: Tensor, first: int) -> Tensor:
    """Which of the elements from flat index `first` on survive."""
    if isinstance(keep, Threshold):
        keys = chunks.magnitude_keys(d)
        key = digits.value_key(keep.value, d.dtype)
        ties = max(0, min(keep.cut - first, d.numel()))
        mask = keys > key
        mask[:ties] = keys[:ties] >= key
        return mask
    if isinstance(keep, Band):
        return kept(keep.least, d, first) & ~kept(keep.most, d, first)
    if isinstance(keep, Bernoulli) and keep.limit < 65536:
        return draws(keep.key, keep.first + first, d.numel(), d.device) < keep.limit
    if isinstance(keep, Mask):
        return bits.unpack(keep.bits, first, d.numel())
    return torch.ones((), dtype=torch.bool, device=d.device)


def draws(key: tuple[int, int], first: int, n: int, device: torch.device) -> Tensor:
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
