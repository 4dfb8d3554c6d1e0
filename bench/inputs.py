"""Inputs of all benchmarks, and how an error is compared with its bound."""

from __future__ import annotations

import torch
from torch import Tensor

CHECKED = 1 << 16  # elements whose error is computed


def models(n: int, nbytes: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A base of weights (sigma 0.02) and n fine-tuned ones (deltas of sigma 0.001)."""
    g = torch.Generator().manual_seed(0)
    count = nbytes // dtype.itemsize
    base = torch.randn(count, generator=g).mul_(0.02).to(dtype)
    xs = [(base.float() + torch.randn(count, generator=g) * 1e-3).to(dtype) for _ in range(n)]
    return base, xs


def relative_error(got: Tensor, exact: Tensor, bound: Tensor) -> float:
    """Largest error over its bound; infinite where one is NaN."""
    ratio = ((got.double() - exact).abs() / bound).max()
    return float(ratio) if not ratio.isnan() else float("inf")


def half_unit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of results in `dtype` (an upper bound: eps / 2 of |x|)."""
    finfo = torch.finfo(dtype)
    return exact.abs() * (finfo.eps / 2) + finfo.smallest_normal * finfo.eps
