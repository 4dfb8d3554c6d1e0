"""weighted_rows: on every row the bits of weighted_sum, on every backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import reference
from mergekern.check import name_of, sum_accumulator

import cases
import elementwise
from accuracy import assert_backend_bits, assert_bits_equal, assert_within, half_ulp
from cases import CATALOGUE, Case, values
from refusal import refused
from serving import affordable_shape

OP = "weighted_rows"
F64 = torch.float64


def table(k: int, n: int) -> Tensor:
    """Weights of both signs, all of them different, none exact in 16 bits."""
    return values((k, n), F64, seed=7) + 0.3


def counts(shape: tuple[int, ...], axis: int) -> list[int]:
    """Every number of rows (axis 0) or columns (axis -1) that a shape offers."""
    dims = shape if axis == 0 else shape[::-1]
    return sorted(set(itertools.accumulate(dims, int.__mul__, initial=1)))


def specified(
    xs: list[Tensor],
    weights: Tensor,
    axis: int = 0,
    *,
    dtype: torch.dtype | None = None,
    acc: torch.dtype | None = None,
) -> Tensor:
    """The formula in `acc`, by default the accumulator that the op promises."""
    xs = [x.cpu() for x in xs]
    out = torch.empty(xs[0].shape, dtype=dtype or xs[0].dtype)
    k = weights.shape[0]
    inner = 1 if axis == -1 else max(1, out.numel() // max(1, k))
    acc = acc or sum_accumulator(xs[0].dtype)
    reference.weighted_rows(out, xs, weights.cpu().double().T, inner, acc=acc)
    return out


# ---- bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("case", CATALOGUE, ids=str)
def test_bits_of_the_specified_arithmetic(case: Case, axis: int, backend: str, device: str) -> None:
    xs = case.tensors(device)
    for k in counts(case.shape, axis):
        weights = table(k, case.n).to(device)
        got = mk.weighted_rows(xs, weights, axis=axis, backend=backend)
        assert_backend_bits(got, specified(xs, weights, axis), backend)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_each_row_is_a_weighted_sum(dtype: torch.dtype, backend: str, device: str) -> None:
    xs = Case(shape=(13, 1, 3, 3), n=5, dtype=dtype, values="mixed").tensors(device)
    weights = table(13, 5)
    got = mk.weighted_rows(xs, weights, backend=backend)
    for r in range(13):
        row = mk.weighted_sum([x[r] for x in xs], weights[r].tolist(), backend=backend)
        assert_bits_equal(got[r], row)
    columns = mk.weighted_rows(xs, table(9, 5), axis=-1, backend=backend)
    for i, j in itertools.product(range(3), range(3)):
        w = table(9, 5)[3 * i + j].tolist()
        column = mk.weighted_sum([x[..., i, j] for x in xs], w, backend=backend)
        assert_bits_equal(columns[..., i, j], column)


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("shape", [(521, 3, 337), (3, 300_007), (300_007, 3)], ids=cases.shape_id)
def test_bits_across_chunks(shape: tuple[int, ...], axis: int, backend: str, device: str) -> None:
    shape = affordable_shape(backend, shape)
    xs = Case(shape=shape, n=2, dtype=torch.bfloat16).tensors(device)
    for k in counts(shape, axis):
        weights = table(k, 2)
        got = mk.weighted_rows(xs, weights, axis=axis, backend=backend)
        assert_backend_bits(got, specified(xs, weights, axis), backend)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(
    threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    shape = affordable_shape(backend, (1021, 771))
    xs, k = Case(shape=shape, n=2, values="mixed").tensors(device), shape[0]
    got = mk.weighted_rows(xs, table(k, 2), backend=backend)
    assert_backend_bits(got, specified(xs, table(k, 2)), backend)


@pytest.mark.parametrize("kind", ["normal", "huge", "tiny", "mixed"])
@pytest.mark.parametrize("to", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_bits_of_another_result_dtype(
    dtype: torch.dtype, to: torch.dtype, kind: str, backend: str, device: str
) -> None:
    xs = Case(shape=(19, 27), dtype=dtype, values=kind).tensors(device)
    expected = specified(xs, table(19, 3), dtype=to)
    got = mk.weighted_rows(xs, table(19, 3), out_dtype=to, backend=backend)
    assert_backend_bits(got, expected, backend)


# ---- the result against the truth ------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("kind", cases.FINITE_VALUES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_error_is_within_the_bound(
    dtype: torch.dtype, kind: str, axis: int, backend: str, device: str
) -> None:
    """The bound of weighted_sum; the float64 oracle may be off by its own n + 1 units."""
    n = 7
    xs = Case(shape=(12, 31), n=n, dtype=dtype, values=kind).tensors(device)
    weights = table(12 if axis == 0 else 31, n)
    got = mk.weighted_rows(xs, weights, axis=axis, backend=backend)
    oracle = specified(xs, weights, axis, dtype=F64, acc=F64)
    size = specified([x.double().abs() for x in xs], weights.abs(), axis)
    info = torch.finfo(sum_accumulator(dtype))
    least = info.smallest_normal * info.eps
    units = info.eps / 2 + 2.0**-53
    error = 1.0001 * (n + 1) * units * size + (n + 1) * least
    assert_within(got, oracle, error + half_ulp(oracle.abs() + error, dtype))


def test_weights_that_are_not_finite(backend: str, device: str) -> None:
    x = torch.ones(4, 3, device=device)
    weights = torch.tensor([[math.nan, 1], [math.inf, 1], [math.inf, -math.inf], [1, 1]])
    got = mk.weighted_rows([x, x], weights, backend=backend)
    expected = torch.tensor([math.nan, math.inf, math.nan, 2.0])[:, None].expand(4, 3)
    assert_bits_equal(got, expected)


# ---- weights and out -------------------------------------------------------------------------


def test_weights_of_any_kind(backend: str, device: str) -> None:
    xs = Case(shape=(12, 31), n=2).tensors(device)
    weights = table(12, 2).float()
    expected = specified(xs, weights)
    for same in (
        weights,
        weights.double(),
        weights.numpy(),
        weights.T.contiguous().T,
        weights.repeat_interleave(3, 1)[:, ::3],
        weights.requires_grad_(),
    ):
        assert_backend_bits(mk.weighted_rows(xs, same, backend=backend), expected, backend)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_out(dtype: torch.dtype, backend: str, device: str) -> None:
    case = Case(shape=(3, 7, 53), dtype=dtype, layout="sliced", mixed_layouts=True)
    xs, weights = case.tensors(device), table(21, 3)
    expected = specified(xs, weights)

    def call(xs: list[Tensor], out: Tensor) -> Tensor:
        return mk.weighted_rows(xs, weights, out=out, backend=backend)

    elementwise.assert_writes_only_out(call, xs, expected, backend)
    elementwise.assert_transposed_out(call, xs, expected, backend)
    elementwise.assert_in_place(call, xs, expected, backend)
    elementwise.assert_in_place(call, [x.contiguous() for x in xs], expected, backend)


def test_bad_out_is_refused() -> None:
    elementwise.assert_refuses_bad_out(
        OP,
        lambda xs, out: mk.weighted_rows(xs, torch.ones(1, 2), out=out),
        [torch.zeros(100), torch.zeros(100)],
    )
    weights = torch.ones(6, 2, dtype=F64)
    with refused(OP, "overlaps an input"):
        x = torch.ones(6, dtype=F64)
        mk.weighted_rows([x, x], weights, out=weights.view(-1)[:6])


def test_inputs_stay_as_they_are(backend: str, device: str) -> None:
    xs = Case(shape=(31, 33), layout="odd").tensors(device)
    weights = table(31, 3)
    before = [x.clone() for x in [*xs, weights]]
    mk.weighted_rows(xs, weights, backend=backend)
    for x, y in zip([*xs, weights], before, strict=True):
        assert_bits_equal(x, y)


X = torch.zeros(4, 3)
W = torch.ones(4, 2)
REFUSALS: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "empty": (([], W), {}, "xs is empty"),
    "one tensor": ((X, W), {}, "xs is no list; got one tensor"),
    "shapes": (([X, torch.zeros(4)], W), {}, "xs[1] differs from xs[0] in shape"),
    "integers": (([X.int()], W), {}, "int32"),
    "list": (([X, X], [[1, 1]]), {}, "weights is no tensor"),
    "half": (([X, X], W.half()), {}, "weights have another dtype; got float16"),
    "one row": (([X, X], W[0]), {}, "weights have another shape; got [2]; expected [K, 2]"),
    "models": (([X], W), {}, "weights have another shape; got [4, 2]; expected [K, 1]"),
    "rows": (([X, X], W[:3]), {}, "weights do not fit the rows; got K = 3"),
    "columns": (([X, X], W), {"axis": -1}, "trailing dimensions of [4, 3]: [1, 3, 12]"),
    "axis": (([X, X], W), {"axis": 1}, "axis is unknown; got 1"),
    "out_dtype": (([X, X], W), {"out_dtype": torch.int32}, "out_dtype"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    args, kwargs, words = REFUSALS[what]
    with refused(OP, words):
        mk.weighted_rows(*args, **kwargs)


def test_the_kernel_is_the_compiled_one(cpu_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**kwargs: object) -> None:
        raise RuntimeError("this kernel was called")

    monkeypatch.setattr(cpu_backend._cpu, OP, broken)
    for backend in ("cpu", "auto"):
        with pytest.raises(RuntimeError, match="this kernel was called"):
            mk.weighted_rows([X, X], W, backend=backend)
