"""covariance: within the derived bound of exact moments, symmetric, the same bits every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mergekern as mk
from mergekern.check import name_of

import cases
from accuracy import assert_bits_equal, assert_within
from cases import values
from moments import (
    DTYPES,
    FEW,
    assert_same,
    bound,
    correlation_bound,
    exact,
    exact_correlation,
    mean_bound,
    means,
    pair,
    rows,
    snapshot,
    variance,
)
from serving import affordable_shape, on_host

OP = "covariance"
pytestmark = FEW


# ---- numbers ---------------------------------------------------------------------------------

# A panel holds 48 features (24 in float64) in vectors of up to 16 (8), a tile 8; partial sums 256
# rows, chunks 1024.
SIZES = [
    *((n, 5) for n in (1, 2, 7, 8, 9, 255, 256, 257, 1023, 1024, 1025, 2600)),
    *((300, d) for d in (1, 2, 7, 8, 9, 16, 17, 23, 24, 25, 33, 47, 48, 49, 64, 96, 97, 131)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_near_the_oracle(n: int, d: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x = rows(n, d, dtype)
    got = mk.covariance(x.to(device), backend=backend)
    assert got.dtype == torch.float64
    assert_bits_equal(got, got.T)
    assert_within(got, exact(x), bound(x, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("n", "d", "e"), [(1, 1, 1), (300, 49, 7), (1300, 7, 121), (257, 24, 48)])
def test_pairs_near_the_oracle(
    n: int, d: int, e: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    x, y = pair(n, d, e, dtype)
    moments = mk.Covariance(d, e, device=device, backend=backend)
    moments.update(x.to(device), y.to(device))
    assert_within(moments.covariance(), exact(x, y), bound(x, y, backend))
    for got, v in ((moments.variance_x, x), (moments.variance_y, y)):
        assert_within(got, variance(v), bound(v, backend=backend).diagonal())
    for got, v in ((moments.mean_x, x), (moments.mean_y, y), (moments.mean, x)):
        assert_within(got, means(v), mean_bound(v))


def test_a_side_with_itself_is_the_covariance(backend: str, device: str) -> None:
    x = rows(1500, 50).to(device)
    got = mk.covariance(x, x.clone(), backend=backend)
    assert_bits_equal(got.triu(), mk.covariance(x, backend=backend).triu())


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(700, 33), (5, 1, 60, 50), (3, 7, 1), (2, 3, 5)], ids=str)
def test_layouts(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, backend: str, device: str
) -> None:
    x = cases.LAYOUTS[layout](values(shape, dtype).to(device))
    got = mk.covariance(x, backend=backend)
    assert_within(got, exact(x), bound(x, backend=backend))
    if backend == "cpu":
        assert_bits_equal(got, mk.covariance(x.contiguous(), backend=backend))
    other = values((x.shape[:-1].numel(), 3), dtype, seed=1).to(device)
    assert_within(
        mk.covariance(x, other, backend=backend), exact(x, other), bound(x, other, backend)
    )


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.FINITE_VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_values(kind: str, dtype: torch.dtype, backend: str, device: str) -> None:
    x = values((530, 29), dtype, kind)
    got = mk.covariance(x.to(device), backend=backend)
    assert_within(got, exact(x), bound(x, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name_of)
def test_huge_values_stay_in_range(dtype: torch.dtype, backend: str, device: str) -> None:
    """Their squares are beyond float32, and in pairs with tiny ones below it."""
    x = torch.cat([values((530, 9), dtype, "huge"), values((530, 9), dtype, "tiny")], 1)
    got = mk.covariance(x.to(device), backend=backend)
    assert_within(got, exact(x), bound(x, backend=backend))
    expected, limit = exact_correlation(x), correlation_bound(x, backend=backend)
    assert_within(mk.correlation(x.to(device), backend=backend), expected, limit)


def test_squares_beyond_float64_are_not_finite(backend: str, device: str) -> None:
    x = values((40, 3), torch.float64, "huge").to(device)
    assert not mk.covariance(x, backend=backend).isfinite().any()


@pytest.mark.parametrize("ratio", [1, 100, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_a_large_mean_costs_nothing(
    dtype: torch.dtype, ratio: int, backend: str, device: str
) -> None:
    shape = affordable_shape(backend, (9000, 9))
    x = (values(shape, torch.float64) + ratio).to(dtype)
    expected, limit = exact_correlation(x), correlation_bound(x, backend=backend)
    got = mk.correlation(x.to(device), backend=backend)
    assert_within(got, expected, limit.clamp(max=1e-6))


def test_a_mean_between_two_floats(backend: str, device: str) -> None:
    """Its rounding is half of a standard deviation."""
    steps = torch.randint(0, 4, (500, 9), generator=torch.Generator().manual_seed(0)).float()
    x, y = (steps + 16_777_000).split([5, 4], 1)
    near = steps.split([5, 4], 1)
    got = mk.covariance(x.to(device), backend=backend)
    assert_within(got, exact(near[0]), bound(near[0]))
    moments = mk.Covariance(5, 4, device=device, backend=backend)
    moments.update(x.to(device), y.to(device))
    assert_within(moments.covariance(), exact(*near), bound(*near))
    variances = torch.cat([moments.variance_x, moments.variance_y])
    assert_within(variances, variance(steps), bound(steps).diagonal())


def test_sums_are_promoted(backend: str, device: str) -> None:
    """Squares that a float32 of the sum before would lose."""
    x = torch.tensor([1.0, -1.0]).repeat(512)[:, None]
    x[256:] *= 2.0**-13
    got = mk.covariance(x.to(device), backend=backend).item()
    assert got == (256 + 768 * 2.0**-26) / 1024


def test_a_mean_that_drifts(backend: str, device: str) -> None:
    """Chunks whose means are far apart, as of sorted data."""
    x = torch.linspace(-1e4, 1e4, 5000)[:, None] + values((5000, 9), torch.float32)
    got = mk.covariance(x.to(device), backend=backend)
    assert_within(got, exact(x), bound(x, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_constant_features_have_variance_0(dtype: torch.dtype, backend: str, device: str) -> None:
    x = rows(3000, 7, dtype).to(device)
    x[:, 2], x[:, 5] = 0.1, -3e4
    moments = mk.Covariance(7, device=device, backend=backend)
    for part in x.split(1100):
        moments.update(part)
    dead = torch.zeros(7, dtype=torch.float64)
    for matrix in (moments.covariance(), moments.correlation(), moments.correlation(1e-7)):
        assert_bits_equal(matrix[2].abs(), dead)
        assert_bits_equal(matrix[:, 5].abs(), dead)
    assert_bits_equal(moments.mean[[2, 5]], x[0, [2, 5]].double())


# ---- correlation -----------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-7, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_correlation(dtype: torch.dtype, eps: float, backend: str, device: str) -> None:
    n, d = affordable_shape(backend, (1300, 30))
    x, y = pair(n, d, 51, dtype)
    got = mk.correlation(x.to(device), eps=eps, backend=backend)
    assert_bits_equal(got, got.T)
    assert_within(got, exact_correlation(x, eps=eps), correlation_bound(x, backend=backend))
    if not eps:
        assert_bits_equal(got.diagonal(), torch.ones(d, dtype=torch.float64))
    got = mk.correlation(x.to(device), y.to(device), eps=eps, backend=backend)
    expected, limit = exact_correlation(x, y, eps), correlation_bound(x, y, backend)
    assert_within(got, expected, limit)


def test_equal_features_tie(cpu_backend: Any) -> None:
    """Wherever they lie in panels and tiles, so that a matching sees equal scores."""
    x = rows(1500, 100)
    x[:, [3, 60, 99]] = x[:, [50]]
    got = mk.covariance(x, backend="cpu")
    for i in (3, 60, 99):
        others = torch.ones(100, dtype=torch.bool)
        others[[3, 50, 60, 99]] = False
        assert_bits_equal(got[i, others], got[50, others])
        assert_bits_equal(got[i, i], got[50, 50])
        assert_bits_equal(got[i, 50], got[50, 50])


def test_correlation_is_clipped(backend: str, device: str) -> None:
    x = rows(400, 1).to(device) * torch.linspace(-2, 2, 60, device=device)
    got = mk.correlation(x, backend=backend)
    assert bool((got.abs() <= 1).all())


# ---- bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(
    threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, d = (300, 200) if on_host(backend) else (2600, 200)
    x, y = (v.to(device) for v in pair(n, d, 101))
    monkeypatch.setenv("MERGEKERN_THREADS", "1")
    once = mk.covariance(x, backend=backend), mk.correlation(x, y, backend=backend)
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    for _ in range(3):
        assert_bits_equal(mk.covariance(x, backend=backend), once[0])
        assert_bits_equal(mk.correlation(x, y, backend=backend), once[1])


def test_chunks(cpu_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any length within the bound; how pairs of panels are dealt out changes no bits."""
    from mergekern.backends.cpu import covariance as module

    x = rows(2600, 110)
    once, expected, limit = mk.covariance(x, backend="cpu"), exact(x), bound(x)
    monkeypatch.setattr(module, "_PAIRS", 1)
    assert_bits_equal(mk.covariance(x, backend="cpu"), once)
    for longest, packed in ((256, 1 << 24), (4096, 1 << 24), (1024, 0)):
        monkeypatch.setattr(module, "_LONGEST", longest)
        monkeypatch.setattr(module, "_PACKED", packed)
        assert_within(mk.covariance(x, backend="cpu"), expected, limit)


def test_inputs_are_not_written(backend: str, device: str) -> None:
    x, y = (v.to(device) for v in pair(300, 30, 11))
    copies = x.clone(), y.clone()
    mk.covariance(x, y, nan="zero", backend=backend)
    assert_bits_equal(x, copies[0])
    assert_bits_equal(y, copies[1])


def test_results_are_not_the_accumulators(backend: str, device: str) -> None:
    moments = mk.Covariance(5, device=device, backend=backend)
    moments.update(rows(300, 5).to(device))
    before = snapshot(moments)
    for result in (moments.mean, moments.variance_x, moments.covariance(), moments.correlation()):
        result.fill_(7)
    assert_same(snapshot(moments), before)


def test_requires_grad_is_no_obstacle(backend: str, device: str) -> None:
    x = rows(30, 3).to(device).requires_grad_()
    assert not mk.covariance(x, backend=backend).requires_grad
