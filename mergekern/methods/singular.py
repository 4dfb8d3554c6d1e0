"""Singular values and polar factors in float64, from the eigenvalues of a Gram matrix.

The Gram matrix g = a^T a of the shorter side costs a fraction of an SVD and gives all that spectral
methods need: a = u diag(s) v^T with g = v diag(s^2) v^T and u = a v / s. But it squares the
condition: errors of 2**-49 |g|_F in g and its eigenvalues (half as much was never seen) turn
directions of singular value s by 2**-49 |g|_F / s^2. Where that is more than the tolerance, a QR
and the SVD of its small factor take over, which turn them by about 2**-52 s_1 / s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_GRAM = 2.0**-49
_BLOCK = 192  # columns: of 768, five eighths of the product are computed
_ROWS = 512  # of a product in its own place


class Spectrum(NamedTuple):
    """a = u diag(s) v^T, of which the largest s are here, the largest first; u = left @ w."""

    left: Tensor  # [rows, columns]
    w: Tensor  # [columns, k]
    s: Tensor  # [k]
    v: Tensor  # [columns, k], orthonormal columns

    @property
    def u(self) -> Tensor:
        return self.left @ self.w

    @property
    def polar(self) -> tuple[Tensor, Tensor]:
        """Factors of u v^T: of the matrices with orthonormal columns the nearest to a."""
        return self.left, self.w @ self.v.T


def spectrum(
    a: Tensor,
    tolerance: float,
    k: int | None = None,
    *,
    beside: Tensor | None = None,
    least: float = 0.0,
) -> Spectrum:
    """The k (None: all) largest singular values and vectors of a float64 matrix, tall or square.

    beside: orthonormal columns q. Then they are those of a - q q^T a, but that u may have a part
    in q, which is to be taken out.
    tolerance: of the direction of a singular vector, apart from what a small gap between values
    does to it. Values up to that share of the largest, or up to `least`, count as 0 and are left
    out with their vectors, so that there may be fewer than k.
    Cost: rows columns^2 and about 9 columns^3 flops; where it takes a QR and an SVD, 4 rows
    columns^2 and about 22 columns^3.
    """
    rows, columns = a.shape
    k = columns if k is None else k
    if not k or not rows:
        none = a.new_zeros(columns, 0)
        return Spectrum(a, none, a.new_zeros(0), none)
    q = a[:, :0] if beside is None else beside
    inside = q.T @ a
    if tolerance > _GRAM:
        g = _gram(a)
        size = torch.linalg.vector_norm(g)
        values, v = _eigen(g if beside is None else g - _gram(inside), k)
        if values[-1] > torch.clamp(size * (_GRAM / tolerance), min=least**2):
            s = values.sqrt()
            return Spectrum(a, v / s, s, v)
    left, r = torch.linalg.qr(a - q @ inside)
    u, s, vh = torch.linalg.svd(r)
    k = min(k, int((s > torch.clamp(tolerance * s[0], min=least)).sum()))
    return Spectrum(left, u[:, :k], s[:k], vh[:k].T)


def _gram(a: Tensor) -> Tensor:
    """a^T a, whose blocks below the diagonal are those above it."""
    columns = a.shape[1]
    g = a.new_empty(columns, columns)
    for begin in range(0, columns, _BLOCK):
        part = slice(begin, begin + _BLOCK)
        block = a[:, part].T @ a[:, begin:]
        g[part, begin:], g[begin:, part] = block, block.T
    return g


def product_in_place(a: Tensor, square: Tensor) -> Tensor:
    """a @ square, written over a: no pages for another matrix of its size."""
    for rows in torch.split(a, _ROWS):
        rows.copy_(rows @ square)
    return a


def _eigen(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, the largest first, and their vectors as columns."""
    values, vectors = torch.linalg.eigh(g)
    return values[-k:].flip(0), vectors[:, -k:].flip(1)
