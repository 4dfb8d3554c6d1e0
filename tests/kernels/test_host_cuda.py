"""The emulator of host_cuda: what it computes, and the errors of kernels that it shows."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekern as mk
from mergekern import dispatch
from mergekern.backends import moments
from mergekern.check import name_of

from accuracy import assert_bytes_equal
from cases import values
from kernels import build_host_cuda, tensor_cores
from required import unavailable

ORDERS = ("0", "-1", "7", "12345")
Call = Callable[..., tuple[np.ndarray, str]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None or shutil.which("objcopy") is None:
        unavailable("cuda", "g++ and objcopy are not on PATH")
    target = tmp_path_factory.mktemp("emulated") / "emulated.so"
    build_host_cuda.build([Path(__file__).with_name("emulated.cu")], target)
    return ctypes.CDLL(str(target))


@pytest.fixture
def call(library: ctypes.CDLL) -> Call:
    """The numbers that a function of emulated.cu wrote, and the error that it met."""

    def run(name: str, count: int, *args: Any) -> tuple[np.ndarray, str]:
        out = np.zeros(count, np.int32)
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        return out, function(ctypes.c_void_p(out.ctypes.data), *args).decode()

    return run


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_shows(call: Call, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEKERN_HOST_CUDA_ORDER", order)
    expected = np.tile(np.arange(256)[::-1], 3)
    got, error = call("reversed", 3 * 256)
    assert error == ""
    np.testing.assert_array_equal(got, expected)
    got, _ = call("reversed_without_barrier", 3 * 256)
    assert (got != expected).sum() > 100


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_missing_before_shared_memory_is_used_again_shows(
    call: Call, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_HOST_CUDA_ORDER", order)
    expected = np.full(256, 6 * sum(range(256)))
    got, error = call("sums", 256)
    assert error == ""
    np.testing.assert_array_equal(got, expected)
    got, _ = call("sums_without_barrier", 256)
    assert (got != expected).any()


def test_shared_memory_is_poisoned_before_each_block(call: Call) -> None:
    got, _ = call("uninitialised", 6)
    assert set(got.view(np.uint32)) == {0xA5A5A5A5}


def test_the_order_of_blocks_and_threads(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 7 * 64
    seen = {}
    for order in ORDERS:
        monkeypatch.setenv("MERGEKERN_HOST_CUDA_ORDER", order)
        seen[order] = call("arrival", n + 1)[0][1:].tolist()
        assert sorted(seen[order]) == list(range(n))
    assert seen["0"] == list(range(n))
    assert seen["-1"] == seen["0"][::-1]
    assert len(set(map(tuple, seen.values()))) == len(ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_warp_functions(call: Call, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEKERN_HOST_CUDA_ORDER", order)
    i = np.arange(64)
    value = 3 * i + 1
    lane, first = i % 32, i // 32 * 32
    warps = i.reshape(2, 32)

    def bits(of: np.ndarray) -> np.ndarray:
        return (of.astype(np.int64) << np.arange(32)).sum(-1).astype(np.int32)

    expected = [
        value[first + lane * 7 % 32],
        value[np.where(lane >= 3, i - 3, i)],
        value[np.where(lane % 16 < 13, i + 3, i)],
        value[i ^ 5],
        bits(warps % 3 == 0)[i // 32],
        value.reshape(2, 32).sum(1)[i // 32],
        bits(warps[i // 32] % 5 == (i % 5)[:, None]),
        np.where(i < 32, 1, 2),
        np.where(lane < 8, value[first + 7], 0),
        np.full(64, 22),
    ]
    got, error = call("warps", 640)
    assert error == ""
    np.testing.assert_array_equal(got.reshape(64, 10), np.stack(expected, 1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("early_end", ("100 of 128 threads wait for others that do not come", "and 28 that ended")),
        ("two_places", ("the threads of a block wait in two places",)),
        ("missing_lane", ("31 of 32 threads wait for others that do not come", "and 1 that ended")),
    ],
)
def test_threads_that_wait_in_vain_are_an_error(
    call: Call, kernel: str, words: tuple[str, ...], order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_HOST_CUDA_ORDER", order)
    for _ in range(3):  # and leaves nothing behind
        got, error = call(kernel, 1)
        assert got[0] == 0
        assert all(w in error for w in (*words, "emulated.cu:")), error
    assert call("reversed", 3 * 256)[1] == ""


def test_a_write_past_dynamic_shared_memory_is_an_error(call: Call) -> None:
    _, error = call("too_far", 1)
    assert "wrote past its dynamic shared memory; got a launch with 124 bytes" in error


def test_rounding_to_zero(call: Call) -> None:
    x = np.array([1 + 2**-24, -1 - 2**-24, 0.1, -0.1, 1e300, -1e300, 1e-300, np.inf, 3.0, -0.0])
    with np.errstate(over="ignore"):
        near = x.astype(np.float32)
    away = np.abs(near.astype(np.float64)) > np.abs(x)
    expected = np.where(away, np.nextafter(near, np.float32(0)), near)
    got, _ = call("double2float_rz", len(x), ctypes.c_void_p(x.ctypes.data), len(x))
    np.testing.assert_array_equal(got, expected.view(np.int32))


@pytest.mark.parametrize("order", ORDERS)
def test_copies_arrive_with_their_wait_and_a_barrier(
    call: Call, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_HOST_CUDA_ORDER", order)
    given = np.arange(512, dtype=np.int32)
    expected = np.concatenate([given[::4][::-1], np.zeros(128, np.int32)])
    source = ctypes.c_void_p(given.ctypes.data)
    got, error = call("copied", 256, source)
    assert error == ""
    np.testing.assert_array_equal(got, expected)
    got, _ = call("copied_without_wait", 256, source)
    assert (got[:128].view(np.uint32) == 0xA5A5A5A5).sum() > 30
    got, _ = call("copied_without_barrier", 256, source)
    assert (got != expected).sum() > 100
    _, error = call("forgotten", 1, source)
    assert "ended before its copies; got 3 on their way" in error


@pytest.mark.parametrize("kind", ["normal", "tiny", "zeros"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_products_on_tensor_cores(library: ctypes.CDLL, dtype: torch.dtype, kind: str) -> None:
    """Every lane's elements, and the rounding of tensor_cores.py, bit for bit."""
    g = torch.Generator().manual_seed(0)
    scale = {"normal": 1.0, "tiny": 2.0**-20, "zeros": 0.0}[kind]
    x, y = (torch.randn(16, k, generator=g).mul(scale).to(dtype) for k in (16, 8))
    x[3] *= 1000  # large products cut off small ones
    c = torch.randn(16, 8, generator=g).mul(scale**2).numpy()
    p = (x.double()[:, :, None] * y.double()[:, None, :]).reshape(16, -1).numpy()
    expected = tensor_cores.sums(p, c.reshape(-1).astype(np.float64)).astype(np.float32)
    function = getattr(library, f"products_{name_of(dtype)}")
    function.restype = ctypes.c_char_p
    operands = [ctypes.c_void_p(v.data_ptr()) for v in (x, y)]
    assert function(ctypes.c_void_p(c.ctypes.data), *operands) == b""
    np.testing.assert_array_equal(c.reshape(-1), expected)


X = values((3, 70, 1031), torch.bfloat16)
ROW_WEIGHTS = values((70, 3), torch.float64)
REVERSED = torch.arange(1031).flip(0)
HALVES = torch.arange(3 * 1030) % 515
MANY = values((300_001,), torch.bfloat16)  # too many to sort


def variances() -> torch.Tensor:
    found = mk.variance_mask([MANY, MANY.flip(0)], 0.3, backend="cuda")
    return torch.cat([found.mask.bits, torch.tensor(found.squares).view(torch.uint8)])


def row_ranks() -> torch.Tensor:
    found = mk.rank_mask(X, mk.MagPrune(0.5, 0.3), backend="cuda")
    return torch.cat([found.mask.bits, torch.tensor(found[1:]).view(torch.uint8)])


CALLS = {
    "weighted_sum": lambda: mk.weighted_sum([*X], [0.1, 0.2, 0.3], backend="cuda"),
    "weighted_rows": lambda: mk.weighted_rows([*X], ROW_WEIGHTS, backend="cuda"),
    "merge_deltas": lambda: mk.merge_deltas(
        X[0],
        [*X[1:]],
        [1.0, 0.5],
        keep=[mk.Bernoulli(0.5, model=i) for i in range(2)],
        rescale="l1",
        elect="sum",
        backend="cuda",
    ),
    "gram": lambda: mk.gram([*X, *X[:2]], base=X[1], backend="cuda"),
    "coefficient_gradients": lambda: mk.coefficient_gradients(
        X[0], [*X, *X[:2]], base=X[1], backend="cuda"
    ),
    "covariance": lambda: mk.covariance(X.flatten()[:60_000].view(300, 200), backend="cuda"),
    "zip_weights": lambda: mk.zip_weights([*X[:, :, :1030]], cols=HALVES, backend="cuda"),
    "permute": lambda: mk.permute(X, {0: [2, 0, 1], 2: REVERSED}, backend="cuda"),
    "kth_magnitude": lambda: torch.tensor(mk.kth_magnitude(MANY, 60_000, backend="cuda")),
    "variance_mask": variances,
    "rank_mask": row_ranks,
}


@pytest.mark.parametrize("op", CALLS)
def test_results_do_not_depend_on_the_order(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = dispatch.why_not("cuda", op, "cpu")
    if reason:
        unavailable("cuda", reason)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("MERGEKERN_HOST_CUDA_ORDER", order)
        results.append(CALLS[op]())
    for other in results[1:]:
        assert_bytes_equal(other, results[0])


def test_every_kernel_is_called_in_other_orders() -> None:
    assert set(CALLS) == set(dispatch.KERNELS["cuda"])


def test_constants_are_those_of_the_scheme() -> None:
    reason = dispatch.why_not("cuda", "covariance", "cpu")
    if reason:
        unavailable("cuda", reason)
    compiled = dispatch.compiled("_cuda")
    for name in ("TILE", "SPLIT_WIDTH", "SHALLOW_ROWS", "PARTS", "MEASURED"):
        assert getattr(compiled, name) == getattr(moments, name)
    assert moments.SHALLOW_ROWS % compiled.DEEP_ROWS == 0
