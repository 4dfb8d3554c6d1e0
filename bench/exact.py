"""Merges in float64, from their formulas, to compare results with.

Beside each value stands the sum of magnitudes that its rounding errors are a share of. What is
kept is selected among float32 differences, as the ops promise; all else is float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inputs import half_unit, relative_error

UNIT = 2.0**-24  # of a rounding in float32


class Exact(NamedTuple):
    value: Tensor
    terms: Tensor
    clear: Tensor | None = None  # elements whose election rounding cannot turn; None: all

    def error(self, got: Tensor, n: int) -> float:
        """Error over its bound: n + 7 roundings, twice for the float64 side and the store."""
        bound = 2 * (n + 7) * UNIT * self.terms + half_unit(self.value, got.dtype)
        clear = slice(None) if self.clear is None else self.clear
        return relative_error(got.reshape(-1)[clear], self.value[clear], bound[clear])


def _deltas(base: Tensor, xs: list[Tensor]) -> Tensor:
    return torch.stack([x.double() - base.double() for x in xs])


def _magnitudes(base: Tensor, x: Tensor) -> Tensor:
    return (x.float() - base.float()).abs()


def _ordered(magnitudes: Tensor) -> Tensor:
    """Indices, the largest first and among ties the lowest index."""
    return magnitudes.sort(descending=True, stable=True).indices


# ---- task vectors ------------------------------------------------------------------------------


def linear(base: Tensor | None, xs: list[Tensor], weight: list[float]) -> Exact:
    terms = torch.stack([w * x.double() for w, x in zip(weight, xs)]) / math.fsum(weight)
    return Exact(terms.sum(0), terms.abs().sum(0))


def added(base: Tensor, terms: Tensor) -> Exact:
    """base + the terms."""
    value = base.double() + terms.sum(0)
    return Exact(value, terms.abs().sum(0) + value.abs())


def elected(base: Tensor, kept: Tensor, weights: Tensor | None = None) -> Exact:
    """base + the weighted mean of what has the sign of the sum of what is kept."""
    w = torch.ones(len(kept), 1, dtype=torch.float64) if weights is None else weights[:, None]
    total, size = kept.sum(0), kept.abs().sum(0)
    agree = torch.where(total >= 0, kept > 0, kept < 0)
    share = (agree * w).sum(0)
    mean = (kept * agree * w).sum(0) / torch.where(share > 0, share, 1)
    value = base.double() + mean
    return Exact(value, size + value.abs(), (total.abs() > 1e-5 * size) | (size == 0))


def task_arithmetic(base: Tensor, xs: list[Tensor], weight: float) -> Exact:
    return added(base, weight * _deltas(base, xs))


def _between(base: Tensor, xs: list[Tensor], ranks: slice) -> Tensor:
    kept = torch.zeros(len(xs), base.numel(), dtype=torch.float64)
    for row, x, d in zip(kept, xs, _deltas(base, xs)):
        chosen = _ordered(_magnitudes(base, x))[ranks]
        row[chosen] = d[chosen]
    return kept


def ties(base: Tensor, xs: list[Tensor], weight: float, density: float) -> Exact:
    assert weight == 1
    return elected(base, _between(base, xs, slice(int(density * base.numel()))))


def breadcrumbs(
    base: Tensor, xs: list[Tensor], weight: float, density: float, gamma: float
) -> Exact:
    outliers, rest = int(gamma * base.numel()), int(density * base.numel())
    return added(base, weight * _between(base, xs, slice(outliers, outliers + rest)))


def sce(base: Tensor, xs: list[Tensor], select_topk: float) -> Exact:
    d = [x.float() - base.float() for x in xs]
    mean = sum(d) / torch.tensor(float(len(d)))
    variance = sum((v - mean) * (v - mean) for v in d) / torch.tensor(float(len(d)))
    k = int(select_topk * int((variance != 0).sum()))
    mask = torch.zeros_like(variance, dtype=torch.float64)
    mask[_ordered(variance)[:k]] = 1
    kept = _deltas(base, xs) * mask
    squares = kept.square().sum(1)
    return elected(base, kept, squares / squares.sum())


def ram(base: Tensor, xs: list[Tensor], epsilon: float) -> Exact:
    changed = torch.stack([_magnitudes(base, x).double() > epsilon for x in xs])
    return added(base, _deltas(base, xs) * changed / changed.sum(0).clamp(min=1))


# ---- lengths and angles: of vectors that are neither parallel nor opposite ---------------------


def _arc(first: Tensor, other: Tensor, t: float) -> Tensor:
    angle = torch.acos(first @ other / (first.norm() * other.norm()))
    start, end = torch.sin((1 - t) * angle) * first, torch.sin(t * angle) * other
    return (start + end) / torch.sin(angle)


def _geometric(value: Tensor, base: Tensor | None, xs: list[Tensor]) -> Exact:
    """Coefficients are at most 1 here."""
    vectors = xs if base is None else [*xs, *[base] * len(xs)]
    return Exact(value, sum(x.double().abs() for x in vectors))


def slerp(base: Tensor, xs: list[Tensor], t: float) -> Exact:
    return _geometric(_arc(base.double(), xs[0].double(), t), base, xs)


def nuslerp(base: Tensor | None, xs: list[Tensor], weight: list[float]) -> Exact:
    t = weight[1] / (weight[0] + weight[1])
    return _geometric(_arc(xs[0].double(), xs[1].double(), t), base, xs)


def multislerp(base: Tensor, xs: list[Tensor], weight: list[float]) -> Exact:
    w = torch.tensor(weight, dtype=torch.float64) / math.fsum(weight)
    d = _deltas(base, xs)
    norms = d.norm(dim=1)
    mean = (w / norms) @ d
    return _geometric(base.double() + (w @ norms) * mean / mean.norm(), base, xs)


def karcher(base: Tensor | None, xs: list[Tensor]) -> Exact:
    vectors = torch.stack([x.double() for x in xs])
    norms = vectors.norm(dim=1)
    units = vectors / norms[:, None]
    mean = units.mean(0)
    mean = mean / mean.norm()
    for _ in range(10):
        angles = torch.acos(units @ mean)[:, None]
        tangent = ((units - torch.cos(angles) * mean) * angles / torch.sin(angles)).mean(0)
        step = tangent.norm()
        if step < 1e-5:
            break
        mean = torch.cos(step) * mean + torch.sin(step) / step * tangent
    return _geometric(norms.mean() * mean / mean.norm(), base, xs)


def model_stock(base: Tensor, xs: list[Tensor]) -> Exact:
    d, n = _deltas(base, xs), len(xs)
    units = d / d.norm(dim=1, keepdim=True)
    cosine = ((units @ units.T).sum() - n) / (n * (n - 1))
    share = n * cosine / (1 + (n - 1) * cosine)
    return _geometric(base.double() + share * d.mean(0), base, xs)
