"""merge_deltas: trims, draws and elections, the same bits on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import Bernoulli, Threshold
from mergekern.check import name_of

import cases
import elementwise
from accuracy import assert_backend_bits, assert_bits_equal, assert_within, half_ulp
from cases import CATALOGUE, CHUNK, Case
from recipes import RECIPES, base_of, draws, specified
from refusal import refused
from serving import affordable

OP = "merge_deltas"
NAN, INF = math.nan, math.inf


# ---- bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CATALOGUE, ids=str)
def test_bits_of_the_specified_arithmetic(case: Case, backend: str, device: str) -> None:
    base, xs, weights = base_of(case, device), case.tensors(device), case.weights()
    options = RECIPES["ties"](xs, base)
    got = mk.merge_deltas(base, xs, weights, backend=backend, **options)
    assert_backend_bits(got, specified(base, xs, weights, **options), backend)


@pytest.mark.parametrize("based", [True, False], ids=["base", "deltas"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", cases.VALUES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_bits_of_every_recipe(
    dtype: torch.dtype, kind: str, recipe: str, based: bool, backend: str, device: str
) -> None:
    case = Case(shape=(19, 9), dtype=dtype, values=kind, n=4)
    base = base_of(case, device) if based else None
    xs, weights = case.tensors(device), case.weights()
    options = RECIPES[recipe](xs, base)
    got = mk.merge_deltas(base, xs, weights, backend=backend, **options)
    assert_backend_bits(got, specified(base, xs, weights, **options), backend)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 8, 9, 17])
@pytest.mark.parametrize("recipe", [*RECIPES, "ties of whole tensors"])
def test_bits_of_every_number_of_models(recipe: str, n: int, backend: str, device: str) -> None:
    """Few models have paths of their own in the C++ kernel; cuts fall inside blocks."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = Case(shape=(600,), dtype=dtype, values="ties", n=n)
        base, xs, weights = base_of(case, device), case.tensors(device), case.weights()
        if recipe == "ties of whole tensors":
            options: dict[str, Any] = {"elect": "sum", "normalize": True, "scale": 0.4}
        else:
            options = RECIPES[recipe](xs, base)
        got = mk.merge_deltas(base, xs, weights, backend=backend, **options)
        assert_backend_bits(got, specified(base, xs, weights, **options), backend)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("recipe", ["dare", "trim l1", "alternating"])
def test_bits_of_layouts(recipe: str, layout: str, backend: str, device: str) -> None:
    case = Case(shape=(9, 11, 13), dtype=torch.bfloat16, layout=layout)
    base, xs, weights = base_of(case, device), case.tensors(device), case.weights()
    options = RECIPES[recipe](xs, base)
    expected = specified(base, xs, weights, **options)
    for origin in (base, base.contiguous()):
        got = mk.merge_deltas(origin, xs, weights, backend=backend, **options)
        assert_backend_bits(got, expected, backend)


@pytest.mark.parametrize("to", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_bits_of_another_result_dtype(
    dtype: torch.dtype, to: torch.dtype, backend: str, device: str
) -> None:
    case = Case(shape=(513,), dtype=dtype, values="mixed")
    base, xs, weights = base_of(case, device), case.tensors(device), case.weights()
    got = mk.merge_deltas(base, xs, weights, out_dtype=to, backend=backend)
    assert_backend_bits(got, specified(base, xs, weights, dtype=to), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_bits_across_chunks(dtype: torch.dtype, backend: str, device: str) -> None:
    """Ties are kept up to an index in the second chunk."""
    case = Case(shape=(CHUNK + 1003,), n=2, dtype=dtype, values="ties")
    xs, weights = case.tensors(device), [0.3, 0.9]
    rules = [Threshold(1.5, 0, 0, CHUNK + 77), Threshold(1.0, 0, 0, CHUNK - 5)]
    got = mk.merge_deltas(None, xs, weights, keep=rules, elect="sum", backend=backend)
    expected = specified(None, xs, weights, keep=rules, elect="sum")
    assert_backend_bits(got, expected, backend)


@pytest.mark.parametrize("recipe", ["dare", "ties", "alternating"])
def test_bits_do_not_depend_on_the_split(
    recipe: str, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges that begin anywhere, as shards do."""
    case = Case(shape=(1500,))
    base, xs, weights = base_of(case, "cpu"), case.tensors(), case.weights()
    options = RECIPES[recipe](xs, base)
    whole = mk.merge_deltas(base, xs, weights, backend="cpu", **options)

    def odd_ranges(kernel: Callable[[int, int], object], total: int, *_: int) -> None:
        borders = [0, 3, 11, 12, 525, 1031, total]
        for begin, end in zip(borders[-2::-1], borders[:0:-1]):
            kernel(begin, end)

    monkeypatch.setattr(cpu_backend, "chunks", odd_ranges)
    got = mk.merge_deltas(base, xs, weights, backend="cpu", **options)
    assert_bits_equal(got, whole)


@pytest.mark.parametrize("chunk", [1, 7, 8, 100])
def test_bits_do_not_depend_on_the_chunk_of_torch(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(shape=(5, 61))
    base, xs, weights = base_of(case, "cpu"), case.tensors(), case.weights()
    options = RECIPES["alternating"](xs, base)
    monkeypatch.setattr("mergekern.backends.torch.chunks.CHUNK", chunk)
    got = mk.merge_deltas(base, xs, weights, backend="torch", **options)
    assert_bits_equal(got, specified(base, xs, weights, **options))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(
    threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(shape=(affordable(backend, 2 * CHUNK + 17),), n=2, values="mixed")
    base, xs = base_of(case, device), case.tensors(device)
    options: dict[str, Any] = {"keep": draws(xs), "elect": "sum", "rescale": "l1"}
    monkeypatch.setenv("MERGEKERN_THREADS", "1")
    once = mk.merge_deltas(base, xs, [0.4, 0.7], backend=backend, **options)
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    assert_bits_equal(mk.merge_deltas(base, xs, [0.4, 0.7], backend=backend, **options), once)


@pytest.mark.parametrize("kind", ["normal", "tiny", "ties"])
@pytest.mark.parametrize("dtype", [d for d in cases.DTYPES if d != torch.float64], ids=name_of)
def test_error_without_election(dtype: torch.dtype, kind: str, backend: str, device: str) -> None:
    """Against float64. A term meets n + 7 roundings: its difference, weight, product, n - 1 sums;
    total and quotient; scale and its product; then the base is added and the result stored."""
    case = Case(shape=(257,), n=5, dtype=dtype, values=kind)
    base, xs, weights = base_of(case, device), case.tensors(device), case.weights()
    got = mk.merge_deltas(base, xs, weights, normalize=True, scale=0.3, backend=backend)
    wide = torch.float64
    oracle = specified(base, xs, weights, normalize=True, scale=0.3, dtype=wide, acc=wide)
    terms = [(x.cpu().to(wide) - base.cpu().to(wide)).abs() * abs(w) for x, w in zip(xs, weights)]
    size = 0.3 * sum(terms) / abs(sum(weights))
    info = torch.finfo(torch.float32)
    least = info.smallest_normal * info.eps
    error = (case.n + 7) * info.eps / 2 * size + (case.n + 3) * least
    error = 1.0001 * (error + info.eps / 2 * oracle.abs())
    unit = half_ulp(oracle.abs() + error, dtype)
    assert_within(got, oracle, error + unit)


def test_float64_is_rounded_once(backend: str, device: str) -> None:
    """1 + 2**-8 + 2**-40 becomes 1 by way of float32."""
    base = torch.ones(3, dtype=torch.float64, device=device)
    x = base + 2.0**-8 + 2.0**-40
    got = mk.merge_deltas(base, [x], [1.0], out_dtype=torch.bfloat16, backend=backend)
    assert_backend_bits(got, torch.full((3,), 1 + 2.0**-7, dtype=torch.bfloat16), backend)


# ---- out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_out(dtype: torch.dtype, backend: str, device: str) -> None:
    """`out` may be the base as well as a model."""
    case = Case(shape=(3, 7, 53), dtype=dtype, n=3, layout="sliced", mixed_layouts=True)
    tensors, weights = case.tensors(device), [0.7, -0.2]
    keep = [Bernoulli(0.5, model=0), Bernoulli(0.5, model=1)]

    def call(tensors: list[Tensor], out: Tensor) -> Tensor:
        base, *xs = tensors
        return mk.merge_deltas(base, xs, weights, keep=keep, elect="sum", out=out, backend=backend)

    expected = specified(tensors[0], tensors[1:], weights, keep=keep, elect="sum")
    elementwise.assert_writes_only_out(call, tensors, expected, backend)
    elementwise.assert_transposed_out(call, tensors, expected, backend)
    elementwise.assert_in_place(call, tensors, expected, backend)
    dense = [x.contiguous() for x in tensors]
    elementwise.assert_in_place(call, dense, expected, backend)


def test_out_of_another_dtype(backend: str, device: str) -> None:
    case = Case(shape=(513,))
    base, xs = base_of(case, device), case.tensors(device)
    out = torch.empty(513, dtype=torch.bfloat16, device=device)
    got = mk.merge_deltas(base, xs, [1, 1, 1], out=out, out_dtype=torch.bfloat16, backend=backend)
    assert got.data_ptr() == out.data_ptr()
    expected = specified(base, xs, [1, 1, 1], dtype=torch.bfloat16)
    assert_backend_bits(got, expected, backend)


def test_bad_out_is_refused() -> None:
    elementwise.assert_refuses_bad_out(
        OP,
        lambda tensors, out: mk.merge_deltas(tensors[0], tensors[1:], [1], out=out),
        [torch.zeros(100), torch.zeros(100)],
    )


@pytest.mark.parametrize("to", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("start", range(0, 20, 3))
def test_streamed_stores(
    start: int, to: torch.dtype, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large results bypass the caches; here small ones do, at every alignment."""
    monkeypatch.setattr(cpu_backend, "STREAM", 0)
    for n in (1, 5, 63, 511, 513, 1031):
        case = Case(shape=(n,), values="mixed")
        base, xs = base_of(case, "cpu"), case.tensors()
        buffer = torch.full((n + 64,), cases.SENTINEL, dtype=to)
        out = buffer[start : start + n]
        mk.merge_deltas(base, xs, [1, 2, 3], out=out, out_dtype=to, backend="cpu")
        assert_bits_equal(out, specified(base, xs, [1, 2, 3], dtype=to))
        assert cases.untouched(buffer, out)


# ---- the door --------------------------------------------------------------------------------


def test_numpy_inputs(backend: str, device: str) -> None:
    case = Case(shape=(31, 33))
    base, xs = base_of(case, device), case.tensors(device)
    expected = specified(base, xs, [0.5, 0.25, 1], elect="count")
    if device == "cpu":
        base, xs = base.numpy(), [x.numpy() for x in xs]
    weights = np.array([0.5, 0.25, 1])
    got = mk.merge_deltas(base, xs, weights, elect="count", backend=backend)
    assert_backend_bits(got, expected, backend)


X = torch.zeros(3)
REFUSALS: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "empty": ((X, [], []), {}, "xs is empty"),
    "one tensor": ((X, X, [1, 1, 1]), {}, "xs is no list; got one tensor"),
    "shapes": ((X, [X, torch.zeros(4)], [1, 1]), {}, "xs[1] differs from xs[0] in shape"),
    "dtypes": ((X, [X, X.half()], [1, 1]), {}, "xs[1] differs from xs[0] in dtype"),
    "meta": ((X, [X.to("meta")], [1]), {}, "meta"),
    "integers": ((X, [X.int()], [1]), {}, "int32"),
    "base shape": ((torch.zeros(1), [X], [1]), {}, "base differs from xs[0] in shape"),
    "base dtype": ((X.double(), [X], [1]), {}, "base differs from xs[0] in dtype"),
    "base meta": ((X.to("meta"), [X], [1]), {}, "meta"),
    "base of integers": ((X.int(), [X], [1]), {}, "int32"),
    "too few weights": ((X, [X, X], [1]), {}, "weights has the wrong length"),
    "NaN weight": ((X, [X], [NAN]), {}, "weights[0] is not finite"),
    "infinite weight": ((X, [X], [INF]), {}, "weights[0] is not finite"),
    "NaN scale": ((X, [X], [1]), {"scale": NAN}, "scale is not finite"),
    "scale of text": ((X, [X], [1]), {"scale": "big"}, "scale is no number"),
    "elect": ((X, [X], [1]), {"elect": "mean"}, "elect is unknown; got 'mean'"),
    "rescale": ((X, [X], [1]), {"rescale": "l2"}, "rescale is unknown; got 'l2'"),
    "too few rules": ((X, [X, X], [1, 1]), {"keep": [None]}, "keep has the wrong length"),
    "rule of numbers": ((X, [X], [1]), {"keep": [0.5]}, "keep holds an unknown rule; got float"),
    "density above 1": ((X, [X], [1]), {"keep": [Bernoulli(1.5)]}, "density is out of range"),
    "density below 0": ((X, [X], [1]), {"keep": [Bernoulli(-0.1)]}, "density is out of range"),
    "density NaN": ((X, [X], [1]), {"keep": [Bernoulli(NAN)]}, "density is out of range"),
    "out_dtype": ((X, [X], [1]), {"out_dtype": torch.int32}, "out_dtype"),
    "out of text": ((X, [X], [1]), {"out": "out"}, "out"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    args, kwargs, words = REFUSALS[what]
    with refused(OP, words):
        mk.merge_deltas(*args, **kwargs)


def test_the_kernel_is_the_compiled_one(cpu_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**kwargs: object) -> None:
        raise RuntimeError("this kernel was called")

    monkeypatch.setattr(cpu_backend._cpu, OP, broken)
    with pytest.raises(RuntimeError, match="this kernel was called"):
        mk.merge_deltas(X, [X], [1], backend="cpu")
