"""kth_magnitude: exact on every path, and every path reached."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergekern as mk
from mergekern import Threshold, digits, dispatch, reference
from mergekern.check import accumulator, name_of
from mergekern.ops.kth_magnitude import kth_magnitudes

import cases
from cases import CATALOGUE, CHUNK, Case, values
from refusal import refused
from required import REQUIRED
from serving import device_of

OP = "kth_magnitude"
SMALL = 1 << 15  # cpu._SMALL: up to here the C++ backend gathers all keys


# ---- the oracle: a stable sort ---------------------------------------------------------------


def magnitudes(x: Tensor, base: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(is NaN, |x - base| with NaN as infinity), flat, float64."""
    x = x.cpu()
    acc = accumulator(x.dtype)
    d = x.double() if base is None else (x.to(acc) - base.cpu().to(acc)).double()
    flat = d.reshape(-1).numpy()
    nan = np.isnan(flat)
    return nan, np.where(nan, np.inf, np.abs(flat))


class Brute:
    """All ranks of |x - base| by one stable sort: NaN first, then by size, then by index."""

    def __init__(self, x: Tensor, base: Tensor | None = None) -> None:
        self.nan, self.size = magnitudes(x, base)
        self.order = np.lexsort((np.arange(self.size.size), -self.size, ~self.nan))

    def threshold(self, k: int) -> Threshold:
        last = self.order[k - 1]
        if self.nan[last]:
            larger, ties = np.zeros_like(self.nan), self.nan
        else:
            larger = self.nan | (self.size > self.size[last])
            ties = ~self.nan & (self.size == self.size[last])
        value = math.nan if self.nan[last] else float(self.size[last])
        above = int(larger.sum())
        places = np.flatnonzero(ties)
        return Threshold(value, above, len(places), int(places[k - above - 1]) + 1)

    def kept(self, k: int) -> np.ndarray:
        return np.sort(self.order[:k])

    def survivors(self, threshold: Threshold) -> np.ndarray:
        """The flat indices that the documentation of Threshold says are kept."""
        index = np.arange(self.size.size)
        if threshold.value != threshold.value:
            return index[self.nan & (index < threshold.cut)]
        larger = self.nan | (self.size > threshold.value)
        equal = ~self.nan & (self.size == threshold.value)
        return index[larger | (equal & (index < threshold.cut))]

    def check(self, got: Threshold, k: int) -> None:
        expected = self.threshold(k)
        assert isinstance(got, Threshold)
        assert repr(got[:3]) == repr(expected[:3])  # NaN is NaN, and the value is never -0
        assert got.above < k <= got.above + got.equal
        np.testing.assert_array_equal(self.survivors(got), self.kept(k))
        if got.equal > k - got.above:  # some ties are left out, so only one cut is right
            assert got.cut == expected.cut
        else:
            assert expected.cut <= got.cut <= self.size.size


def assert_exact(got: Threshold, x: Tensor, k: int, base: Tensor | None = None) -> None:
    Brute(x, base).check(got, k)


def ranks(numel: int) -> list[int]:
    """First, last and a trim's usual fifth, without repetition."""
    return sorted({1, max(1, numel // 5), numel})


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

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, -math.nan]
ELEMENT = st.one_of(st.sampled_from(SPECIAL), st.floats(width=16), st.floats(width=32))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int]:
    dtype = draw(st.sampled_from(cases.DTYPES))
    xs = draw(st.lists(ELEMENT, min_size=1, max_size=40))
    x = torch.tensor(xs, dtype=torch.float64).to(dtype)
    base = None
    if draw(st.booleans()):
        ys = draw(st.lists(ELEMENT, min_size=len(xs), max_size=len(xs)))
        base = torch.tensor(ys, dtype=torch.float64).to(dtype)
    return x, base, draw(st.integers(1, len(xs)))


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


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(problem=problems())
def test_property_16_bit_patterns(
    problem: tuple[Tensor, Tensor | None, int],
    selection: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The histogram of bit patterns on small data, where hypothesis can look for trouble."""
    x, _, k = problem
    with monkeypatch.context() as patch:
        patch.setattr(selection, "_SMALL", 0)
        for dtype in (torch.float16, torch.bfloat16):
            y = x.to(dtype)
            assert_exact(mk.kth_magnitude(y, k, backend="cpu"), y, k)


@pytest.fixture
def selection(cpu_backend: Any) -> Any:
    """The driver of the C++ backend, for tests of its branches."""
    import mergekern.backends.cpu.kth_magnitude

    return mergekern.backends.cpu.kth_magnitude


# ---- data that misleads a sample -------------------------------------------------------------


def _hard() -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    n = 130_003
    i = np.arange(n)
    for period in (16, 1000, 4096):
        yield f"period {period}", (i % period).astype(np.float64)
    yield "sorted", i / n
    yield "reversed", i[::-1] / n
    yield "constant blocks", (i // 5000).astype(np.float64)
    yield "large end", np.where(i < n - 600, rng.standard_normal(n), 1e6 + i)
    yield "equal but few", np.where(i % 50_000 == 7, 1.0 + i, 0.5)
    yield "one outlier", np.where(i == 12_345, 1e30, 1e-3)
    yield "two values", np.where(rng.random(n) < 0.2, 1.0, -2.0)
    yield "zero but few", np.where(rng.random(n) < 1e-4, rng.standard_normal(n), 0.0)
    yield "many ties of many values", np.repeat(rng.standard_normal(n // 10 + 1), 10)[:n]
    yield "many decades", np.exp(rng.uniform(-80, 80, n))
    yield "many NaN", np.where(rng.random(n) < 0.3, np.nan, rng.standard_normal(n))


HARD = dict(_hard())


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


# ---- each branch of the C++ backend, by name -------------------------------------------------


class Paths(list[str]):
    """The names of the helpers of backends/cpu/kth_magnitude.py that a call went through."""


@pytest.fixture
def paths(selection: Any, monkeypatch: pytest.MonkeyPatch) -> Paths:
    taken = Paths()
    for name in ("_keys", "_by_patterns", "_by_bracket", "_by_digits", "_cut"):
        inner = getattr(selection, name)

        def spy(*args: Any, name: str = name, inner: Any = inner) -> Any:
            result = inner(*args)
            taken.append(name if result is not None else f"{name} missed")
            return result

        monkeypatch.setattr(selection, name, spy)
    return taken


def shuffled(n: int) -> Tensor:
    """1 ... n in some order: the k-th largest magnitude is n + 1 - k."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(5)).float() + 1


def pretend_sample(
    cpu: Any, patch: pytest.MonkeyPatch, low: float, high: float, dtype: torch.dtype
) -> None:
    """The sample finds half of its keys at `low` and half at `high`."""
    keys = [digits.value_key(v, dtype) for v in (low, high)]
    word = ctypes.c_uint64 if dtype == torch.float64 else ctypes.c_uint32

    def sample(*, out: int, run: int, begin: int, end: int, **_: Any) -> None:
        width = ctypes.sizeof(word)
        drawn = (word * ((end - begin) * run)).from_address(out + begin * run * width)
        for i in range(len(drawn)):
            drawn[i] = keys[i % 2]

    patch.setattr(cpu.runtime._cpu, "sample_keys", sample)


def test_path_small(paths: Paths) -> None:
    x = shuffled(SMALL)
    assert_exact(mk.kth_magnitude(x, 99, backend="cpu"), x, 99)
    assert paths == ["_keys"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_path_patterns(dtype: torch.dtype, paths: Paths) -> None:
    x = values((SMALL + 1,), dtype)
    for k in (1, 5000, SMALL + 1):
        assert_exact(mk.kth_magnitude(x, k, backend="cpu"), x, k)
    assert set(paths) <= {"_by_patterns", "_cut"}
    assert "_by_patterns" in paths


def test_path_patterns_with_all_ties_kept(paths: Paths) -> None:
    x = torch.cat([torch.ones(SMALL), torch.full((10,), 2.0)]).to(torch.bfloat16)
    assert_exact(mk.kth_magnitude(x, 10, backend="cpu"), x, 10)
    assert paths == ["_by_patterns"]
    assert_exact(mk.kth_magnitude(x, 9, backend="cpu"), x, 9)
    assert paths == ["_by_patterns", "_cut", "_by_patterns"]


N, K = 40_000, 20_000  # of the tests below; the wanted value is N + 1 - K = 20001
BRACKETS = {
    "inside": (19_900.0, 20_100.0, "_by_bracket"),
    "at high": (19_000.0, 20_001.0, "_by_bracket"),
    "at low": (20_001.0, 21_000.0, "_by_bracket"),
    "one key": (20_001.0, 20_001.0, "_by_bracket"),
    "misses above": (30_000.0, 31_000.0, "_by_bracket missed"),
    "misses below": (10_000.0, 11_000.0, "_by_bracket missed"),
    "one key misses": (30_000.0, 30_000.0, "_by_bracket missed"),
    "holds too many": (0.5, 50_000.0, "_by_bracket missed"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("where", BRACKETS)
def test_path_bracket(
    where: str,
    dtype: torch.dtype,
    selection: Any,
    paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low, high, taken = BRACKETS[where]
    pretend_sample(selection, monkeypatch, low, high, dtype)
    x = shuffled(N).to(dtype)
    assert_exact(mk.kth_magnitude(x, K, backend="cpu"), x, K)
    assert taken in paths
    assert ("_by_digits" in paths) == ("missed" in taken)


@pytest.mark.parametrize("where", BRACKETS)
def test_path_bracket_with_ties_across_chunks(
    where: str, selection: Any, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value 20 times, so that the last kept one lies in any of the chunks."""
    low, high, taken = BRACKETS[where]
    pretend_sample(selection, monkeypatch, low, high, torch.float32)
    x = torch.cat([shuffled(N).roll(777 * i) for i in range(20)])
    brute = Brute(x)
    for kept in (1, 7, 19, 20):
        k = 20 * (K - 1) + kept
        brute.check(mk.kth_magnitude(x, k, backend="cpu"), k)
    assert taken in paths
    assert ("_by_digits" in paths) == ("missed" in taken)
    assert "_cut" in paths


def test_path_bracket_of_nan(selection: Any, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_sample(selection, monkeypatch, math.inf, math.nan, torch.float32)
    x = shuffled(N)
    x[::2] = math.nan
    for k in (1, N // 2):
        assert_exact(mk.kth_magnitude(x, k, backend="cpu"), x, k)
    assert_exact(mk.kth_magnitude(x, N // 2 + 1, backend="cpu"), x, N // 2 + 1)
    assert "_by_digits" in paths


def test_path_the_sample_serves_ordinary_data(paths: Paths) -> None:
    for dtype in (torch.float32, torch.float64):
        x = values((2 * CHUNK,), dtype)
        for k in (x.numel() // 5, x.numel() // 2):
            assert_exact(mk.kth_magnitude(x, k, backend="cpu"), x, k)
    assert "_by_digits" not in paths
    assert paths.count("_by_bracket") >= 4


# ---- each branch of the Triton backend -------------------------------------------------------


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver of the Triton backend, made to take no tensor for small, with what it missed."""
    reason = dispatch.why_not("triton", OP, device_of("triton"))
    if reason and "triton" in REQUIRED:
        pytest.fail(f"MERGEKERN_REQUIRE: {reason}")
    if reason:
        pytest.skip(reason)
    import mergekern.backends.triton.kth_magnitude

    driver = mergekern.backends.triton.kth_magnitude
    monkeypatch.setattr(driver, "_SMALL", 0)
    return driver


@pytest.fixture
def missed(on_triton: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks that a bracket did not hold."""
    ranks: list[int] = []
    by_digits = on_triton._by_digits

    def spy(source: Any, k: int) -> Any:
        ranks.append(k)
        return by_digits(source, k)

    monkeypatch.setattr(on_triton, "_by_digits", spy)
    return ranks


def pretend_sample_on_triton(
    driver: Any, patch: pytest.MonkeyPatch, low: float, high: float
) -> None:
    """The sample finds half of its keys at `low` and half at `high`."""

    def sample(source: Any) -> Tensor:
        keys = [digits.value_key(v, source.acc) for v in (low, high)]
        row = torch.tensor(keys, dtype=source.key_dtype, device=source.device)
        return row.repeat_interleave(512).expand(source.vectors, -1).contiguous()

    patch.setattr(driver, "_sample", sample)


def assert_exact_on_triton(x: Tensor, *ranks: int, base: Tensor | None = None) -> None:
    brute, device = Brute(x, base), device_of("triton")
    origin = None if base is None else base.to(device)
    (found,) = kth_magnitudes([x.to(device)], [list(ranks)], base=origin, backend="triton")
    for got, k in zip(found, ranks, strict=True):
        brute.check(got, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("where", BRACKETS)
def test_triton_bracket(
    where: str,
    dtype: torch.dtype,
    on_triton: Any,
    missed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with every value 3 times, so that the last kept one lies in any of the chunks."""
    low, high, taken = BRACKETS[where]
    pretend_sample_on_triton(on_triton, monkeypatch, low, high)
    x = shuffled(N).to(dtype)
    assert_exact_on_triton(x, K)
    assert missed == ([K] if "missed" in taken else [])
    if dtype == torch.float32:
        ties = torch.cat([x.roll(777 * i) for i in range(3)])
        assert_exact_on_triton(ties, 3 * K - 2, 3 * K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("what", HARD)
def test_triton_hard_data(what: str, dtype: torch.dtype, on_triton: Any) -> None:
    x = torch.from_numpy(HARD[what].copy()).to(dtype)
    assert_exact_on_triton(x, 1, 600, x.numel() // 5)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_triton_sample_serves_ordinary_data(dtype: torch.dtype, missed: list[int]) -> None:
    n = CHUNK // 2
    x, base = (values((n,), dtype, seed=i) for i in range(2))
    assert_exact_on_triton(x, n // 5, n // 2, n - 1000)
    assert_exact_on_triton(x, n // 5, base=base)
    assert not missed


def test_triton_one_key_that_many_share(
    on_triton: Any, missed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_sample_on_triton(on_triton, monkeypatch, 2.0, 2.0)
    x = torch.where(torch.arange(N) % 2 == 0, 2.0, -1.0)
    assert_exact_on_triton(x, 1, N // 2, N // 2 + 1, N - 1)
    assert missed == [N // 2 + 1, N - 1]


def test_triton_chunks_that_keep_more_than_their_room(missed: list[int]) -> None:
    """Sorted, so that all that lies inside the bracket lies in one chunk."""
    n = 1 << 17
    x = torch.arange(n).float()
    assert_exact_on_triton(x, n // 5, n // 2)
    assert len(missed) == 2


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
