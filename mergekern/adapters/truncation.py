"""The best factors of a dense matrix, without its SVD where few directions are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

# Residuals of x^T x that end the search, of the product of the first and the last singular value
# wanted: a quarter of what rounding x to float32 may do to it.
_RESIDUAL = 2.0**-26
_LEAST_BLOCK = 4  # products of fewer vectors take as long
_STEPS = 8  # are about what it takes


def best_of_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors b [out, r] and a [r, in] in float64: b @ a is the best approximation of rank r to x.

    a has orthonormal rows, b holds the singular values; r is `rank`, at most the shorter side. The
    third result is |x - b @ a|_F / |x|_F, to 1e-8.
    In float64, from x as it is: block Lanczos on x^T x of the shorter side, from vectors of a fixed
    seed, until no residual is above 2**-26 s_1 s_r; with g = s_r - s_{r+1} the product is then off
    by sqrt(r) 2**-26 s_1 s_r / g at most, where an SVD in float32 is by 2**-24 s_1 s_r / g and
    more. Singular values that differ by less than the search resolves stand for one another, and
    nothing but an x made against that seed hides a direction from it. An x of float64, or of which
    a large share of the directions is asked for, goes to an SVD in float64.
    Cost: a step reads x twice, 4 r numel FLOPs; 6 to 12 steps where the signal stands out.
    """
    rank = min(rank, *x.shape)
    exact, x = x.dtype == torch.float64, x.double()
    wide = x.shape[0] < x.shape[1]
    rows = None if exact else _block_lanczos(x.T if wide else x, rank)
    if rows is None:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        b, a = u[:, :rank] * s[:rank], vh[:rank]
    elif wide:
        q, r = torch.linalg.qr((rows @ x).T)
        b, a = rows.T @ r.T, q.T
    else:
        b, a = x @ rows.T, rows
    whole, kept = (float(torch.linalg.vector_norm(t)) for t in (x, b))
    return b, a, max(0.0, 1 - (kept / whole) ** 2) ** 0.5 if whole else 0.0


def _block_lanczos(x: Tensor, rank: int) -> Tensor | None:
    """The first right singular vectors of a tall x, as rows; None where it would take too long.

    Rows are made orthogonal to all before them, and once more: what is left of a direction that is
    exhausted is rounding.
    """
    width, block = x.shape[1], max(rank, _LEAST_BLOCK)
    limit = width // 2  # beyond, an SVD takes no longer
    if _STEPS * block > limit:
        return None
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(block, width, generator=generator, dtype=x.dtype)
    rows, _ = _orthonormal(start.to(x.device))
    basis, core = rows, x.new_zeros(0, 0)
    while len(basis) <= limit:
        image = (rows @ x.T) @ x
        known = image @ basis.T
        core = torch.cat([torch.cat([core, known[:, : len(core)].T], 1), known])
        rows, first = _orthonormal(image - known @ basis)
        rows, second = _orthonormal(rows - (rows @ basis.T) @ basis)
        values, vectors = torch.linalg.eigh(core)
        vectors = vectors[:, -rank:]
        residual = torch.linalg.vector_norm(second @ first @ vectors[-block:], dim=0).max()
        if bool(residual <= _RESIDUAL * (values[-1] * values[-rank].clamp(min=0)).sqrt()):
            return vectors.flip(1).T @ basis
        basis = torch.cat([basis, rows])
    return None


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """q and r: orthonormal rows, rows = r^T q."""
    q, r = torch.linalg.qr(rows.T)
    return q.T, r
