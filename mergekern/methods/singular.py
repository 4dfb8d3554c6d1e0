"""Singular values and polar factors of task vectors in float64, from the eigenvalues of a Gram matrix.

The Gram matrix g = a^T a of the shorter side costs an eighth of an SVD, and gives all that spectral
methods need: a = u diag(s) v^T with g = v diag(s^2) v^T and u = a v / s. But it squares the
condition: with an error of 2**-49 |g| in g (16 float64 roundings; `gram` and `eigh` together were
never seen to make 4), directions of singular value s are off by 2**-49 (s_1 / s)^2. Where that is
more than the tolerance, a QR and the SVD of its small factor take over, off by 2**-52 s_1 / s.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_EPS = 2.0**-52
_GRAM = 16 * _EPS  # error of a Gram matrix and its eigenvalues, relative to the largest of these


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
        """u v^T as a product of two: the nearest matrix with orthonormal columns."""
        return self.left, self.w @ self.v.T


def spectrum(a: Tensor, tolerance: float, k: int | None = None) -> Spectrum:
    """The k (None: all) largest singular values and vectors of a float64 matrix, tall or square.

    tolerance: the relative error that singular vectors may have, apart from what a small gap
    between two values does to these. Values that are 0 but for rounding, s <= rows eps s_1, are
    left out with their vectors, which nothing determines; so there may be fewer than k.
    Cost: rows columns^2 and about 2 columns^3 flops (k = columns: 9 columns^3); where it takes a
    QR and an SVD, 4 rows columns^2 and about 22 columns^3.
    """
    rows, columns = a.shape
    k = columns if k is None else k
    if not k or not rows:
        empty = a.new_zeros(columns, 0)
        return Spectrum(a, empty, a.new_zeros(0), empty)
    if tolerance > _GRAM:
        values, v = _eigen(_gram(a), k)
        if values[-1] > values[0] * (_GRAM / tolerance):
            s = values.sqrt()
            return Spectrum(a, v / s, s, v)
    q, r = torch.linalg.qr(a)
    u, s, vh = torch.linalg.svd(r)
    k = min(k, int((s > rows * _EPS * s[0]).sum()))
    return Spectrum(q, u[:, :k], s[:k], vh[:k].T)


def _gram(a: Tensor) -> Tensor:
    """a^T a. NumPy sees that both are one matrix, and computes half of it."""
    if a.device.type != "cpu":
        return a.T @ a
    x = a.numpy()
    return torch.from_numpy(np.matmul(x.T, x))


def _eigen(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, the largest first, and their vectors as columns."""
    if g.device.type != "cpu":
        values, vectors = torch.linalg.eigh(g)
    else:
        from scipy.linalg import eigh  # a merge that needs no eigenvalues does not load scipy

        n = len(g)
        some = {"driver": "evr", "subset_by_index": (n - k, n - 1)}
        which = some if 2 * k < n else {"driver": "evd"}
        found = eigh(g.numpy(), check_finite=False, overwrite_a=True, **which)
        values, vectors = map(torch.from_numpy, found)
    return values[-k:].flip(0), vectors[:, -k:].flip(1)
