"""The oracle: every op as its formula reads, slow, in float64.

`acc` is the type all arithmetic is done in. float64 (the default) gives the result to compare
errors with; the accumulator that an op promises for its inputs gives, step by step, the arithmetic
of the kernels, and so the bits to compare with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .keep import Bernoulli, Keep, Threshold


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


def kth_magnitude(x: Tensor, base: Tensor | None, k: int) -> tuple[float, int, int, int]:
    d = x if base is None else _subtract(x, base)
    flat = [(math.inf, 1) if v != v else (abs(v), 0) for v in d.double().reshape(-1).tolist()]
    value, nan = sorted(flat, reverse=True)[k - 1]
    above = sum(f > (value, nan) for f in flat)
    ties = [i for i, f in enumerate(flat) if f == (value, nan)]
    return math.nan if nan else value, above, len(ties), ties[k - above - 1] + 1


def _subtract(x: Tensor, base: Tensor) -> Tensor:
    """The difference in the accumulator type: thresholds are taken of what the kernel sees."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(acc) - base.to(acc)


def kept(keep: Keep, x: Tensor, base: Tensor | None) -> list[bool]:
    """Which elements of x - base survive, in flat order."""
    d = (x if base is None else _subtract(x, base)).double().reshape(-1).tolist()
    if isinstance(keep, Threshold):

        def rank(v: float) -> tuple[float, bool]:
            return (math.inf, True) if v != v else (abs(v), False)

        t = rank(keep.value)
        return [rank(v) > t or (rank(v) == t and i < keep.cut) for i, v in enumerate(d)]
    if isinstance(keep, Bernoulli):
        return [_draw(keep.key, i) < keep.limit for i in range(len(d))]
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
    weights: list[float],
    factors: list[float],
    keep: list[Keep],
    elect: str | None,
    normalize: bool,
    total: float,
    scale: float,
    acc: torch.dtype = torch.float64,
) -> None:
    origin = None if base is None else base.to(acc)
    vs = []
    for x, factor, k in zip(xs, factors, keep, strict=True):
        d = x.to(acc) if origin is None else x.to(acc) - origin
        mask = torch.tensor(kept(k, x, base), dtype=torch.bool).reshape(x.shape)
        vs.append(torch.where(mask, d, torch.zeros((), dtype=acc)) * factor)
    s = torch.zeros(out.shape, dtype=acc)
    for v in vs:
        s = s + v
    m, q = s, torch.full_like(s, total)
    if elect:
        votes = s
        if elect == "count":
            votes = torch.stack([(v > 0).to(acc) - (v < 0).to(acc) for v in vs]).sum(0)
        m, q = torch.zeros_like(s), torch.zeros_like(s)
        for v, w in zip(vs, weights, strict=True):
            agrees = torch.where(votes >= 0, ~(v <= 0), ~(v >= 0))
            m = m + torch.where(agrees, v, torch.zeros_like(v))
            q = q + agrees.to(acc) * torch.tensor(w, dtype=acc)
        if elect == "sum":
            m = torch.where(s.isnan(), s, m)
        q = torch.where(q == 0, torch.ones_like(q), q)
    if normalize:
        m = m / q
    m = m * scale
    _round(m if origin is None else origin + m, out)


def _sum(values: list[float]) -> float:
    """Exact but for one rounding; infinite where it leaves float64."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def l1_norms(base: Tensor | None, xs: list[Tensor], keep: list[Keep]) -> list[tuple[float, float]]:
    norms = []
    for x, k in zip(xs, keep, strict=True):
        d = (x if base is None else _subtract(x, base)).double().reshape(-1).abs().tolist()
        survivors = [v for v, m in zip(d, kept(k, x, base), strict=True) if m]
        norms.append((_sum(d), _sum(survivors)))
    return norms


def gram(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    rows = torch.stack([x.double().reshape(-1) for x in xs])
    if base is not None:
        rows = rows - base.double().reshape(-1)
    out.copy_(rows @ rows.T)


def permute(out: Tensor, x: Tensor, index: dict[int, Tensor]) -> None:
    for axis, i in index.items():
        x = x.index_select(axis, i)
    out.copy_(x)
