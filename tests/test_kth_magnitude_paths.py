"""kth_magnitude: every path of the C++ backend and of those of GPUs is reached, and exact."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import mergekern as mk
from mergekern import digits, dispatch
from mergekern.backends import selection as driver
from mergekern.check import name_of
from mergekern.ops.kth_magnitude import kth_magnitudes

import cases
from cases import CHUNK, values
from magnitudes import HARD, SMALL, Brute, assert_exact, problems
from required import unavailable
from serving import device_of

OP = "kth_magnitude"


@pytest.fixture
def selection(cpu_backend: Any) -> Any:
    """The driver of the C++ backend, for tests of its branches."""
    import mergekern.backends.cpu.kth_magnitude

    return mergekern.backends.cpu.kth_magnitude


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


# ---- each branch of the backends of GPUs -----------------------------------------------------


@pytest.fixture(params=["cuda", "triton"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend whose driver is made to take no tensor for small."""
    backend: str = request.param
    reason = dispatch.why_not(backend, OP, device_of(backend))
    if reason:
        unavailable(backend, reason)
    monkeypatch.setattr(driver, "_SMALL", 0)
    return backend


@pytest.fixture
def missed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks that a bracket did not hold."""
    ranks: list[int] = []
    by_digits = driver._by_digits

    def spy(source: Any, k: int) -> Any:
        ranks.append(k)
        return by_digits(source, k)

    monkeypatch.setattr(driver, "_by_digits", spy)
    return ranks


def pretend_sample_on_gpu(patch: pytest.MonkeyPatch, low: float, high: float) -> None:
    """The sample finds half of its keys at `low` and half at `high`."""

    def sample(source: Any) -> Tensor:
        keys = [digits.value_key(v, source.acc) for v in (low, high)]
        row = torch.tensor(keys, dtype=source.key_dtype, device=source.device)
        return row.repeat_interleave(512).expand(source.vectors, -1).contiguous()

    patch.setattr(driver, "_sample", sample)


def assert_exact_on_gpu(gpu: str, x: Tensor, *ranks: int, base: Tensor | None = None) -> None:
    brute, device = Brute(x, base), device_of(gpu)
    origin = None if base is None else base.to(device)
    (found,) = kth_magnitudes([x.to(device)], [list(ranks)], base=origin, backend=gpu)
    for got, k in zip(found, ranks, strict=True):
        brute.check(got, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("where", BRACKETS)
def test_gpu_bracket(
    where: str,
    dtype: torch.dtype,
    gpu: str,
    missed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with every value 3 times, so that the last kept one lies in any of the chunks."""
    low, high, taken = BRACKETS[where]
    pretend_sample_on_gpu(monkeypatch, low, high)
    x = shuffled(N).to(dtype)
    assert_exact_on_gpu(gpu, x, K)
    assert missed == ([K] if "missed" in taken else [])
    if dtype == torch.float32:
        ties = torch.cat([x.roll(777 * i) for i in range(3)])
        assert_exact_on_gpu(gpu, ties, 3 * K - 2, 3 * K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("what", HARD)
def test_gpu_hard_data(what: str, dtype: torch.dtype, gpu: str) -> None:
    x = torch.from_numpy(HARD[what].copy()).to(dtype)
    assert_exact_on_gpu(gpu, x, 1, 600, x.numel() // 5)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_gpu_sample_serves_ordinary_data(dtype: torch.dtype, gpu: str, missed: list[int]) -> None:
    n = CHUNK // 2
    x, base = (values((n,), dtype, seed=i) for i in range(2))
    assert_exact_on_gpu(gpu, x, n // 5, n // 2, n - 1000)
    assert_exact_on_gpu(gpu, x, n // 5, base=base)
    assert not missed


def test_gpu_one_key_that_many_share(
    gpu: str, missed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_sample_on_gpu(monkeypatch, 2.0, 2.0)
    x = torch.where(torch.arange(N) % 2 == 0, 2.0, -1.0)
    assert_exact_on_gpu(gpu, x, 1, N // 2, N // 2 + 1, N - 1)
    assert missed == [N // 2 + 1, N - 1]


def test_gpu_chunks_that_keep_more_than_their_room(gpu: str, missed: list[int]) -> None:
    """Sorted, so that all that lies inside the bracket lies in one chunk."""
    n = 1 << 17
    x = torch.arange(n).float()
    assert_exact_on_gpu(gpu, x, n // 5, n // 2)
    assert len(missed) == 2


def test_gpu_chunk_that_is_full_leaves_others_alone(gpu: str) -> None:
    """The last chunk keeps more than its room of one bracket; the next one's room comes after."""
    n, ramp = 1 << 17, 1 << 12
    x = shuffled(n)
    x[-ramp:] = n + torch.arange(ramp)
    full = ramp // 2
    ranks = [k for i in range(2, 6) for k in (full, n // i)]
    assert_exact_on_gpu(gpu, x, *ranks)


def test_gpu_many_equal_at_the_low_end_take_no_room(gpu: str, missed: list[int]) -> None:
    n = 1 << 17
    x = shuffled(n) * (torch.arange(n) % 5 < 2)
    nonzero = int(x.count_nonzero())
    assert_exact_on_gpu(gpu, x, nonzero - 10, nonzero, nonzero + 10)
    assert not missed


def test_gpu_ranks_at_the_ends_of_a_bracket(
    gpu: str, missed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    low, high = N // 2 - 50, N // 2 + 50
    pretend_sample_on_gpu(monkeypatch, low, high)
    wanted = (high + 1, high, high - 1, low + 1, low, low - 1)
    ranks = [N + 1 - value for value in wanted]
    assert_exact_on_gpu(gpu, shuffled(N), *ranks)
    assert missed == [ranks[0], ranks[-1]]
