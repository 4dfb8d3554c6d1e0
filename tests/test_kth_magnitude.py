"""kth_magnitude: exact, whatever the data; every path is reached in test_kth_magnitude_paths.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import mergekern as mk
from mergekern import Threshold, reference
from mergekern.check import name_of
from mergekern.ops.kth_magnitude import kth_magnitudes

import cases
from cases import CATALOGUE, CHUNK, Case, values
from magnitudes import HARD, SMALL, Brute, assert_exact, problems, ranks
from refusal import refused
from serving import affordable

OP = "kth_magnitude"


# ---- the catalogue ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CATALOGUE if math.prod(c.shape) and c.n == 3], ids=str)
def test_catalogue(case: Case, backend: str, device: str) -> None:
    x, base, _ = case.tensors(device)
    for origin in (None, base):
        brute = Brute(x, origin)
        for k in ranks(x.numel()):
            brute.check(mk.kth_magnitude(x, k, base=origin, backend=backend), k)


@pytest.mark.parametrize("values_", cases.VALUES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_agrees_with_the_reference(
    dtype: torch.dtype, values_: str, backend: str, device: str
) -> None:
    x, base = Case(shape=(23,), dtype=dtype, values=values_, n=2).tensors(device)
    for b in (None, base):
        for k in range(1, 24):
            value, above, equal, cut = mk.kth_magnitude(x, k, base=b, backend=backend)
            origin = None if b is None else b.cpu()
            ((expected,),) = reference.kth_magnitude([x.cpu()], origin, [[k]])
            assert repr((value, above, equal)) == repr(expected[:3])
            assert cut == expected[3] or equal == k - above


@pytest.mark.parametrize("based", [False, True], ids=["alone", "base"])
@pytest.mark.parametrize("kind", cases.VALUES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_above_the_small_size(
    dtype: torch.dtype, kind: str, based: bool, backend: str, device: str
) -> None:
    x, y = Case(shape=(SMALL + 7,), dtype=dtype, values=kind, n=2).tensors(device)
    base = y if based else None
    brute = Brute(x, base)
    for k in (1, 3000, SMALL // 2, SMALL + 7):
        brute.check(mk.kth_magnitude(x, k, base=base, backend=backend), k)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_layouts_above_the_small_size(
    dtype: torch.dtype, layout: str, backend: str, device: str
) -> None:
    x, base = Case(shape=(37, 10, 101), dtype=dtype, layout=layout, n=2).tensors(device)
    assert_exact(mk.kth_magnitude(x, 7000, backend=backend), x, 7000)
    got = mk.kth_magnitude(x, 7000, base=base.contiguous(), backend=backend)
    assert_exact(got, x, 7000, base)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_sizes_around_the_small_one_and_a_chunk(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    for n in (SMALL - 1, SMALL, SMALL + 1, CHUNK - 1, CHUNK, CHUNK + 1):
        x = values((n,), dtype, "ties").to(device)
        assert_exact(mk.kth_magnitude(x, n // 3, backend=backend), x, n // 3)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_threads_change_nothing(
    dtype: torch.dtype, threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    x = values((CHUNK + 17,), dtype, "mixed").to(device)
    k = x.numel() // 5
    assert_exact(mk.kth_magnitude(x, k, backend=backend), x, k)


# ---- ties, NaN, zeros ------------------------------------------------------------------------


def test_exactly_k_are_kept_and_the_lowest_index_goes_first(backend: str, device: str) -> None:
    x = torch.tensor([2.0, -1.0, 3.0, 1.0, -2.0, 1.0], device=device)
    kept = {1: [2], 2: [0, 2], 3: [0, 2, 4], 4: [0, 1, 2, 4], 5: [0, 1, 2, 3, 4]}
    for k, expected in kept.items():
        got = mk.kth_magnitude(x, k, backend=backend)
        assert Brute(x).survivors(got).tolist() == expected
    assert mk.kth_magnitude(x, 4, backend=backend) == Threshold(1.0, 3, 3, 2)


def test_nan_ranks_above_infinity(backend: str, device: str) -> None:
    x = torch.tensor([1.0, math.nan, -math.inf, -math.nan, 5.0], device=device)
    first, second, third = (mk.kth_magnitude(x, k, backend=backend) for k in (1, 2, 3))
    assert math.isnan(first.value)
    assert first[1:] == (0, 2, 2)
    assert math.isnan(second.value)
    assert second[1:3] == (0, 2)
    assert third[:3] == (math.inf, 2, 1)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_every_nan_equals_every_other(dtype: torch.dtype, backend: str, device: str) -> None:
    """Payload and sign make no difference, in the kernel's trim either."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    infinity = torch.tensor(math.inf, dtype=dtype).view(width)
    bits = torch.stack([infinity + 1, infinity + 5, infinity | 1, infinity, infinity - 1])
    x = torch.cat([bits.view(dtype), -bits.view(dtype)]).to(device)
    for k in range(1, 11):
        assert_exact(mk.kth_magnitude(x, k, backend=backend), x, k)


def test_zeros_of_both_signs_tie_and_the_value_is_plus_0(backend: str, device: str) -> None:
    x = torch.tensor([-0.0, 0.0, -0.0], device=device)
    for k in (1, 2, 3):
        got = mk.kth_magnitude(x, k, backend=backend)
        assert got[1:3] == (0, 3)
        assert math.copysign(1, got.value) == 1
        assert Brute(x).survivors(got).tolist() == list(range(k))


def test_difference_is_taken_in_float32(backend: str, device: str) -> None:
    """1 + 2**-30 - 1 is 0 in float32, and bfloat16 differences need more than 8 bits."""
    x = torch.tensor([1.0, 2.0**-8], device=device).to(torch.bfloat16)
    base = torch.tensor([2.0**-9, 1.0], device=device).to(torch.bfloat16)
    got = mk.kth_magnitude(x, 1, base=base, backend=backend)
    assert got[:3] == (1 - 2.0**-9, 0, 1)
    wide = torch.tensor([2.0**24, 0.5], device=device)
    got = mk.kth_magnitude(wide, 1, base=torch.tensor([-1.0, 0.0], device=device), backend=backend)
    assert got.value == 2.0**24


def test_float64_keys_differ_in_their_lowest_bits(backend: str, device: str) -> None:
    for n in (1000, SMALL + 1000):
        steps = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        x = (torch.tensor(1.5, dtype=torch.float64).view(torch.int64) + steps).view(torch.float64)
        x = x.to(device)
        for k in (1, 17, n // 2, n):
            assert_exact(mk.kth_magnitude(x, k, backend=backend), x, k)


def test_float64_outside_the_range_of_float32(backend: str, device: str) -> None:
    x = torch.tensor([1e300, -1e308, 1e-300, 5e-324, 0.0], dtype=torch.float64, device=device)
    got = [mk.kth_magnitude(x, k, backend=backend).value for k in range(1, 6)]
    assert got == [1e308, 1e300, 1e-300, 5e-324, 0.0]


# ---- properties ------------------------------------------------------------------------------


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(problem=problems())
def test_property_exact(
    problem: tuple[Tensor, Tensor | None, int],
    backend: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with chunks of eight elements, so that ties lie across their borders."""
    x, base, k = problem
    x, base = x.to(device), None if base is None else base.to(device)
    with monkeypatch.context() as patch:
        patch.setattr("mergekern.backends.torch.chunks.CHUNK", 8)
        assert_exact(mk.kth_magnitude(x, k, base=base, backend=backend), x, k, base)


# ---- data that misleads a sample -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("what", HARD)
def test_hard_data(what: str, dtype: torch.dtype, backend: str, device: str) -> None:
    x = torch.from_numpy(HARD[what].copy()).to(dtype).to(device)
    n = x.numel()
    brute = Brute(x)
    for k in (1, 600, n // 5, n - n // 5, n):
        brute.check(mk.kth_magnitude(x, k, backend=backend), k)


def test_hard_data_across_chunks(backend: str, device: str) -> None:
    """Sorted, so that all that lies inside the bracket lies in one chunk."""
    n = 2 * CHUNK + 4321
    x = torch.arange(n, device=device).flip(0) / 4
    brute = Brute(x)
    for k in (1, n // 5, n // 2, n):
        brute.check(mk.kth_magnitude(x, k, backend=backend), k)


@pytest.mark.parametrize("what", ["constant blocks", "one outlier", "equal but few"])
def test_hard_data_of_16_bit_differences(what: str, backend: str, device: str) -> None:
    x = torch.from_numpy(HARD[what].copy()).to(torch.bfloat16).to(device)
    base = torch.from_numpy(HARD["two values"].copy()).to(torch.bfloat16).to(device)
    brute = Brute(x, base)
    for k in (1, x.numel() // 5):
        brute.check(mk.kth_magnitude(x, k, base=base, backend=backend), k)


# ---- several at once -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 300, SMALL + 1, CHUNK + 5])
@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_several_ranks_of_several_models(
    dtype: torch.dtype, rounded: bool, n: int, backend: str, device: str
) -> None:
    """The same as one by one; `rounded` ranks differences that are held in the dtype."""
    n = affordable(backend, n)
    base = values((n,), dtype, seed=8).to(device)
    xs = [(base.float() + 0.01 * values((n,), dtype, seed=i).float()).to(dtype) for i in range(3)]
    ranks = [[1, n], [max(1, n // 3)], [max(1, n // 2), max(1, n // 5), n]]
    found = kth_magnitudes(xs, ranks, base=base, rounded=rounded, backend=backend)
    for x, ks, thresholds in zip(xs, ranks, found, strict=True):
        brute = Brute((x - base) if rounded else x, None if rounded else base)
        assert len(thresholds) == len(ks)
        for k, threshold in zip(ks, thresholds, strict=True):
            brute.check(threshold, k)


@pytest.mark.parametrize("based", [False, True], ids=["alone", "base"])
@pytest.mark.parametrize("kind", ["normal", "ties", "nan", "zeros"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_a_sequence_is_one_vector(
    dtype: torch.dtype, kind: str, based: bool, backend: str, device: str
) -> None:
    shapes = [(7, 5), (), (0,), (3, 4, 2), (1,), (257,)]
    xs = [values(s, dtype, kind, seed=i).to(device) for i, s in enumerate(shapes)]
    bases = [values(s, dtype, kind, seed=9 + i).to(device) for i, s in enumerate(shapes)]
    whole = torch.cat([x.reshape(-1) for x in xs])
    origin = torch.cat([b.reshape(-1) for b in bases]) if based else None
    brute = Brute(whole, origin)
    for k in (1, 17, 200, whole.numel()):
        base = bases if based else None
        threshold = mk.kth_magnitude(xs, k, base=base, backend=backend)
        brute.check(threshold, k)
        first, kept = 0, 0
        for x, b in zip(xs, bases, strict=True):
            part = threshold.from_index(first)
            kept += sum(reference.kept(part, x.cpu(), b.cpu() if based else None))
            first += x.numel()
        assert kept == k


# ---- the door --------------------------------------------------------------------------------


def test_numpy_inputs(backend: str, device: str) -> None:
    x = values((31, 33), torch.float32)
    given_ = x.numpy() if device == "cpu" else x.to(device)
    assert_exact(mk.kth_magnitude(given_, np.int64(100), backend=backend), x, 100)


X = torch.zeros(3)
REFUSALS = {
    "k 0": ((X, 0), {}, "k is out of range; got 0; expected 1 to 3"),
    "k negative": ((X, -1), {}, "k is out of range; got -1"),
    "k too large": ((X, 4), {}, "k is out of range; got 4; expected 1 to 3"),
    "k fraction": ((X, 1.5), {}, "got 1.5"),
    "k bool": ((X, True), {}, "got True"),
    "k text": ((X, "2"), {}, "got"),
    "k NaN": ((X, math.nan), {}, "got nan"),
    "empty": ((torch.zeros(0), 1), {}, "k is out of range; got 1"),
    "integers": ((X.int(), 1), {}, "int32"),
    "no tensor": ((1.0, 1), {}, "x is no tensor"),
    "a list of no tensors": (([1.0], 1), {}, "x[0] is no tensor"),
    "an empty list": (([], 1), {}, "k is out of range"),
    "k beyond a list": (([X, X], 2 * X.numel() + 1), {}, f"1 to {2 * X.numel()}"),
    "too few bases": (([X, X], 1), {"base": [X]}, "base has the wrong length; got 1; expected 2"),
    "one base for a list": (([X, X], 1), {"base": X}, "base has the wrong length"),
    "base shape in a list": (([X], 1), {"base": [torch.zeros(2)]}, "base[0] differs from x[0]"),
    "widths in a list": (([X, X.double()], 1), {}, "float64 mixed"),
    "meta": ((X.to("meta"), 1), {}, "meta"),
    "base shape": ((X, 1), {"base": torch.zeros(2)}, "base differs from x in shape"),
    "base dtype": ((X, 1), {"base": X.double()}, "base differs from x in dtype"),
    "base device": ((X, 1), {"base": X.to("meta")}, "meta"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    args, kwargs, words = REFUSALS[what]
    with refused(OP, words):
        mk.kth_magnitude(*args, **kwargs)
