"""variance_mask: exact selection of the elements on which models disagree most."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import reference
from mergekern.check import accumulator, name_of
from mergekern.keep import Threshold

import cases
from cases import CATALOGUE, CHUNK, Case, values
from refusal import refused
from serving import affordable

OP = "variance_mask"
SMALL = 1 << 15


def variance_of(xs: list[Tensor], base: Tensor | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """The specified arithmetic, in numpy."""
    acc = accumulator(xs[0].dtype)
    ds = [x.cpu().to(acc).numpy() for x in xs]
    if base is not None:
        ds = [d - base.cpu().to(acc).numpy() for d in ds]
    n = ds[0].dtype.type(len(ds))
    mean = np.zeros_like(ds[0])
    with np.errstate(all="ignore"):
        for d in ds:
            mean = mean + d
        mean = mean / n
        variance = np.zeros_like(mean)
        for d in ds:
            variance = variance + (d - mean) * (d - mean)
        return (variance / n).reshape(-1), [d.reshape(-1) for d in ds]


def check(xs: list[Tensor], base: Tensor | None, share: float, backend: str) -> None:
    got = mk.variance_mask(xs, share, base=base, backend=backend)
    variance, ds = variance_of(xs, base)
    kept = np.ones(variance.size, bool)
    if share < 1:
        assert got.mask is not None
        k = int(np.count_nonzero(variance) * share)
        nan = np.isnan(variance)
        size = np.where(nan, np.inf, variance.astype(np.float64))
        order = np.lexsort((np.arange(variance.size), -size, ~nan))
        kept[:] = False
        kept[order[:k]] = True
        bits = np.unpackbits(got.mask.bits.cpu().numpy())
        assert np.array_equal(bits[: variance.size].astype(bool), kept)
        assert not bits[variance.size :].any()
    else:
        assert got.mask is None
    for square, d in zip(got.squares, ds, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            exact = float(np.sum(d[kept].astype(np.float64) ** 2))
        if math.isfinite(exact):
            assert abs(square - exact) <= (d.size + 2) * 2.0**-52 * exact
        else:
            assert math.isnan(square) == math.isnan(exact)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", [c for c in CATALOGUE if math.prod(c.shape) < 5000], ids=str)
def test_catalogue(case: Case, share: float, backend: str, device: str) -> None:
    xs = case.tensors(device)
    check(xs, values(case.shape, case.dtype, seed=33).to(device), share, backend)
    check(xs, None, share, backend)


@pytest.mark.parametrize("n", [SMALL + 1, CHUNK + 77])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "nan"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_long_tensors(dtype: torch.dtype, kind: str, n: int, backend: str, device: str) -> None:
    n = affordable(backend, n)
    base = values((n,), dtype, seed=7).to(device)
    xs = [values((n,), dtype, kind, seed=s).to(device) for s in range(3)]
    for share in (0.01, 0.5, 0.999):
        check(xs, base, share, backend)


@pytest.mark.parametrize("models", [1, 2, 4, 5, 9])
def test_frozen_elements(models: int, backend: str, device: str) -> None:
    """Most elements are the same in all models: their variance is 0 and they do not count."""
    n = affordable(backend, 3 * CHUNK // 2)
    base = values((n,), torch.bfloat16, seed=7).to(device)
    xs = [base.clone() for _ in range(models)]
    for i, x in enumerate(xs):
        x[i::97] += 1
    for share in (0.3, 0.9):
        check(xs, base, share, backend)
    check([base] * models, base, 0.5, backend)


def test_strided_inputs(backend: str, device: str) -> None:
    xs = [values((31, 29), torch.float32, seed=s).to(device).T for s in range(3)]
    base = values((58, 31), torch.float32, seed=5).to(device)[::2]
    check(xs, base, 0.4, backend)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_threads_change_nothing(
    threads: str, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    xs = [values((2 * CHUNK + 9,), torch.float32, seed=s) for s in range(3)]
    expected = mk.variance_mask(xs, 0.5, backend="cpu")
    monkeypatch.setenv("MERGEKERN_THREADS", threads)
    got = mk.variance_mask(xs, 0.5, backend="cpu")
    assert got.squares == expected.squares
    assert got.mask is not None
    assert expected.mask is not None
    assert torch.equal(got.mask.bits, expected.mask.bits)


def test_agrees_with_the_reference(backend: str, device: str) -> None:
    *xs, base = Case(shape=(5, 23), values="mixed", n=4).tensors(device)
    got = mk.variance_mask(xs, 0.5, base=base, backend=backend)
    bits = torch.zeros((base.numel() + 7) // 8, dtype=torch.uint8)
    plain = [x.cpu() for x in xs]
    threshold = Threshold(*reference.variance_threshold(plain, base.cpu(), 0.5))
    reference.variance_mask(bits, plain, base.cpu(), threshold)
    assert got.mask is not None
    assert torch.equal(got.mask.bits.cpu(), bits)


def test_refusals() -> None:
    x = torch.ones(3)
    with refused(OP, "xs is empty"):
        mk.variance_mask([], 0.5)
    with refused(OP, "share is not finite"):
        mk.variance_mask([x], math.nan)
    with refused(OP, "base differs from xs[0] in shape"):
        mk.variance_mask([x], 0.5, base=torch.ones(4))
