"""The oracle: every op as its formula reads, slow, in float64. All in one file, however long: a
function an op, with nothing between them but a few helpers.

`acc` is the type all arithmetic is done in. float64 (the default) gives the result to compare
errors with; the accumulator that an op promises for its inputs gives, step by step, the arithmetic
of the kernels, and so the bits to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import check
from .keep import NOTHING, Band, Bernoulli, Keep, MagPrune, Mask, Recipe, Threshold

Selected = tuple[float, int, int, int]  # a Threshold's fields


def _round(values: Tensor, out: Tensor) -> None:
    """One rounding into `out`, from the exact value of each element."""
    if values.dtype == torch.float64 and out.element_size() == 2:
        flat = [_round_16(v, out.dtype) for v in values.reshape(-1).tolist()]
        values = torch.tensor(flat, dtype=torch.float64).reshape(values.shape)
    out.copy_(values)


def _round_16(v: float, dtype: torch.dtype) -> float:
    """Round half to even on the grid of `dtype`, which a float64 holds exactly."""
    if v == 0 or not math.isfinite(v):
        return v
    digits, least = (11, -24) if dtype == torch.float16 else (8, -133)
    step = 2.0 ** max(math.frexp(v)[1] - digits, least)
    rounded = math.copysign(round(v / step) * step, v)  # Python rounds half to even
    return math.copysign(math.inf, v) if abs(rounded) > torch.finfo(dtype).max else rounded


def weighted_sum(
    out: Tensor,
    xs: list[Tensor],
    weights: list[float],
    divisor: float,
    acc: torch.dtype = torch.float64,
) -> None:
    total = xs[0].to(acc) * weights[0]
    for x, w in zip(xs[1:], weights[1:], strict=True):
        total = total + x.to(acc) * w
    _round(total / torch.tensor(divisor, dtype=acc), out)


def weighted_rows(
    out: Tensor,
    xs: list[Tensor],
    weights: Tensor,
    inner: int,
    acc: torch.dtype = torch.float64,
) -> None:
    row = torch.arange(out.numel()).reshape(out.shape) // inner % weights.shape[1]
    total = xs[0].to(acc) * weights[0].to(acc)[row]
    for x, w in zip(xs[1:], weights[1:], strict=True):
        total = total + x.to(acc) * w.to(acc)[row]
    _round(total, out)


def kth_magnitude(
    xs: list[Tensor], base: Tensor | None, ranks: list[list[int]], rounded: bool = False
) -> list[list[Selected]]:
    return [
        [_select(_subtract(x, base, rounded), k) for k in ks]
        for x, ks in zip(xs, ranks, strict=True)
    ]


def _select(d: Tensor, k: int) -> Selected:
    flat = [_rank(v) for v in d.double().reshape(-1).tolist()]
    value, nan = kth = sorted(flat, reverse=True)[k - 1]
    above = sum(f > kth for f in flat)
    ties = [i for i, f in enumerate(flat) if f == kth]
    return math.nan if nan else value, above, len(ties), ties[k - above - 1] + 1


def _rank(v: float) -> tuple[float, bool]:
    """Magnitudes in order, NaN above infinity."""
    return (math.inf, True) if v != v else (abs(v), False)


def _subtract(x: Tensor, base: Tensor | None, rounded: bool = False) -> Tensor:
    """The difference in the accumulator type: thresholds are taken of what the kernel sees."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    d = x.to(acc) if base is None else x.to(acc) - base.to(acc)
    return d.to(x.dtype).to(acc) if rounded else d


def kept(keep: Keep, x: Tensor, base: Tensor | None, rounded: bool = False) -> list[bool]:
    """Which elements of x - base survive, in flat order."""
    d = _subtract(x, base, rounded).double().reshape(-1).tolist()
    if isinstance(keep, Threshold):
        t = _rank(keep.value)
        return [_rank(v) > t or (_rank(v) == t and i < keep.cut) for i, v in enumerate(d)]
    if isinstance(keep, Band):
        least, most = (kept(t, x, base, rounded) for t in keep)
        return [low and not high for low, high in zip(least, most, strict=True)]
    if isinstance(keep, Bernoulli):
        return [_draw(keep.key, keep.first + i) < keep.limit for i in range(len(d))]
    if isinstance(keep, Mask):
        bits = np.unpackbits(keep.bits.cpu().numpy(), count=len(d))
        return [bool(b) for b in bits]
    return [True] * len(d)


def _draw(key: tuple[int, int], element: int) -> int:
    """The 16 random bits of one element."""
    words = philox((element // 8 & 0xFFFFFFFF, element // 8 >> 32, 0, 0), key)
    return words[element % 8 // 2] >> 16 * (element % 2) & 0xFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 as the paper states it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def merge_deltas(
    out: Tensor,
    base: Tensor | None,
    xs: list[Tensor],
    recipe: Recipe,
    acc: torch.dtype = torch.float64,
) -> None:
    def step(v: Tensor) -> Tensor:
        return v.to(xs[0].dtype).to(acc) if recipe.stepwise else v

    nothing = torch.zeros(out.shape, dtype=acc)
    origin = None if base is None else base.to(acc)
    us = []
    for x, k, r, w in zip(xs, recipe.keep, recipe.rescale, recipe.before, strict=True):
        d = step(x.to(acc) if origin is None else x.to(acc) - origin)
        mask = torch.tensor(kept(k, x, base, recipe.stepwise), dtype=torch.bool).reshape(x.shape)
        u = torch.where(mask, d, d * 0 if recipe.stepwise else nothing)
        if recipe.stepwise and r != 1:
            u = step(u / torch.tensor(r, dtype=acc) if recipe.divide else u * r)
        us.append(step(u * w))
    s = nothing
    for u in us:
        s = s + u
    s = step(s)
    if recipe.elect == "everyone":
        m, q, alone = s, torch.full_like(s, recipe.total), None
    else:
        m, q, alone = _elected(us, s, recipe, step)
    if recipe.normalize:
        m = step(m / torch.where(q.abs() <= recipe.least, torch.full_like(q, recipe.instead), q))
    if alone is not None:
        m = torch.where(q == 1, alone, m)
    if not recipe.stepwise or recipe.scale != 1:
        m = step(m * recipe.scale)
    _round(m if origin is None else origin + m, out)


def _elected(
    us: list[Tensor], s: Tensor, recipe: Recipe, step: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """m, q and, if asked for, what stands where one model is alone."""
    nothing = torch.zeros_like(s)
    votes = s
    if recipe.elect == "count":
        votes = torch.stack([(u > 0).to(s.dtype) - (u < 0).to(s.dtype) for u in us]).sum(0)
    tied = votes == 0
    positive = (votes > 0) | (tied & (recipe.zero == "positive"))
    negative = (votes < 0) | (tied & (recipe.zero == "negative")) | votes.isnan()
    m, q, alone = nothing, nothing, nothing
    for i, u in enumerate(us):
        agrees = (positive & ~(u <= 0)) | (negative & ~(u >= 0))
        if recipe.elect == "present":
            agrees = u != 0
        v = u if recipe.after[i] == 1 else step(u * recipe.after[i])
        q = q + agrees.to(s.dtype) * torch.tensor(recipe.weights[i], dtype=s.dtype)
        if recipe.alone:
            alone = alone + torch.where(agrees, u * recipe.alone[i], nothing)
        if recipe.combine == "max":
            larger = (v.abs() > m.abs()) | (v.isnan() & ~m.isnan())
            m = torch.where(agrees & larger, v, m)
        else:
            m = m + torch.where(agrees, v, nothing)
    if recipe.elect == "sum":
        m = torch.where(s.isnan(), s, m)
    return step(m), step(q), alone if recipe.alone else None


def _sum(values: list[float]) -> float:
    """Exact but for one rounding; infinite where it leaves float64."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def l1_norms(
    base: Tensor | None, xs: list[Tensor], keep: list[Keep], rounded: bool
) -> list[tuple[float, float]]:
    norms = []
    for x, k in zip(xs, keep, strict=True):
        d = _subtract(x, base, rounded).double().reshape(-1).abs().tolist()
        survivors = [v for v, m in zip(d, kept(k, x, base, rounded), strict=True) if m]
        norms.append((_sum(d), _sum(survivors)))
    return norms


def count_kept(
    base: Tensor | None,
    xs: list[Tensor],
    keep: list[Keep],
    rounded: bool,
    first: int,
    last: int,
) -> tuple[list[int], int]:
    masks = [kept(k, x, base, rounded)[first:last] for k, x in zip(keep, xs, strict=True)]
    deltas = [_subtract(x, base, rounded).reshape(-1)[first:last].tolist() for x in xs]
    conflicts = 0
    for values, survives in zip(zip(*deltas), zip(*masks), strict=True):
        survivors = [v for v, mask in zip(values, survives, strict=True) if mask]
        conflicts += any(v > 0 for v in survivors) and any(v < 0 for v in survivors)
    return [sum(mask) for mask in masks], conflicts


def _pack(mask: list[bool], bits: Tensor) -> None:
    bits.copy_(torch.from_numpy(np.packbits(np.array(mask, dtype=bool))))


def rank_mask(
    bits: Tensor, x: Tensor, base: Tensor | None, rule: MagPrune, first: int
) -> tuple[float, float]:
    rows = x.movedim(1, -1) if x.ndim > 1 else x.reshape(1, -1)
    magnitudes = _subtract(x, base).double()
    ranked = magnitudes.movedim(1, -1) if x.ndim > 1 else magnitudes.reshape(1, -1)
    limits = torch.empty(rows.shape, dtype=torch.int64)
    by_rank = rule.limits(rows.shape[-1]).tolist()
    flat = limits.reshape(-1, rows.shape[-1])
    for row, target in zip(ranked.reshape(flat.shape).tolist(), flat, strict=True):
        order = sorted(range(len(row)), key=lambda i: (_rank(row[i]), i))
        for rank, i in enumerate(order):
            target[i] = by_rank[rank]
    limits = limits.movedim(-1, 1) if x.ndim > 1 else limits
    d = magnitudes.reshape(-1).abs().tolist()
    mask = [_draw(rule.key, first + i) < m for i, m in enumerate(limits.reshape(-1).tolist())]
    _pack(mask, bits)
    return _sum(d), _sum([v for v, m in zip(d, mask, strict=True) if m])


def _variance(ds: list[Tensor]) -> Tensor:
    n = torch.tensor(len(ds), dtype=ds[0].dtype)
    mean = torch.zeros_like(ds[0])
    for d in ds:
        mean = mean + d
    mean = mean / n
    variance = torch.zeros_like(mean)
    for d in ds:
        variance = variance + (d - mean) * (d - mean)
    return variance / n


def variance_threshold(
    xs: list[Tensor], base: Tensor | None, share: float
) -> tuple[float, int, int, int]:
    variance = _variance([_subtract(x, base) for x in xs])
    k = int(int((variance != 0).sum()) * share)
    return _select(variance, k) if k else NOTHING


def variance_mask(
    bits: Tensor | None, xs: list[Tensor], base: Tensor | None, threshold: Threshold
) -> list[float]:
    ds = [_subtract(x, base) for x in xs]
    mask = [True] * xs[0].numel()
    if bits is not None:
        mask = kept(threshold, _variance(ds), None)
        _pack(mask, bits)
    return [
        _sum([v * v for v, m in zip(d.double().reshape(-1).tolist(), mask, strict=True) if m])
        for d in ds
    ]


def gram(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    rows = torch.stack([x.double().reshape(-1) for x in xs])
    if base is not None:
        rows = rows - base.double().reshape(-1)
    out.copy_(rows @ rows.T)


def gram_rows(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    for r in range(len(out)):
        gram(out[r], [x[r] for x in xs], None if base is None else base[r])


def coefficient_gradients(out: Tensor, grad: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    origin = 0.0 if base is None else base.double()
    for t, x in enumerate(xs):
        out[t] = (grad.double() * (x.double() - origin)).sum()


def covariance(
    products: Tensor,
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    xs: list[list[Tensor]],
    rows: Tensor | None,
    zero: bool,
) -> bool:
    centred, deltas = [], []
    flat = [torch.cat([x.double().reshape(-1, x.shape[-1]) for x in side], -1) for side in xs]
    flat = [x if rows is None else x[rows] for x in flat]
    if not zero and not all(bool(x.isfinite().all()) for x in flat):
        return False
    n = len(flat[0])
    for x, mean in zip(flat, means, strict=True):
        wide = torch.where(x.isfinite(), x, 0)
        middle = wide[0] + (wide - wide[0]).mean(0)
        centred.append(wide - middle)
        deltas.append(middle - mean)
        mean += deltas[-1] * n / (count + n)
    weight = count * n / (count + n)
    products += centred[0].T @ centred[-1] + weight * torch.outer(deltas[0], deltas[-1])
    for total, v, delta in zip(squares, centred, deltas):
        total += v.square().sum(0) + weight * delta.square()
    return True


def zip_match(
    out: list[Tensor],
    correlations: list[Tensor],
    offsets: list[list[int]],
    widths: list[int],
    budgets: list[list[int]],
    alpha: float,
    zipit: bool,
) -> None:
    """In the type of similarities, whose ties decide."""
    problems = zip(out, correlations, offsets, widths, budgets, strict=True)
    for labels, x, ends, width, allowed in problems:
        s = x.to("cpu", check.accumulator(x.dtype)).numpy()
        labels.fill_(-1)
        for number, group in enumerate(_zip(s, ends, width, allowed, alpha, zipit)):
            labels[group] = number


def _zip(
    free: np.ndarray, offsets: list[int], width: int, budgets: list[int], alpha: float, zipit: bool
) -> list[list[int]]:
    """Groups of slots, on matrices that shrink; `free` is what s were if nothing was forbidden."""
    groups = [[i] for i in range(len(free))]
    model = np.repeat(np.arange(len(budgets)), np.diff(offsets))
    left, factor, exclusive = list(budgets), free.dtype.type(alpha or 1), alpha == 0
    s = np.where(np.eye(len(free)), -math.inf, free).astype(free.dtype)
    free = s.copy()

    def forbid(m: int) -> None:
        s[np.ix_(model == m, model == m)] = -math.inf

    def block(m: int) -> np.ndarray:
        where = np.arange(len(model))
        return (where >= offsets[m]) & (where < offsets[m + 1]) if zipit else model == m

    for m in range(len(left)):
        if left[m] == 0:
            forbid(m)
    while len(groups) > width:
        r, c = sorted(divmod(int(s.argmax()), len(s)))
        if s[r, c] == -math.inf and s[c, r] == -math.inf:
            if zipit:
                groups.pop(0)
                s, model = s[1:, 1:], model[1:]
            else:
                s, exclusive, left = free.copy(), False, [len(s)] * len(left)
            continue
        origins = model[r], model[c]
        groups[r] += groups.pop(c)
        free[:, r] = np.minimum(free[:, r], free[:, c]) * factor
        free[r] = np.minimum(free[r], free[c]) * factor
        free = np.delete(np.delete(free, c, 0), c, 1)
        s[:, r] = np.minimum(s[:, r], s[:, c]) * factor
        if exclusive:
            s[block(origins[0]) | block(origins[1]), r] = -math.inf
        s, model = np.delete(s, c, 1), np.delete(model, c)
        s[r] = np.minimum(s[r], s[c]) * factor
        if exclusive:
            s[r, block(origins[0]) | block(origins[1])] = -math.inf
        s = np.delete(s, c, 0)
        if origins[0] == origins[1]:
            left[origins[0]] -= 1
            if left[origins[0]] == 0:
                forbid(origins[0])
    return groups


def permute(outs: list[Tensor], xs: list[Tensor], indices: list[dict[int, Tensor]]) -> None:
    for out, x, index in zip(outs, xs, indices, strict=True):
        for axis, i in index.items():
            x = x.index_select(axis, i)
        out.copy_(x)


def zip_weights(
    outs: list[Tensor],
    xs: list[list[Tensor]],
    rows: list[list[Tensor] | None],
    cols: list[list[Tensor] | None],
    factors: list[list[float]],
    divisors: list[Tensor],
    by_row: list[bool],
    acc: torch.dtype = torch.float64,
) -> None:
    for z, out in enumerate(outs):
        total = torch.full(out.shape, -0.0, dtype=acc)
        for i, x in enumerate(xs[z]):
            given = rows[z], cols[z]
            groups, columns = (
                range(x.shape[axis]) if labels is None else labels[i].tolist()
                for axis, labels in enumerate(given)
            )
            part = torch.full((len(out), *x.shape[1:]), -0.0, dtype=acc)
            for r, g in enumerate(groups):
                part[g] = part[g] + x[r].to(acc) * torch.tensor(factors[z][i], dtype=acc)
            for c, h in enumerate(columns):
                total[:, h] = total[:, h] + part[:, c]
        d = divisors[z].to(acc)
        _round(total / (d[:, None, None] if by_row[z] else d[:, None]), out)
