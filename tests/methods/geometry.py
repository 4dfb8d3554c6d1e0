"""Methods of lengths and angles from their formulas on whole tensors in float64, with bounds.

The oracles never see a Gram matrix: they build unit vectors, means and tangents of full length.
Beside the value they return the sum of magnitudes of its terms, |c_i x_i|, which errors are a share
of, and how much they magnify the relative error of a dot product.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accuracy import half_ulp
from cases import values

# ---- oracles: flat float64 vectors -------------------------------------------------------------


class Exact(NamedTuple):
    value: Tensor
    size: Tensor  # sum of |c_i x_i|
    total: float  # sum of |c_i|
    magnified: float  # error of a coefficient over that of a cosine


def straight(xs: list[Tensor], weights: list[float]) -> Exact:
    terms = [w * x for w, x in zip(weights, xs, strict=True)]
    return Exact(sum(terms), sum(t.abs() for t in terms), sum(map(abs, weights)), 0.0)


def nuslerp_oracle(xs: list[Tensor], t: float) -> Exact:
    u = [x / max(float(x.norm()), 1e-7) for x in xs]
    cosine = min(1.0, max(-1.0, float((u[0] * u[1]).sum())))
    if 1 - cosine**2 <= 1e-16:
        return straight(xs, [1 - t, t])
    angle = math.acos(cosine)
    exact = straight(
        xs, [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    )
    # d sin(t a) / sin(a) over d cos(a): bounded by (1 + |t|)^3 up to a right angle, and from there
    # by the poles of second order at pi.
    return exact._replace(magnified=4 * (1 + abs(t)) ** 3 / (1 + cosine) ** 2)


def slerp_oracle(xs: list[Tensor], t: float) -> Exact:
    u = [x / x.norm() if x.norm() > 1e-8 else x for x in xs]
    cosine = float((u[0] * u[1]).sum())
    if abs(cosine) > 0.9995:
        return straight(xs, [1 - t, t])
    angle = math.acos(cosine)
    exact = straight(
        xs, [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    )
    return exact._replace(magnified=4 * (1 + abs(t)) ** 3 / (1 + cosine) ** 2)


def multislerp_oracle(
    xs: list[Tensor], weight: list[float], normalize: bool = True, eps: float = 1e-8
) -> Exact:
    w = [v / math.fsum(weight) for v in weight] if normalize else weight
    norms = [float(x.norm()) for x in xs]
    if not any(norms):
        return straight(xs, w)
    u = [x / (n + eps) for x, n in zip(xs, norms, strict=True)]
    mean = sum(v * x for v, x in zip(w, u, strict=True))
    length = float(mean.norm())
    if length < eps:
        assert len(xs) == 2
        return straight(xs, w)
    mean = mean / length
    tangents = [x - float((x * mean).sum()) * mean for x in u]
    tangent = sum(v * x for v, x in zip(w, tangents, strict=True))
    step = float(tangent.norm()) + eps
    moved = mean * math.cos(step) + tangent * (math.sin(step) / step)
    scale = sum(n * v for n, v in zip(norms, w, strict=True))
    terms = sum((v * x).abs() for v, x in zip(w, u, strict=True)) / length
    spread = sum(map(abs, w)) / length
    total = sum(abs(v) / n for v, n in zip(w, norms, strict=True) if n) * abs(scale) / length
    return Exact(moved * scale, terms * abs(scale), total, 4 * (1 + spread**2))


def karcher_oracle(
    xs: list[Tensor], max_iter: int = 10, tol: float = 1e-5, least: float = 0.0
) -> Exact:
    norms = [float(x.norm()) for x in xs]
    kept = [i for i, n in enumerate(norms) if n > least]
    if not kept:
        return straight(xs, [0.0] * len(xs))
    u = [xs[i] / norms[i] for i in kept]
    alpha = 1 / len(kept)
    mean, size = alpha * sum(u), alpha * sum(x.abs() for x in u)  # size: sum of |terms| of the mean
    length = float(mean.norm())
    mean, size = (u[0], u[0].abs()) if length < tol else (mean / length, size / length)
    for _ in range(max_iter):
        tangent, off = torch.zeros_like(mean), torch.zeros_like(mean)
        for x in u:
            cosine = min(1.0, max(-1.0, float((mean * x).sum())))
            angle = math.acos(cosine)
            if angle < tol or (1 - cosine**2 < 1e-12 and cosine < 0):
                continue
            factor = alpha * angle / math.sin(angle)
            tangent += factor * (x - cosine * mean)
            off += factor * (x.abs() + abs(cosine) * size)
        step = float(tangent.norm())
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        size = math.cos(step) * size + math.sin(step) / step * off
        mean, size = mean / mean.norm(), size / mean.norm()
    scale = sum(norms) / len(norms)
    # Each step passes on an error, magnified by less than 4 away from opposite vectors.
    return Exact(scale * mean, scale * size, 0.0, 4.0 * max_iter)  # never with a base


def model_stock_oracle(deltas: list[Tensor]) -> Exact:
    n, cosines = len(deltas), []
    for i in range(n):
        for j in range(i + 1, n):
            product = max(float(deltas[i].norm() * deltas[j].norm()), 1e-6)
            cosines.append(max(-1.0, min(1.0, float((deltas[i] * deltas[j]).sum()) / product)))
    cosine = sum(cosines) / len(cosines)
    denominator = 1 + (n - 1) * cosine
    t = 0.0 if abs(denominator) < 1e-6 else n * cosine / denominator
    return straight(deltas, [t / n] * n)._replace(magnified=0 if t == 0 else 1 / denominator**2)


WEIGHT = [0.7, 0.4, -0.2, 0.5, 0.3, 0.6, 0.1, 0.9, 0.2]


def oracle(method: str, xs: list[Tensor], **given: Any) -> Exact:
    weight = given.pop("weight", WEIGHT[: len(xs)])
    if method == "slerp":
        return slerp_oracle(xs, given["t"])
    if method == "nuslerp":
        total = math.fsum(weight)
        return nuslerp_oracle(xs, 0.5 if abs(total) < 1e-6 else weight[1] / total)
    if method == "multislerp":
        return multislerp_oracle(
            xs, weight, given.get("normalize_weights", True), given.get("eps", 1e-8)
        )
    return karcher_oracle(xs, **given) if method == "karcher" else model_stock_oracle(xs)


# ---- data and bounds ---------------------------------------------------------------------------


def models(
    kind: str, n: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[Tensor, list[Tensor]]:
    """A base and n models. "close" and "closest": fine-tuned, by deltas of 1e-3 and 1e-5."""
    base = 0.02 * values(shape, torch.float64, seed=99)
    if kind in ("close", "closest"):
        scale = 1e-3 if kind == "close" else 1e-5
        common = scale * values(shape, torch.float64, seed=50)
        xs = [base + common + scale * values(shape, torch.float64, seed=i) for i in range(n)]
    else:
        xs = [values(shape, torch.float64, kind, seed=i) for i in range(n)]
    return base.to(dtype), [x.to(dtype) for x in xs]


def bound(exact: Exact, base: Tensor | None, dtype: torch.dtype, n: int, numel: int) -> Tensor:
    """Of one vector: its coefficients, the sum, the store."""
    unit = 2.0**-24 if dtype.itemsize == 2 else 2.0**-53
    # A cosine of two sums of numel + 2 roundings and a norm, here and in the oracle.
    off = 4 * (numel + 8) * 2.0**-53 * exact.magnified * exact.size
    # sum_i c_i x_i and (1 - sum_i c_i) b: the coefficient of b is rounded n times, each term and
    # sum once; as many roundings in the oracle.
    terms = exact.size
    if base is not None:
        terms = terms + (1 + 2 * exact.total) * base.abs()
    off = off + (n + 4) * (unit + 2.0**-53) * terms
    result = exact.value + (0 if base is None else base)
    return off + half_ulp(result.abs() + off, dtype)
