"""tsv_m, iso_c, iso_cts and svc from their papers: dense SVDs in float64, step by step.

Each gives the merged task vector and how far ours may be from it, in the spectral norm and so at
every element. Half of that is derived: errors of 2**-49 |g|_F in a Gram matrix g = a^T a turn what
is spanned by the first k singular vectors by `turn`, and a polar factor by 2**-49 |g|_F / s_min^2;
an error of the columns of a grows by 1 / s_min in the polar factor. The other half is the oracle's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from accuracy import assert_within, half_ulp

GRAM = 2.0**-49


class Oracle(NamedTuple):
    merged: Tensor
    error: float


def svd(a: Tensor, cut: float = 1e-7) -> tuple[Tensor, Tensor, Tensor]:
    """u, s, v of the singular values above a share of the largest: others count as 0."""
    u, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    n = int((s > cut * s[:1]).sum())
    return u[:, :n], s[:n], vh[:n].T


def turn(a: Tensor, k: int) -> float:
    """How far what the first k singular vectors span may turn: by way of a Gram matrix or a QR."""
    s = torch.linalg.svdvals(a.double())
    if not len(s) or not s[0]:
        return 0.0
    after = float(s[k]) if k < len(s) else 0.0
    size = float(torch.linalg.vector_norm(s.square()))
    by_qr = 2.0**-23 + 2.0**-50 * float(s[0]) / (float(s[k - 1]) - after)
    return min(GRAM * size / (float(s[k - 1]) ** 2 - after**2), by_qr)


def polar(a: Tensor) -> tuple[Tensor, float, float]:
    """The polar factor, the error of ours, and by how much it multiplies errors of a."""
    u, s, v = svd(a)
    size = float(torch.linalg.vector_norm(s.square()))
    least = float(s[-1]) if len(s) else 1.0
    return u @ v.T, min(GRAM * size / least**2, 2.0**-23) + GRAM, 1 / least


def tsv_m(taus: Sequence[Tensor]) -> Oracle:
    k = min(taus[0].shape) // len(taus)
    found = [svd(tau) for tau in taus]
    us, ss, vs = ([f[i][..., :k] for f in found] for i in range(3))
    p, of_p, by_p = polar(torch.cat(us, 1))
    q, of_q, by_q = polar(torch.cat(vs, 1))
    s = torch.cat(ss)
    turned = sum(turn(tau, k) * float(svd(tau)[1][:1].sum()) for tau in taus)
    error = float(s.max()) * (of_p + of_q) + turned * (by_p + by_q)
    return Oracle((p * s) @ q.T, 4 * error)


def iso_c(taus: Sequence[Tensor]) -> Oracle:
    total = torch.stack([tau.double() for tau in taus]).sum(0)
    p, error, _ = polar(total)
    mean = float(svd(total)[1].sum()) / min(total.shape)
    return Oracle(mean * p, 4 * mean * error)


def iso_cts(taus: Sequence[Tensor], common: float = 0.8) -> Oracle:
    total = torch.stack([tau.double() for tau in taus]).sum(0)
    rank, n = min(total.shape), len(taus)
    each = min(round((rank - int(rank * common)) / n), rank // n)  # the tools take more, and fail
    size = rank - each * n
    u, s, v = (x[..., :size] for x in svd(total))
    us, ss, vs, turned = [], [], [], turn(total, size)
    for tau in taus:
        own = tau.double() - u @ (u.T @ tau.double())
        a, b, c = (x[..., :each] for x in svd(own))
        us.append(a)
        ss.append(b)
        vs.append(c)
        scale = float(torch.linalg.vector_norm(tau.double())) / float(b[-1]) if each else 0.0
        turned += (turn(own, each) + turn(total, size)) * scale**2 if each else 0.0
    p, of_p, by_p = polar(torch.cat([*us, u], 1))
    q, of_q, by_q = polar(torch.cat([*vs, v], 1))
    mean = float(torch.cat([*ss, s]).sum()) / rank
    return Oracle(mean * p @ q.T, 4 * mean * (of_p + of_q + turned * (by_p + by_q)))


def svc(taus: Sequence[Tensor], scale: float = 1.0, alpha: float = 1.0) -> Oracle:
    """Vector by vector; they must be apart, as each of them counts."""
    total = scale * torch.stack([tau.double() for tau in taus]).sum(0)
    u, s, v = svd(total)
    merged = torch.zeros_like(total)
    for r in range(len(s)):
        counts = []
        for tau in taus:
            response = u[:, r] @ tau.double()
            square = float(response @ response)
            count = float(s[r] * v[:, r] @ response) / square if square else alpha
            counts.append(max(alpha, count))
        merged += len(taus) / sum(counts) * s[r] * torch.outer(u[:, r], v[:, r])
    gaps = (s[:-1].square() - s[1:].square()).min() if len(s) > 1 else s[:1].square().sum()
    size = float(torch.linalg.vector_norm(s.square()))
    steep = (
        len(taus) / alpha * max(float(torch.linalg.matrix_norm(tau.double(), 2)) for tau in taus)
    )
    return Oracle(merged, 4 * GRAM * size / float(gaps) * (steep + float(s[0]) / alpha) * len(s))


ORACLES: dict[str, Callable[..., Oracle]] = {
    "tsv_m": tsv_m,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "svc": svc,
}


# ---- models, and how a merge of them is held to an oracle ------------------------------------


def family(
    n: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base and n models whose task vectors have something in common."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g)
    shared = torch.randn(shape, generator=g)
    xs = [base + 0.01 * (torch.randn(shape, generator=g) + 0.3 * shared) for _ in range(n)]
    return base.to(dtype), [x.to(dtype) for x in xs]


def taus(base: Tensor, xs: list[Tensor]) -> list[Tensor]:
    return [x.double() - base.double() for x in xs]


def assert_merged(
    got: Tensor, base: Tensor, oracle: Oracle, scale: float = 1.0, rounding: float = 1.0
) -> None:
    """base + scale * oracle, rounded once; the sum of the two in float64 before."""
    exact = base.double() + scale * oracle.merged
    error = abs(scale) * oracle.error + 2.0**-52 * (base.double().abs() + exact.abs())
    assert oracle.error <= 2.0**-18 * float(torch.linalg.matrix_norm(oracle.merged, 2))
    assert_within(got, exact, error + rounding * half_ulp(exact.abs() + error, got.dtype))
