"""covariance in parts: masks, rows that are not finite, batches and merges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekern as mk
from mergekern.check import name_of

from accuracy import assert_bits_equal, assert_within
from cases import values
from moments import DTYPES, FEW, assert_same, bound, exact, mean_bound, means, pair, rows, snapshot
from refusal import refused
from serving import affordable_shape

OP = "covariance"
pytestmark = FEW


# ---- rows that do not count --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_mask(dtype: torch.dtype, backend: str, device: str) -> None:
    x, y = (v.to(device).view(4, 350, -1) for v in pair(1400, 30, 51, dtype))
    mask = torch.arange(350, device=device) < torch.tensor([[300], [1], [350], [0]], device=device)
    x = torch.where(mask[..., None], x, math.nan)  # what is left out is not looked at
    kept = x[mask], y[mask]
    for given_ in (mask, mask.reshape(-1)):
        got = mk.covariance(x, mask=given_, backend=backend)
        assert_bits_equal(got, mk.covariance(kept[0], backend=backend))
        got = mk.correlation(x, y, mask=given_, backend=backend)
        assert_bits_equal(got, mk.correlation(*kept, backend=backend))
    moments = mk.Covariance(30, device=device, backend=backend)
    moments.update(x, mask=mask)
    assert moments.count == 651


def test_a_numpy_mask_and_numpy_rows(backend: str, device: str) -> None:
    x, mask = rows(50, 3), torch.arange(50) % 3 > 0
    got = mk.covariance(x.numpy(), mask=mask.numpy(), backend=backend)
    assert_bits_equal(got, mk.covariance(x[mask], backend=backend))


def test_no_rows_add_nothing(backend: str, device: str) -> None:
    moments = mk.Covariance(3, device=device, backend=backend)
    moments.update(rows(9, 3).to(device))
    before = snapshot(moments)
    moments.update(torch.zeros(0, 3, device=device))
    moments.update(torch.ones(4, 3, device=device), mask=torch.zeros(4, dtype=torch.bool))
    assert_same(snapshot(moments), before)


# ---- NaN and infinities ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_not_finite_is_refused_and_nothing_added(
    dtype: torch.dtype, bad: float, backend: str, device: str
) -> None:
    n, d = affordable_shape(backend, (2500, 30))
    x, y = (v.to(device) for v in pair(n, d, 5, dtype))
    for clean, moments in (
        ((x,), mk.Covariance(d, device=device, backend=backend)),
        ((x, y), mk.Covariance(d, 5, device=device, backend=backend)),
    ):
        moments.update(*clean)
        before = snapshot(moments)
        spoilt = [v.clone() for v in clean]
        spoilt[-1][[7, n - 1], [0, 4]] = bad
        name = "xy"[len(clean) - 1]
        with refused(OP, f"{name} has rows with NaN or infinity; got rows 7, {n - 1}; expected"):
            moments.update(*spoilt)
        assert_same(snapshot(moments), before)


def test_many_rows_that_are_not_finite(backend: str, device: str) -> None:
    x = rows(600, 3).to(device)
    x[3::5] = math.inf
    mask = torch.arange(600, device=device) >= 10
    with refused(OP, "got rows 13, 18, 23, 28, 33 and 113 more; expected"):
        mk.covariance(x, mask=mask, backend=backend)
    with refused(OP, "got rows 3, 8, 13, 18, 23 and 115 more; expected"):
        mk.covariance(x.view(20, 30, 3), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_as_zero(dtype: torch.dtype, backend: str, device: str) -> None:
    x, y = values((1100, 30), dtype, "mixed"), values((1100, 7), dtype, "nan")
    x, y = (torch.where(v.abs() < 1e4, v, v * 0 if v is y else v).to(device) for v in (x, y))
    if dtype == torch.float64:
        x = torch.where(x.abs() == torch.finfo(dtype).max, 1.0, x)  # has no square
    host = [v.nan_to_num(0.0, 0.0, 0.0) for v in (x, y)]
    for n in (1, 2):
        got = mk.covariance(*(x, y)[:n], nan="zero", backend=backend)
        assert_bits_equal(got, mk.covariance(*host[:n], backend=backend))
        assert got.isfinite().all()


# ---- batches and merges ------------------------------------------------------------------------


@pytest.mark.parametrize("dim_y", [None, 11])
def test_batches(dim_y: int | None, backend: str, device: str) -> None:
    """Of any sizes and dtypes, around the size of a chunk."""
    x, y = pair(5003, 30, 11, torch.bfloat16)
    moments = mk.Covariance(30, dim_y, device=device, backend=backend)
    at = 0
    for i, n in enumerate((1, 1024, 255, 0, 2500, 7, 1216)):
        batch = [v[at : at + n].to(device, DTYPES[i % 4]) for v in (x, y)[: 1 + bool(dim_y)]]
        # bfloat16 values are exact in float32 and float64; float16 takes 11 of their bits and more
        moments.update(*batch)
        at += n
    assert at == moments.count == 5003
    other = y if dim_y else None
    got, limit = moments.covariance(), bound(x, other, backend)
    assert_within(got, exact(x, other), limit)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 400), min_size=2, max_size=6),
    order=st.randoms(use_true_random=False),
    offset=st.sampled_from([0.0, 100.0, -1e4]),
    paired=st.booleans(),
)
def test_merging_is_associative(sizes: list[int], order: Any, offset: float, paired: bool) -> None:
    """Any tree of merges, in any order, within the bound of the whole."""
    total = max(1, sum(sizes))
    sizes = sizes if sum(sizes) else [1, *sizes]
    x = (values((total, 5), torch.float64) + offset).float()
    y = (x[:, :3] * 2 + values((total, 3), torch.float32, seed=1)) if paired else None
    dims = (5, 3) if paired else (5,)
    parts = []
    at = 0
    for n in sizes:
        parts.append(mk.Covariance(*dims))
        parts[-1].update(*(v[at : at + n] for v in (x, y) if v is not None))
        at += n
    while len(parts) > 1:
        into = parts.pop(order.randrange(len(parts)))
        other = parts.pop(order.randrange(len(parts)))
        before = snapshot(other)
        into.merge(other)
        assert_same(snapshot(other), before)
        parts.append(into)
    assert parts[0].count == total
    assert_within(parts[0].covariance(), exact(x, y), bound(x, y))
    assert_within(parts[0].mean, means(x), mean_bound(x))


def test_merging_with_itself_and_with_nothing(backend: str, device: str) -> None:
    x = rows(300, 5)
    moments = mk.Covariance(5, device=device, backend=backend)
    moments.update(x.to(device))
    once = moments.covariance()
    moments.merge(mk.Covariance(5, device=device))
    assert_bits_equal(moments.covariance(), once)
    moments.merge(moments)
    assert moments.count == 600
    assert_bits_equal(moments.covariance(), once)
    fresh = mk.Covariance(5, device=device)
    fresh.merge(moments)
    assert_bits_equal(fresh.covariance(), once)
