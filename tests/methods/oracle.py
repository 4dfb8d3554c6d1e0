"""The task-vector methods in float64, from their formulas, and the error float32 may add."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekern.keep import Bernoulli, MagPrune

from accuracy import assert_within, half_ulp

U = 2.0**-24  # relative error of one float32 operation


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def family(n: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """A base and n models near it."""
    base = normal(*shape, seed=99)
    xs = [(base + 0.1 * normal(*shape, seed=i)).to(dtype) for i in range(n)]
    return base.to(dtype), xs


def task_vector_oracle(
    base: Tensor,
    xs: list[Tensor],
    weight: list[float],
    masks: list[Tensor],
    *,
    elect: bool,
    normalize: bool,
    rescale: bool,
    lam: float,
) -> Tensor:
    """The generalized task arithmetic of the reference page, step by step, in float64."""
    vs, deltas = [], []
    for x, mask, w in zip(xs, masks, weight, strict=True):
        delta = x.double() - base.double()
        kept = torch.where(mask, delta, torch.zeros(()).double())
        before, after = delta.abs().sum(), kept.abs().sum()
        if rescale and before >= 1e-7 and after >= 1e-7:
            kept = kept * (before / after)
        deltas.append(kept)
        vs.append(kept * w)
    v = torch.stack(vs)
    w = torch.tensor(weight, dtype=torch.float64).reshape(-1, *[1] * base.ndim)
    if elect:
        majority = torch.where(v.sum(0) >= 0, 1.0, -1.0)
        agrees = v.sign() == majority
        merged, divisor = (v * agrees).sum(0), (w * agrees).sum(0)
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    else:
        merged, divisor = v.sum(0), w.sum(0).expand(base.shape)
        divisor = torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)
    if normalize:
        merged = merged / divisor
    return base.double() + lam * merged


def magnitude_mask(base: Tensor, x: Tensor, density: float) -> Tensor:
    """The int(density * numel) largest |x - base|, at least one, the lowest index among equals."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = (x.to(acc) - base.to(acc)).abs().reshape(-1)
    k = size.numel() if density >= 1 else 0 if density == 0 else max(1, int(density * len(size)))
    mask = torch.zeros(size.shape, dtype=torch.bool)
    mask[torch.sort(size, descending=True, stable=True).indices[:k]] = True
    return mask.reshape(x.shape)


def _largest_first(base: Tensor, x: Tensor) -> Tensor:
    """Flat indices by |x - base|, NaN before infinity, the lowest index first among equals."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = (x.to(acc) - base.to(acc)).abs().reshape(-1).double()
    order = sorted(range(len(size)), key=lambda i: (not size[i].isnan(), -float(size[i]), i))
    return torch.tensor(order, dtype=torch.int64)


def band_mask(base: Tensor, x: Tensor, density: float, gamma: float) -> Tensor:
    """Breadcrumbs: the int(density n) largest after the int(gamma n) largest, or after fewer."""
    n = x.numel()
    target = int(density * n)
    outliers = min(int(gamma * n), n - target)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[_largest_first(base, x)[outliers : outliers + target]] = True
    return mask.reshape(x.shape)


def draws(rule: Bernoulli | MagPrune, n: int) -> Tensor:
    """Philox4x32-10 written from its definition: one 16-bit draw per element."""
    bits = []
    for block in range(-(-n // 8)):
        c, (k0, k1) = [block, 0, 0, 0], rule.key
        for _ in range(10):
            low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [high >> 32 ^ c[1] ^ k0, high & 0xFFFFFFFF, low >> 32 ^ c[3] ^ k1, low & 0xFFFFFFFF]
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        for word in c:
            bits += [word & 0xFFFF, word >> 16]
    return torch.tensor(bits[:n], dtype=torch.int64)


def drawn_mask(x: Tensor, density: float, seed: int, name: str, model: int) -> Tensor:
    """The mask of DARE."""
    rule = Bernoulli(density, seed, name, model)
    return (draws(rule, x.numel()) < rule.limit).reshape(x.shape)


def magprune_mask(
    base: Tensor, x: Tensor, density: float, epsilon: float, seed: int, name: str, model: int
) -> Tensor:
    """The mask of DELLA: chances from density - epsilon to density + epsilon by rank in a row."""
    rule = MagPrune(density, epsilon, seed, name, model)
    shape, drawn = x.shape, draws(rule, x.numel()).reshape(x.shape)
    if x.ndim < 2:
        drawn, x, base = drawn.reshape(1, -1), x.reshape(1, -1), base.reshape(1, -1)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = (x.to(acc) - base.to(acc)).abs().movedim(1, -1)
    length = size.shape[-1]
    place = size.argsort(dim=-1, stable=True).argsort(dim=-1).movedim(-1, 1).double()
    share = place / (length - 1) if length > 1 else torch.full(place.shape, 0.5).double()
    chance = density - epsilon + 2 * epsilon * share
    return (drawn < torch.round(chance * 65536).clamp(0, 65536)).reshape(shape)


def assert_task_vectors(
    got: Tensor,
    base: Tensor,
    xs: list[Tensor],
    weight: list[float],
    masks: list[Tensor],
    *,
    elect: bool,
    normalize: bool,
    rescale: bool,
    lam: float = 1.0,
) -> None:
    """`got` against the formula, but for votes so close to zero that float32 may turn them."""
    oracle = task_vector_oracle(
        base, xs, weight, masks, elect=elect, normalize=normalize, rescale=rescale, lam=lam
    )
    # About 6 roundings a model (delta, factor, product, weight, two sums) and 6 after them, each
    # relative to no more than the sum of |weighted deltas|, magnified by the smallest divisor.
    deltas = [x.double() - base.double() for x in xs]
    factors = [
        d.abs().sum() / max(1e-7, float((d.abs() * m).sum())) if rescale else 1.0
        for d, m in zip(deltas, masks, strict=True)
    ]
    signed = [w * f * d * m for w, f, d, m in zip(weight, factors, deltas, masks, strict=True)]
    size = torch.stack(signed).abs().sum(0)
    least = 1.0
    if normalize:  # the smallest |sum of weights| over which a vote may divide
        subsets = range(1, 1 << len(weight))
        sums = [sum(w for i, w in enumerate(weight) if s >> i & 1) for s in subsets]
        least = min(abs(s) for s in sums) if elect else abs(sum(weight))
    error = 24 * U * size * max(1.0, abs(lam)) / least
    bound = error + half_ulp(oracle.abs() + error, got.dtype) * (1 + 2.0**-7)
    if elect:
        votes = torch.stack(signed).sum(0)
        clear = (votes.abs() > 24 * U * size) | (size == 0)
        assert int((~clear).sum()) <= 0.01 * clear.numel()
        got, oracle, bound = got[clear], oracle[clear], bound[clear]
    assert_within(got, oracle, bound)


def variance_mask(base: Tensor, xs: list[Tensor], topk: float) -> Tensor:
    """The selection of SCE in float64: that in float32 where variances are exact."""
    tv = torch.stack([x.double() - base.double() for x in xs])
    variance = ((tv - tv.mean(0)) ** 2).mean(0).reshape(-1)
    k = int(int((variance != 0).sum()) * topk) if topk < 1 else len(variance)
    mask = torch.zeros(variance.shape, dtype=torch.bool)
    mask[torch.sort(variance, descending=True, stable=True).indices[:k]] = True
    return mask.reshape(base.shape)


def sce_oracle(base: Tensor, xs: list[Tensor], mask: Tensor) -> Tensor:
    tv = torch.where(mask, torch.stack([x.double() - base.double() for x in xs]), 0.0)
    squares = (tv**2).reshape(len(xs), -1).mean(1)
    total = squares.sum()
    weights = torch.full_like(squares, 1 / len(xs)) if total < 1e-6 else squares / total
    majority = torch.where(tv.sum(0) >= 0, 1.0, -1.0)
    voters = (tv.sign() == majority) * weights.reshape(-1, *[1] * base.ndim)
    return base.double() + (tv * voters).sum(0) / voters.sum(0).clamp(min=1e-6)


def ram_oracle(
    base: Tensor, xs: list[Tensor], epsilon: float, r: float | None, alpha: float
) -> tuple[Tensor, Tensor]:
    """The value, and the sum of magnitudes that its roundings are relative to."""
    acc = torch.float64 if base.dtype == torch.float64 else torch.float32
    tv = torch.stack([(x.to(acc) - base.to(acc)).double() for x in xs])
    changed = ~(tv.abs() <= epsilon)
    count = changed.sum(0)
    factors = [1.0] * len(xs)
    if r is not None:
        unique = [int((c & (count == 1)).sum()) for c in changed]
        shared = [int((c & (count > 1)).sum()) for c in changed]
        ratios = [s / max(u, epsilon or 1e-30) for s, u in zip(shared, unique, strict=True)]
        factors = [1 + r * min(max(q, 0.0), alpha) for q in ratios]
    scale = torch.tensor(factors, dtype=torch.float64).reshape(-1, *[1] * base.ndim)
    alone = (torch.where(changed, tv, 0.0) * scale).sum(0)
    mean = torch.where(changed, tv, 0.0).sum(0) / count.clamp(min=1)
    size = (tv.abs() * changed * scale).sum(0)
    return base.double() + torch.where(count == 1, alone, mean), size
