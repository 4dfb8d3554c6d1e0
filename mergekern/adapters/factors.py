"""Linear algebra of sums of products b_i @ a_i that never forms the products.

All of it in float64, on matrices with no more rows or columns than the ranks' sum on one side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter import Factors


class Aligned(NamedTuple):
    """Task vectors in one basis of columns: task vector i = u @ parts[i]."""

    u: Tensor  # [out, k], orthonormal columns
    parts: list[Tensor]  # [k, in]


def align(given: Sequence[Factors], cut: float | None = None) -> Aligned:
    """KnOTS: [d_1 ... d_n] = u diag(s) [v_1 ... v_n]^T, and parts[i] = diag(s) v_i^T.

    With b = [b_1 ... b_n] = q r and a_i^T = q_i l_i^T the SVD is that of the core
    r diag(l_1 ... l_n), a square of the ranks' sum. Singular values up to `cut` are dropped; by
    default those below the rounding of the largest.
    Cost: QR of [out, R] and of each [in, r_i], one SVD of [R, R].
    """
    q, r = torch.linalg.qr(torch.cat([f.scale * f.b.double() for f in given], 1))
    blocks = torch.split(r, [f.rank for f in given], 1)
    sides = [torch.linalg.qr(f.a.double().T) for f in given]
    core = torch.cat([block @ side.R.T for block, side in zip(blocks, sides, strict=True)], 1)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    kept = int((s > (_least(s, max(core.shape)) if cut is None else cut)).sum())
    weighted = s[:kept, None] * vh[:kept]
    widths = [side.R.shape[0] for side in sides]
    parts = [
        part @ side.Q.T for part, side in zip(torch.split(weighted, widths, 1), sides, strict=True)
    ]
    return Aligned(q @ u[:, :kept], parts)


class Core(NamedTuple):
    """Task vectors in two bases: task vector i = u @ parts[i] @ v^T."""

    u: Tensor  # [out, p], orthonormal columns
    parts: list[Tensor]  # [p, q]
    v: Tensor  # [in, q], orthonormal columns


def core_space(given: Sequence[Factors]) -> Core:
    """Core Space: u and v span the columns of [b_1 ... b_n] and of [a_1^T ... a_n^T]."""
    u = _span(torch.cat([f.b.double() for f in given], 1))
    v = _span(torch.cat([f.a.double() for f in given]).T)
    parts = [f.scale * (u.T @ f.b.double()) @ (f.a.double() @ v) for f in given]
    return Core(u, parts, v)


def sum_of(given: Sequence[Factors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors (b, a) of sum_i weights[i] * task vector i: all of them side by side."""
    scaled = [w * f.scale * f.b.double() for f, w in zip(given, weights, strict=True)]
    return torch.cat(scaled, 1), torch.cat([f.a.double() for f in given])


def biases_of(
    given: Mapping[str, Sequence[Factors]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The same sum of the biases of second factors, of modules that have any; others count as 0."""
    sums: dict[str, Tensor] = {}
    for name, each in given.items():
        for f, w in zip(each, weights, strict=True):
            if f.bias is not None:
                term = w * f.scale * f.bias.double()
                sums[name] = sums[name] + term if name in sums else term
    return sums


def truncated(b: Tensor, a: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """The best factors of b @ a of that rank (None: all there is), singular values in b.

    The third result is |rest|_F / |b @ a|_F, what they lack.
    """
    u, s, vh = svd_of_product(b, a)
    most = int((s > _least(s, b.shape[1])).sum())
    kept = most if rank is None else min(rank, most)
    norm = float(torch.linalg.vector_norm(s))
    lost = float(torch.linalg.vector_norm(s[kept:])) / norm if norm and kept < most else 0.0
    return u[:, :kept] * s[:kept], vh[:kept], lost


def svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, s and vh of b @ a, as many as b has columns or a side of the product has."""
    q, r = torch.linalg.qr(b)
    p, t = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r @ t.T, full_matrices=False)
    return q @ u, s, vh @ p.T


def _least(s: Tensor, size: int) -> float:
    """What rounding leaves of a singular value that is 0, of a matrix with sides up to `size`."""
    return float(s.max()) * size * torch.finfo(s.dtype).eps if len(s) else 0.0


def _span(x: Tensor) -> Tensor:
    """Orthonormal columns that span those of x."""
    q, r = torch.linalg.qr(x)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ u[:, : int((s > _least(s, max(r.shape))).sum())]
