"""Oracles and bounds of covariance and correlation, and what a Covariance holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import mergekern as mk

import cases
from accuracy import assert_bits_equal

DTYPES = cases.DTYPES
FEW = pytest.mark.filterwarnings("ignore:covariance. fewer rows than features")


# ---- the oracle ------------------------------------------------------------------------------


def wide(x: Tensor) -> np.ndarray:
    """Rows in the longest floats there are: 64 bits of mantissa."""
    return x.cpu().double().reshape(-1, x.shape[-1]).numpy().astype(np.longdouble)


def exact(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The formula, of finite rows."""
    a = wide(x)
    b = a if y is None else wide(y)
    products = (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)
    return torch.from_numpy(products.astype(np.float64))


def variance(x: Tensor) -> Tensor:
    """The diagonal of `exact`."""
    centred = wide(x) - wide(x).mean(0)
    return torch.from_numpy((centred * centred).mean(0).astype(np.float64))


def exact_correlation(x: Tensor, y: Tensor | None = None, eps: float = 0.0) -> Tensor:
    s, t = (variance(v).sqrt() for v in (x, x if y is None else y))
    scale = torch.outer(s, t).clamp(min=eps)
    return torch.where(scale > 0, exact(x, y) / torch.where(scale > 0, scale, 1), 0)


def bound(x: Tensor, y: Tensor | None = None, backend: str = "cpu") -> Tensor:
    """The docstring's, and half of the smallest number per product below the normal ones."""
    y = x if y is None else y
    n = len(wide(x))
    unit = 2.0**-53 if backend == "torch" or x.dtype == torch.float64 else 2.0**-24
    spread = [variance(v).sqrt() for v in (x, y)]
    largest = [torch.from_numpy(np.abs(wide(v)).max(0).astype(np.float64)) for v in (x, y)]
    steps = 2**13 if backend in ("cuda", "triton") and x.dtype.itemsize == 2 else 264
    relative = steps * unit * torch.outer(*spread)
    return relative + (2 * n + 128) * 2.0**-53 * torch.outer(*largest) + n * 2.0**-1074


def correlation_bound(x: Tensor, y: Tensor | None = None, backend: str = "cpu") -> Tensor:
    """For features that vary, with the second order of small errors in the factor."""
    y = x if y is None else y
    s, t = (variance(v).sqrt() for v in (x, y))
    own = [bound(v, None, backend).diagonal() / variance(v) / 2 for v in (x, y)]
    assert max(float(e.max()) for e in own) < 0.01
    return 1.02 * (bound(x, y, backend) / torch.outer(s, t) + own[0][:, None] + own[1])


def rows(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Correlated features of different means and scales."""
    g = torch.Generator().manual_seed(1000 * seed + 31 * n + d)
    hidden = torch.randn(n, 1 + d // 3, generator=g, dtype=torch.float64)
    mixed = hidden @ torch.randn(1 + d // 3, d, generator=g, dtype=torch.float64)
    x = mixed + torch.randn(n, d, generator=g, dtype=torch.float64)
    return (x * torch.linspace(0.1, 3, d) + torch.linspace(-2, 2, d)).to(dtype)


def means(x: Tensor) -> Tensor:
    return torch.from_numpy(wide(x).mean(0).astype(np.float64))


def mean_bound(x: Tensor) -> Tensor:
    """n + 2 float64 roundings, each of a number of at most twice the largest magnitude."""
    largest = np.abs(wide(x)).max(0).astype(np.float64)
    return (2 * len(wide(x)) + 4) * 2.0**-53 * torch.from_numpy(largest)


def pair(n: int, d: int, e: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = rows(n, d, dtype)
    return x, (rows(n, e, dtype, seed=1).double() + x[:, :1].double()).to(dtype)


def snapshot(moments: mk.Covariance) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in moments.state_dict().items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert_bits_equal(got[name], t)
