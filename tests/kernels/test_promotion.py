"""Sums over many rows on tensor cores that cut off: what the kernel's promotion is for.

The tensor cores are emulated, so that the constants of the kernel are tested without a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mergekern as mk
from mergekern import dispatch
from mergekern.backends import moments
from mergekern.check import name_of

from accuracy import assert_within
from kernels.tensor_cores import sums
from required import unavailable

ROWS = 1 << 17
U = 2.0**-24


def features(mean: float, dtype: torch.dtype) -> np.ndarray:
    """[ROWS, 4] of deviation 1, correlated by about a half, as the values of `dtype`."""
    g = torch.Generator().manual_seed(0)
    hidden, own = (torch.randn(ROWS, k, generator=g, dtype=torch.float64) for k in (1, 4))
    return (((hidden + own) / 2**0.5) + mean).to(dtype).double().numpy()


def products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All pairs of columns."""
    return (x[:, :, None] * y[:, None, :]).reshape(len(x), -1)


def runs(p: np.ndarray, rows: int) -> np.ndarray:
    return p.reshape(-1, rows, p.shape[-1])


def error(total: np.ndarray, x: np.ndarray, shift: np.ndarray | float = 0.0) -> float:
    """The largest error of a covariance in units of s_i s_j; `total` is of x - shift."""
    rest = x.mean(0) - shift
    got = total.reshape(4, 4) / len(x) - np.outer(rest, rest)
    centred = x - x.mean(0)
    exact = centred.T @ centred / len(x)
    spread = np.sqrt(exact.diagonal())
    return float(np.abs((got - exact) / np.outer(spread, spread)).max())


def test_a_single_accumulator_drifts() -> None:
    x = features(0, torch.bfloat16)
    assert error(sums(products(x, x)), x) > 2e-4


@pytest.mark.parametrize("mean", [0.0, 1.0, 4.0])
def test_promoted_sums_do_not(mean: float) -> None:
    """At the mean up to which it is left in, and below; the bound is the docstring's."""
    assert mean <= moments.SMALL_MEAN
    x = features(mean, torch.bfloat16)
    found = error(sums(runs(products(x, x), moments.SHALLOW_ROWS)).sum(0), x)
    assert found <= 1e-5
    assert found <= 2**13 * U


def in_parts(v: np.ndarray, rows: int) -> np.ndarray:
    """Sums of runs of `rows`: six products of parts, the small ones first, as the kernels do."""
    rest, parts = v, []
    for _ in range(3):
        bits = rest.astype(np.float32).view(np.int32) & -65536
        parts.append(bits.view(np.float32).astype(np.float64))
        rest = rest - parts[-1]
    total: np.ndarray | float = 0.0
    for i, j in ((0, 2), (2, 0), (1, 1), (0, 1), (1, 0), (0, 0)):
        total = sums(runs(products(parts[i], parts[j]), rows), total)
    assert isinstance(total, np.ndarray)
    return total


@pytest.mark.parametrize("rows", [32, 64], ids=["CUDA C++", "Triton"])
def test_parts_of_float32(rows: int) -> None:
    x = features(100, torch.float32)
    shift = x.mean(0).astype(np.float32).astype(np.float64)
    found = error(in_parts(x - shift, rows).sum(0), x, shift)
    assert found <= 264 * U
    assert found <= 1e-6


@pytest.mark.parametrize("programs", [1, 2, 1056])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name_of)
def test_the_kernel_cuts_off_where_the_model_does(
    dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many runs a program adds up: the emulated sums are those of the model."""
    reason = dispatch.why_not("cuda", "covariance", "cpu")
    if reason:
        unavailable("cuda", reason)
    monkeypatch.setattr(moments, "_PROGRAMS", programs)
    x = features(0.5, dtype)[: 5 * 512]
    shift = x.mean(0).astype(np.float32).astype(np.float64) * (dtype == torch.float32)
    if dtype == torch.float32:
        found = in_parts((x - shift).astype(np.float32).astype(np.float64), 32)
    else:
        found = sums(runs(products(x, x), moments.SHALLOW_ROWS))
    rest = x.mean(0) - shift
    expected = found.sum(0).reshape(4, 4) / len(x) - np.outer(rest, rest)
    expected = np.triu(expected) + np.triu(expected, 1).T  # of which the kernel forms one half
    got = mk.covariance(torch.from_numpy(x).to(dtype), backend="cuda")
    # What is left are roundings of float64, and of the pair's smaller float32.
    assert_within(got, torch.from_numpy(expected), torch.full((4, 4), 2.0**-44))
