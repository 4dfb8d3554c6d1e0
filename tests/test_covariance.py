"""covariance: within the derived bound of exact moments, symmetric, the same bits every time."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergekern as mk
from mergekern.check import name_of

import cases
import zipit
from accuracy import assert_bits_equal, assert_within
from cases import values
from refusal import refused
from serving import affordable_shape, in_turn, on_host

OP = "covariance"
DTYPES = cases.DTYPES


FEW = pytest.mark.filterwarnings("ignore:covariance. fewer rows than features")
pytestmark = FEW  # one test is about the warning


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


# ---- maps of images ----------------------------------------------------------------------------


def every_other(axis: int) -> Any:
    """Of larger maps that are NaN elsewhere."""

    def view(x: Tensor) -> Tensor:
        sizes = list(x.shape)
        sizes[axis] *= 2
        larger = torch.full(sizes, math.nan, dtype=x.dtype, device=x.device)
        chosen = larger[(slice(None),) * axis + (slice(None, None, 2),)]
        return chosen.copy_(x)

    return view


MAP_LAYOUTS = cases.LAYOUTS | {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    **{f"every other of axis {axis}": every_other(axis) for axis in range(4)},
}
# Channels as features lie H W apart. Their rows, of which 8 are read together, are next to each
# other as far as an image goes.
MAPS = [
    *((3, 20, h, w) for h, w in ((1, 1), (1, 7), (2, 4), (3, 3), (7, 7), (9, 11), (4, 16))),
    *((2, c, 5, 7) for c in (1, 7, 8, 9, 47, 49, 65)),
    (23, 5, 7, 7),
]


@pytest.mark.parametrize("layout", MAP_LAYOUTS)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_maps(shape: tuple[int, ...], layout: str, backend: str, device: str) -> None:
    turn = MAPS.index(shape) + list(MAP_LAYOUTS).index(layout)
    for dtype in in_turn(backend, DTYPES, turn):
        x = MAP_LAYOUTS[layout](values(shape, dtype).to(device)).movedim(1, -1)
        y = values((x.shape[:-1].numel(), 3), dtype, seed=1).to(device)
        found = []
        for v in (x, x.contiguous()) if backend == "cpu" else (x,):
            found.append(mk.Covariance(x.shape[-1], 3, device=device, backend=backend))
            found[-1].update(v, y)
            assert_same(snapshot(found[-1]), snapshot(found[0]))
        assert_within(found[0].covariance(), exact(x, y), bound(x, y, backend))


@pytest.mark.parametrize("shape", [(5, 20, 7, 7), (3, 65, 9, 11), (20, 3, 2, 2)], ids=str)
def test_maps_with_a_mask(shape: tuple[int, ...], backend: str, device: str) -> None:
    """Short and long runs of rows count; what lies between them is NaN, and is not looked at."""
    g = torch.Generator().manual_seed(0)
    for share in (0.1, 0.5, 0.9, 0.99):
        x = values(shape, torch.float32)
        mask = torch.rand(shape[0], *shape[2:], generator=g) < share
        x = torch.where(mask[:, None], x, math.nan).to(device).movedim(1, -1)
        got = mk.covariance(x, mask=mask.to(device), backend=backend)
        assert_bits_equal(got, mk.covariance(x[mask], backend=backend))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_maps_that_are_not_finite(
    dtype: torch.dtype, bad: float, backend: str, device: str
) -> None:
    x = values((3, 20, 7, 7), dtype).to(device)
    x[1, 19, 6, 6] = x[2, 0, 0, 0] = bad
    with refused(OP, "x has rows with NaN or infinity; got rows 97, 98; expected"):
        mk.covariance(x.movedim(1, -1), backend=backend)
    got = mk.covariance(x.movedim(1, -1), nan="zero", backend=backend)
    zeros = x.nan_to_num(0.0, 0.0, 0.0).movedim(1, -1).contiguous()
    if backend == "cpu":
        assert_bits_equal(got, mk.covariance(zeros, backend=backend))
    assert_within(got, exact(zeros), bound(zeros, backend=backend))


GUARDED = """
import ctypes, mmap, torch, mergekern as mk
page, libc = mmap.PAGESIZE, ctypes.CDLL(None)
area = mmap.mmap(-1, 3 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
x = torch.frombuffer(area, dtype=torch.float32, count=page // 4, offset=page).normal_()
for guard in (start, start + 2 * page):
    assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
for channels in (1, 3, 8, 20):
    for pixels in (2, 4, 5, 7, 12):
        n = channels * pixels
        for part in (x[:n], x[-n:]):
            rows = part.view(channels, pixels).T.expand(3, pixels, channels)
            got = mk.covariance(rows, backend="cpu")
            assert torch.equal(got, mk.covariance(rows.contiguous(), backend="cpu"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
def test_nothing_outside_of_maps_is_read(cpu_backend: Any) -> None:
    """The pages around them are out of bounds; one image is seen three times."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", GUARDED], capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()


# ---- several tensors side by side --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("widths", [(1, 1), (64, 64), (47, 1, 50), (5, 100, 3)], ids=str)
def test_tensors_side_by_side_are_one(
    widths: tuple[int, ...], dtype: torch.dtype, backend: str, device: str
) -> None:
    """Of different layouts and shapes, on one side or on both, in panels that they share."""
    size = (5, 7) if on_host(backend) else (23, 29)
    maps = [values((2, w, *size), dtype, seed=i).to(device) for i, w in enumerate(widths)]
    xs = [x.movedim(1, -1) for x in maps]
    xs[1] = xs[1].reshape(-1, widths[1])
    whole = torch.cat([x.reshape(-1, x.shape[-1]) for x in xs], -1)
    y = values((len(whole), 9), dtype, seed=9).to(device)
    mask = torch.arange(len(whole), device=device) % 5 > 0
    for chosen in (None, mask):
        for given_, expected in (
            ((xs,), (whole,)),
            ((tuple(xs), y), (whole, y)),
            (([y], xs), (y, whole)),
            ((xs, xs[1:]), (whole, whole[:, widths[0] :])),
        ):
            found = []
            for sides, plain in ((given_, expected), (expected, expected)):
                dims = [v.shape[-1] for v in plain]
                found.append(mk.Covariance(*dims, device=device, backend=backend))
                found[-1].update(*sides, mask=chosen)
            assert_same(snapshot(found[0]), snapshot(found[1]))


def test_parts_in_a_panel_that_begins_within_a_tensor(backend: str, device: str) -> None:
    """One row of the features from 128 on is far from their mean, and takes more than 8 bits."""
    x, y = values((600, 100), torch.bfloat16), values((600, 60), torch.bfloat16, seed=1)
    y[:, 28:] = (300 + 8 * y[:, 28:].double()).to(torch.bfloat16)
    y[17, 28:] = 129 / 2**14
    moments = mk.Covariance(160, device=device, backend=backend)
    moments.update([x.to(device), y.to(device)])
    whole = torch.cat([x, y], 1)
    assert_within(moments.covariance(), exact(whole), bound(whole, backend=backend))


def test_nan_in_one_of_several_tensors(backend: str, device: str) -> None:
    xs = [rows(300, 5).to(device), rows(300, 50, seed=1).to(device)]
    moments = mk.Covariance(55, device=device, backend=backend)
    moments.update(xs)
    before = snapshot(moments)
    xs[0][[3, 7], 1] = math.nan
    xs[1][[5, 7], 49] = math.inf
    with refused(OP, "x has rows with NaN or infinity; got rows 3, 5, 7; expected"):
        moments.update(xs)
    assert_same(snapshot(moments), before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_of_tensors_side_by_side_do_not_depend_on_threads(
    threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    xs = [values((3, w, 23, 29), torch.float32).to(device).movedim(1, -1) for w in (64, 101)]
    found = []
    for count in (1, threads):
        monkeypatch.setenv("MERGEKERN_THREADS", str(count))
        found.append(mk.Covariance(165, 101, device=device, backend=backend))
        found[-1].update(xs, xs[1])
    assert_same(snapshot(found[1]), snapshot(found[0]))


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


# ---- saving ------------------------------------------------------------------------------------


def snapshot(moments: mk.Covariance) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in moments.state_dict().items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert_bits_equal(got[name], t)


@pytest.mark.parametrize("dim_y", [None, 4])
def test_state(dim_y: int | None, backend: str, device: str, tmp_path: Path) -> None:
    x, y = (v.to(device) for v in pair(700, 5, 4))
    batch = (x, y) if dim_y else (x,)
    whole, half = (mk.Covariance(5, dim_y, device=device, backend=backend) for _ in range(2))
    whole.update(*batch)
    half.update(*batch)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    other = mk.Covariance(5, dim_y, device=device, backend=backend)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_same(other.state_dict(), half.state_dict())
    for moments in (whole, other):
        moments.update(*batch)
    assert_same(other.state_dict(), whole.state_dict())
    assert_bits_equal(other.correlation(), whole.correlation())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": torch.tensor(-1)}, "count is negative; got -1; expected 0 or more"),
        ({"count": torch.tensor(1.0)}, "count does not fit"),
        ({"mean_x": torch.zeros(4, dtype=torch.float64)}, "mean_x does not fit"),
        ({"products": torch.zeros(3, 3)}, "products does not fit"),
        ({"more": torch.zeros(1)}, "state has other names"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit(change: dict[str, Tensor], words: str) -> None:
    moments = mk.Covariance(3)
    moments.update(rows(5, 3))
    before = snapshot(moments)
    with refused(OP, words):
        moments.load_state_dict({**before, **change})
    assert_same(snapshot(moments), before)


# ---- the door ----------------------------------------------------------------------------------


def test_fewer_rows_than_features_warn_once(backend: str, device: str) -> None:
    moments = mk.Covariance(3, device=device, backend=backend)
    moments.update(rows(2, 3).to(device))
    with pytest.warns(UserWarning, match=r"covariance: fewer rows .*; got 2; expected 3 or more"):
        moments.correlation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moments.covariance()
        moments.update(rows(2, 3).to(device))
        moments.correlation()


X, Y = torch.zeros(4, 3), torch.zeros(4, 2)
REFUSALS: dict[str, tuple[Any, str]] = {
    "no rows": (lambda: mk.covariance(X[:0]), "there are no rows; got 0; expected at least one"),
    "no mean": (lambda: mk.Covariance(3).mean, "there are no rows"),
    "no variance": (lambda: mk.Covariance(3, 2).variance_y, "there are no rows"),
    "vector": (lambda: mk.covariance(X[0]), "x has no rows; got (3,); expected [..., features]"),
    "no features": (lambda: mk.covariance(X[:, :0]), "x has no features"),
    "integers": (lambda: mk.covariance(X.int()), "int32"),
    "list": (lambda: mk.covariance([X]), "x is no tensor; got list"),
    "empty list": (lambda: mk.Covariance(3).update([]), "x is an empty list; got 0; expected one"),
    "no tensor in a list": (
        lambda: mk.Covariance(3, 3).update(X, [X, 1]),
        "y[1] is no tensor; got int",
    ),
    "features of a list": (
        lambda: mk.Covariance(3).update([X, Y]),
        "x has another number of features; got 5; expected 3",
    ),
    "rows of a list": (
        lambda: mk.Covariance(5).update([X, Y[1:]]),
        "x differs from x in rows; got 3; expected 4",
    ),
    "dtypes of a list": (
        lambda: mk.Covariance(5).update([X, Y.half()]),
        "x differs from x in dtype; got float16; expected float32",
    ),
    "meta": (lambda: mk.covariance(X.to("meta")), "meta"),
    "dim": (lambda: mk.Covariance(0), "dim_x is no number of features; got 0; expected 1 or more"),
    "dim type": (lambda: mk.Covariance(3, 2.0), "dim_y is no number of features; got 2.0"),
    "nan": (lambda: mk.covariance(X, nan="drop"), "nan is unknown; got 'drop'"),
    "y missing": (lambda: mk.Covariance(3, 2).update(X), "y does not fit dim_y; got no y"),
    "y not asked for": (lambda: mk.Covariance(3).update(X, Y), "y does not fit dim_y; got y"),
    "features": (
        lambda: mk.Covariance(4).update(X),
        "x has another number of features; got 3; expected 4",
    ),
    "features of y": (lambda: mk.Covariance(3, 3).update(X, Y), "y has another number of features"),
    "rows": (lambda: mk.covariance(X, Y[1:]), "y differs from x in rows; got 3; expected 4"),
    "dtypes": (lambda: mk.covariance(X, Y.half()), "y differs from x in dtype; got float16"),
    "mask dtype": (lambda: mk.covariance(X, mask=torch.ones(4)), "mask is not bool; got float32"),
    "mask size": (
        lambda: mk.covariance(X, mask=torch.ones(3, dtype=torch.bool)),
        "mask does not fit the rows; got (3,); expected (4,)",
    ),
    "mask shape": (
        lambda: mk.covariance(X.view(2, 2, 3), mask=torch.ones(1, 4, dtype=torch.bool)),
        "mask does not fit the rows; got (1, 4); expected (2, 2) or (4,)",
    ),
    "mask of none": (
        lambda: mk.covariance(X, mask=torch.zeros(4, dtype=torch.bool)),
        "there are no rows",
    ),
    "eps": (lambda: mk.correlation(X, eps=-1.0), "eps is negative; got -1.0; expected 0 or more"),
    "eps type": (lambda: mk.correlation(X, eps="x"), "eps is no number"),
    "other": (lambda: mk.Covariance(3).merge(X), "other is none; got Tensor"),
    "other's sizes": (
        lambda: mk.Covariance(3).merge(mk.Covariance(3, 3)),
        "other differs in sizes; got [3, 3]; expected [3]",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    call, words = REFUSALS[what]
    with refused(OP, words):
        call()


def test_a_backend_that_cannot_serve_is_refused_at_once() -> None:
    with refused(OP, "no such backend", error=mk.BackendError, sentence=False):
        mk.Covariance(3, backend="abacus")


@pytest.mark.parametrize("kernel", ["column_means", "center", "pack", "add_products"])
def test_the_kernel_is_the_compiled_one(
    kernel: str, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("this kernel was called")

    monkeypatch.setattr(cpu_backend._cpu, kernel, broken)
    with pytest.raises(RuntimeError, match="this kernel was called"):
        mk.covariance(X, backend="cpu")


# ---- ZipIt -------------------------------------------------------------------------------------


def host_bound(features: Tensor, n: int) -> Tensor:
    """Of E[xy] - E[x] E[y] in float32: n products and sums, and a few steps after."""
    largest = features.abs().amax(1).double()
    return (2 * n + 16) * 2.0**-24 * torch.outer(largest, largest)


@zipit.needed
def test_the_original_of_zipit(monkeypatch: pytest.MonkeyPatch) -> None:
    """CovarianceMetric and compute_correlation, on batches with NaN, over all models' features."""
    monkeypatch.syspath_prepend(zipit.checkout())
    host = importlib.import_module("metric_calculators")
    metric, moments = host.CovarianceMetric(), mk.Covariance(40, nan="zero")
    batches = [[rows(320, 20, seed=2 * i + model).T for model in (0, 1)] for i in range(4)]
    for batch in batches:
        batch[0][3, 5], batch[1][7, 9] = math.nan, math.inf
        batch[0][11] = 0.5
        metric.update(10, *batch)
        moments.update(torch.cat(batch).T)
    expected = metric.finalize(40)
    features = torch.cat([torch.cat(b) for b in batches], 1).nan_to_num(0.0, 0.0, 0.0)
    limit = host_bound(features, features.shape[1])
    assert_within(moments.covariance(), expected.double(), limit)
    varying = torch.arange(40) != 11
    got = moments.correlation(eps=1e-7)[varying][:, varying]
    correlation = host.compute_correlation(expected)[varying][:, varying].double()
    variance = moments.variance_x[varying]
    relative = (limit[varying][:, varying] / torch.outer(variance.sqrt(), variance.sqrt())).max()
    assert_within(got, correlation, 2.1 * relative)
