"""The SVD of a wide matrix that may be of low rank, but for what rounding has added to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .factors import svd_of_product

_BLOCK = 64  # columns of a sketch that are tried at a time
_ROUNDING = 2.0**-34  # of sums of squares of 1e8 terms: they tell when to look, and prove nothing
_ROWS = 256  # of what is left, at a time
_ANGLE = 2.0**-33  # of a singular vector from that of the matrix: below float32's rounding
_STEPS = 3  # of subspace iteration, at most

Svd = tuple[Tensor, Tensor, Tensor]


def svd_above(c: Tensor, cut: float) -> Svd:
    """(u, s, vh) of the singular values of c [m, n] above `cut`, largest first, in float64.

    A basis of few columns is looked for first, by random sketches. It is taken where what is left
    of c is small enough to tell which singular values are above `cut`, and iterated until their
    vectors are within angles of 2^-33 (Halko et al., 0909.4061). Otherwise the triangle of a QR of
    the longer side is decomposed.
    Result: deterministic; the sketches have a generator of their own. Singular values and vectors
    as `torch.linalg.svd`'s, signs of pairs aside.
    Cost: with k singular values above `cut`, k < min(m, n) / 3: about 5 products with matrices of
    k + 64 columns; otherwise one QR of the longer side and one SVD of the shorter side's square.
    """
    c = c.double()
    if c.shape[0] > c.shape[1]:
        v, s, uh = svd_above(c.T, cut)
        return uh.T, s, v.T
    found = _by_sketches(c, cut)
    if found is None:
        q, r = torch.linalg.qr(c.T)
        u, s, vh = torch.linalg.svd(r.T, full_matrices=False)
        found = u, s, vh @ q.T
    u, s, vh = found
    kept = int((s > cut).sum())
    return u[:, :kept], s[:kept], vh[:kept]


def _by_sketches(c: Tensor, cut: float) -> Svd | None:
    """None where no basis of a third of the rows is enough."""
    total = float(torch.linalg.vector_norm(c)) ** 2
    generator = torch.Generator(c.device).manual_seed(0)
    q, b = c.new_empty(len(c), 0), c.new_empty(0, c.shape[1])  # b = q^T c
    while not (left := _left(c, q, b, total, cut)) < cut:
        if 3 * (q.shape[1] + _BLOCK) > len(c) or math.isnan(left):
            return None
        shape = c.shape[1], _BLOCK
        more = c @ torch.randn(shape, generator=generator, dtype=c.dtype, device=c.device)
        for _ in range(2):  # once leaves what rounding makes of nearly parallel columns
            more = torch.linalg.qr(more - q @ (q.T @ more)).Q
        q, b = torch.cat([q, more], 1), torch.cat([b, more.T @ c])
    s = torch.linalg.svdvals(torch.linalg.qr(b.T, mode="r").R)
    # A singular value of c lies between one of b, s, and sqrt(s^2 + left^2).
    if bool(((s <= cut) & (s**2 + left**2 > cut**2)).any()):
        return None
    gap = left / float(s[s > cut].min()) if bool((s > cut).any()) else 0.0
    angle = gap
    for _ in range(_STEPS):
        if angle < _ANGLE:
            break
        q = torch.linalg.qr(c @ b.T).Q
        b = q.T @ c
        angle *= gap**2
    return svd_of_product(q, b) if angle < _ANGLE else None


def _left(c: Tensor, q: Tensor, b: Tensor, total: float, cut: float) -> float:
    """The norm of c - q b; where |c|^2 - |b|^2 says that it is above `cut`, by that alone."""
    square = total - float(torch.linalg.vector_norm(b)) ** 2
    if not square <= cut**2 + _ROUNDING * total:
        return math.sqrt(square)
    each = zip(torch.split(c, _ROWS), torch.split(q, _ROWS), strict=True)
    return math.hypot(*(float(torch.linalg.vector_norm(x - y @ b)) for x, y in each))
