"""weighted_sum: the same bits on every backend, and these bits near the truth."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import reference
from mergekern.check import name_of, sum_accumulator

import cases
import elementwise
from accuracy import assert_backend_bits, assert_bits_equal, assert_within, half_ulp
from cases import CATALOGUE, LARGE, Case, values
from refusal import refused

OP = "weighted_sum"


def specified(
    xs: list[Tensor],
    weights: list[float],
    divisor: float = 1.0,
    *,
    dtype: torch.dtype | None = None,
    acc: torch.dtype | None = None,
) -> Tensor:
    """What the formula gives in `acc`, by default the accumulator that the op promises."""
    xs = [x.cpu() for x in xs]
    out = torch.empty(xs[0].shape, dtype=dtype or xs[0].dtype)
    reference.weighted_sum(out, xs, weights, divisor, acc=acc or sum_accumulator(xs[0].dtype))
    return out


# ---- bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CATALOGUE, ids=str)
def test_bits_of_the_specified_arithmetic(case: Case, backend: str, device: str) -> None:
    xs, weights = case.tensors(device), case.weights()
    got = mk.weighted_sum(xs, weights, backend=backend)
    assert_backend_bits(got, specified(xs, weights), backend)


@pytest.mark.parametrize("kind", cases.VALUES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_bits_with_normalize(dtype: torch.dtype, kind: str, backend: str, device: str) -> None:
    case = Case(dtype=dtype, values=kind, n=5)
    xs, weights = case.tensors(device), case.weights()
    got = mk.weighted_sum(xs, weights, normalize=True, backend=backend)
    assert_backend_bits(got, specified(xs, weights, sum(weights)), backend)


@pytest.mark.parametrize("kind", ["normal", "huge", "tiny", "mixed"])
@pytest.mark.parametrize("to", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_bits_of_another_result_dtype(
    dtype: torch.dtype, to: torch.dtype, kind: str, backend: str, device: str
) -> None:
    case = Case(shape=(513,), dtype=dtype, values=kind)
    xs, weights = case.tensors(device), case.weights()
    expected = specified(xs, weights, dtype=to)
    assert_backend_bits(
        mk.weighted_sum(xs, weights, out_dtype=to, backend=backend), expected, backend
    )
    out = torch.empty(513, dtype=to, device=device)
    assert_backend_bits(mk.weighted_sum(xs, weights, out=out, backend=backend), expected, backend)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_bits_across_chunks(case: Case, backend: str, device: str) -> None:
    xs, weights = case.tensors(device), case.weights()
    got = mk.weighted_sum(xs, weights, normalize=True, backend=backend)
    assert_backend_bits(got, specified(xs, weights, sum(weights)), backend)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_bits_across_chunks_of_strided_tensors(layout: str, backend: str, device: str) -> None:
    case = Case(shape=(521, 3, 337), n=2, dtype=torch.bfloat16, layout=layout)
    xs, weights = case.tensors(device), case.weights()
    got = mk.weighted_sum(xs, weights, backend=backend)
    assert_backend_bits(got, specified(xs, weights), backend)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(
    threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    case = Case(shape=(3 * cases.CHUNK + 17,), n=2, values="mixed")
    xs, weights = case.tensors(device), case.weights()
    got = mk.weighted_sum(xs, weights, backend=backend)
    assert_backend_bits(got, specified(xs, weights), backend)


# ---- the result against the truth ------------------------------------------------------------


def truth(xs: list[Tensor], weights: list[float], divisor: float) -> tuple[Tensor, Tensor]:
    """The exact sum and the exact sum of magnitudes, each rounded once to float64."""
    rows = [[Fraction(v) * Fraction(w) for v in x.tolist()] for x, w in zip(xs, weights)]
    exact = [float(sum(column) / Fraction(divisor)) for column in zip(*rows)]
    size = [float(sum(map(abs, column)) / abs(Fraction(divisor))) for column in zip(*rows)]
    return torch.tensor(exact, dtype=torch.float64), torch.tensor(size, dtype=torch.float64)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("kind", cases.FINITE_VALUES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_error_is_within_the_bound(
    dtype: torch.dtype, kind: str, normalize: bool, backend: str, device: str
) -> None:
    case = Case(shape=(257,), n=7, dtype=dtype, values=kind)
    xs, weights = case.tensors(device), case.weights()
    divisor = sum(weights) if normalize else 1.0
    got = mk.weighted_sum(xs, weights, normalize=normalize, backend=backend)
    oracle, size = truth([x.cpu() for x in xs], weights, divisor)
    # n + 1 roundings reach a term (its weight, its product, n - 1 sums); a division adds the
    # rounding of the divisor and its own. Each product or quotient may also lose half of the
    # accumulator's smallest number, and the store half a unit of the result.
    info = torch.finfo(sum_accumulator(dtype))
    least = info.smallest_normal * info.eps
    roundings = case.n + 1 + 2 * normalize
    error = 1.0001 * roundings * info.eps / 2 * size + (case.n + 1) * least
    unit = half_ulp(oracle.abs() + error, dtype)
    truncated = backend == "triton" and dtype == torch.bfloat16  # its interpreter: a whole unit
    assert_within(got, oracle, error + (2 if truncated else 1) * unit + oracle.abs() * 2.0**-53)


def test_weights_are_not_rounded_to_the_dtype(backend: str, device: str) -> None:
    x = torch.ones(5, dtype=torch.bfloat16, device=device)
    weight = 1 + 2.0**-20
    got = mk.weighted_sum([x], [weight], out_dtype=torch.float32, backend=backend)
    assert_bits_equal(got, torch.full((5,), weight))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_sums_are_not_contracted_or_reordered(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    # 3 * (1/3 rounded) rounds to 1, a fused multiply-add would leave a rest; and 2**24 + 1 + 1
    # (2**53 in float64) in order stays what it was.
    acc = sum_accumulator(dtype)

    def total(values: list[float], weights: list[float]) -> float:
        xs = [torch.tensor([v], dtype=dtype, device=device) for v in values]
        return mk.weighted_sum(xs, weights, out_dtype=acc, backend=backend).item()

    third = torch.tensor(1 / 3, dtype=torch.float64).to(acc).item()
    assert total([-1.0, 3.0], [1.0, third]) == 0.0
    limit = 1 / (torch.finfo(acc).eps / 2)
    assert total([1.0] * 3, [limit, 1, 1]) == limit
    assert total([1.0] * 3, [1, 1, limit]) == limit + 2


def test_float32_sums_show_no_rounding_but_their_own(backend: str, device: str) -> None:
    """What float32 sums would lose: the terms cancel down to their last bits."""
    case = Case(shape=(1031,), n=8)
    xs = case.tensors(device)
    weights = [0.1, 0.3, 0.7, 1.1, -0.1, -0.3, -0.7, -1.1 + 2.0**-20]
    xs = [*xs[:4], *(x * (1 + 2.0**-23) for x in xs[:4])]
    got = mk.weighted_sum(xs, weights, backend=backend)
    oracle, size = truth([x.cpu() for x in xs], weights, 1.0)
    error = 1.0001 * (case.n + 1) * 2.0**-53 * size
    assert_within(got, oracle, error + half_ulp(oracle.abs() + error, torch.float32))


@pytest.mark.parametrize(
    ("to", "value", "once"),
    [
        (torch.bfloat16, 1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-7),
        (torch.bfloat16, -(1 + 2.0**-8 + 2.0**-40), -(1 + 2.0**-7)),
        (torch.bfloat16, 1 + 3 * 2.0**-8 - 2.0**-40, 1 + 2.0**-7),
        (torch.float16, 1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-10),
        (torch.float16, 65520 - 2.0**-30, 65504.0),
        (torch.float16, 2.0**-25 + 2.0**-70, 2.0**-24),
        (torch.float16, -(2.0**-25), -0.0),
        (torch.bfloat16, 1e300, math.inf),
        (torch.bfloat16, -1e-300, -0.0),
    ],
    ids=lambda v: name_of(v) if isinstance(v, torch.dtype) else repr(v),
)
def test_float64_is_rounded_once(
    to: torch.dtype, value: float, once: float, backend: str, device: str
) -> None:
    """By way of float32 these would be rounded twice, to the other neighbour."""
    x = torch.full((3,), value, dtype=torch.float64, device=device)
    got = mk.weighted_sum([x], [1.0], out_dtype=to, backend=backend)
    expected = torch.full((3,), once, dtype=to)
    assert_backend_bits(got, expected, backend)
    assert_bits_equal(specified([x], [1.0], dtype=to), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_every_16_bit_number_is_read_and_stored(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    """All patterns to float32 and back; from float32 all halfway points and their neighbours."""
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    wide = mk.weighted_sum([patterns.to(device)], [1], out_dtype=torch.float32, backend=backend)
    assert_bits_equal(wide, patterns.float())
    assert_bits_equal(mk.weighted_sum([wide], [1], out_dtype=dtype, backend=backend), patterns)

    if backend == "triton" and dtype == torch.bfloat16:
        return  # its interpreter truncates, so halves are not rounded
    bits = patterns.float().view(torch.int32)
    half = 1 << (12 if dtype == torch.float16 else 15)
    near = torch.cat([bits + d for d in (half - 1, half, half + 1, 1)]).view(torch.float32)
    got = mk.weighted_sum([near.to(device)], [1], out_dtype=dtype, backend=backend)
    assert_bits_equal(got, near.to(dtype))


def test_non_finite_values_propagate(backend: str, device: str) -> None:
    inf, nan = math.inf, math.nan
    a = torch.tensor([inf, inf, nan, 1.0, 0.0], device=device)
    b = torch.tensor([1.0, -inf, 1.0, nan, inf], device=device)
    got = mk.weighted_sum([a, b], [1, 1], backend=backend)
    assert_bits_equal(got, torch.tensor([inf, nan, nan, nan, inf]))
    got = mk.weighted_sum([a, b], [0, 1], backend=backend)
    assert_bits_equal(got, torch.tensor([nan, nan, nan, nan, inf]))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_divisor_that_leaves_float32(dtype: torch.dtype, backend: str, device: str) -> None:
    """A sum of weights is rounded to the accumulator; float32 makes it 0 or infinity."""
    x = torch.tensor([0.0, 1.0, -1.0], dtype=dtype, device=device)
    for weight in (1e300, 1e-300):
        got = mk.weighted_sum([x], [weight], normalize=True, backend=backend)
        assert_bits_equal(got, specified([x], [weight], weight))


# ---- out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_out(dtype: torch.dtype, backend: str, device: str) -> None:
    case = Case(shape=(3, 7, 53), dtype=dtype, layout="sliced", mixed_layouts=True)
    xs, weights = case.tensors(device), case.weights()
    expected = specified(xs, weights)

    def call(xs: list[Tensor], out: Tensor) -> Tensor:
        return mk.weighted_sum(xs, weights, out=out, backend=backend)

    elementwise.assert_writes_only_out(call, xs, expected, backend)
    elementwise.assert_transposed_out(call, xs, expected, backend)
    elementwise.assert_in_place(call, xs, expected, backend)
    elementwise.assert_in_place(call, [x.contiguous() for x in xs], expected, backend)


def test_out_may_be_an_input_that_is_given_twice(backend: str, device: str) -> None:
    x = values((1031,), torch.float32).to(device)
    expected = specified([x, x, x], [0.1, 0.2, 0.3])
    mk.weighted_sum([x, x, x], [0.1, 0.2, 0.3], out=x, backend=backend)
    assert_backend_bits(x, expected, backend)


def test_inputs_stay_as_they_are(backend: str, device: str) -> None:
    xs = Case(shape=(31, 33), layout="odd").tensors(device)
    before = [x.clone() for x in xs]
    mk.weighted_sum(xs, [1, 2, 3], backend=backend)
    for x, y in zip(xs, before, strict=True):
        assert_bits_equal(x, y)


def test_result_is_contiguous_and_detached(backend: str, device: str) -> None:
    x = values((4, 5), torch.float32).to(device).T.requires_grad_()
    got = mk.weighted_sum([x, x], [1, 2], backend=backend)
    assert got.is_contiguous()
    assert not got.requires_grad


def test_bad_out_is_refused() -> None:
    elementwise.assert_refuses_bad_out(
        OP,
        lambda xs, out: mk.weighted_sum(xs, [1, 2], out=out),
        [torch.zeros(100), torch.zeros(100)],
    )


@pytest.mark.parametrize("to", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("start", range(0, 20, 3))
def test_streamed_stores(
    start: int, to: torch.dtype, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large results bypass the caches; here small ones do, at every alignment."""
    monkeypatch.setattr(cpu_backend, "STREAM", 0)
    for dtype in (torch.float32, torch.float64):
        for n in (1, 5, 63, 1023, 1025, 2100):
            xs = Case(shape=(n,), dtype=dtype, values="mixed").tensors()
            buffer = torch.full((n + 64,), cases.SENTINEL, dtype=to)
            out = buffer[start : start + n]
            mk.weighted_sum(xs, [1, 2, 3], out=out, backend="cpu")
            assert_bits_equal(out, specified(xs, [1, 2, 3], dtype=to))
            assert cases.untouched(buffer, out)


def test_streamed_stores_at_the_size_that_starts_them(cpu_backend: Any) -> None:
    n = cpu_backend.STREAM // 4 + 3
    x = values((1031,), torch.float32).repeat(-(-n // 1031))[:n]
    assert_bits_equal(mk.weighted_sum([x, x], [1, 2], backend="cpu"), specified([x, x], [1, 2]))
    assert_bits_equal(mk.weighted_sum([x, x], [1, 2], out=x, backend="cpu"), x)


# ---- the door --------------------------------------------------------------------------------


class Producer:
    """An array of another library: nothing but the DLPack protocol."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __dlpack__(self, **kwargs: object) -> object:
        return self.x.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> object:
        return self.x.__dlpack_device__()


def test_numpy_and_dlpack_inputs(backend: str, device: str) -> None:
    x = values((31, 33), torch.float32)
    same = [x, x.numpy(), Producer(x)] if device == "cpu" else [x.to(device)] * 3
    weights = np.array([0.3, 0.2, 0.1])
    got = mk.weighted_sum(same, weights, normalize=True, backend=backend)
    expected = specified([x, x, x], weights.tolist(), sum(weights.tolist()))
    assert_backend_bits(got, expected, backend)


def test_numpy_array_that_is_read_only() -> None:
    """As numpy.load(..., mmap_mode="r") and many libraries hand them out."""
    x = np.arange(5, dtype=np.float32)
    x.flags.writeable = False
    assert_bits_equal(mk.weighted_sum([x, x], [1, 1]), torch.arange(5.0) * 2)


def test_numpy_array_with_negative_strides() -> None:
    """In a process of its own: torch.from_dlpack aborts on such an array."""
    code = (
        "import numpy, mergekern; x = numpy.arange(3, dtype=numpy.float32)[::-1]; "
        "print(mergekern.weighted_sum([x, x], [1, 1]).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[4.0, 2.0, 0.0]", done.stderr


@pytest.mark.parametrize(
    "weights", [(1, 2), [1, 2], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])], ids=type
)
def test_weights_of_any_sequence(weights: object) -> None:
    assert mk.weighted_sum([torch.ones(2), torch.ones(2)], weights).tolist() == [3, 3]


def test_one_model() -> None:
    assert mk.weighted_sum([torch.ones(2)], [3]).tolist() == [3, 3]
    assert mk.weighted_sum([torch.ones(2)], [3], normalize=True).tolist() == [1, 1]


X = torch.zeros(3)
REFUSALS = {
    "empty": (([], []), {}, "xs is empty"),
    "one tensor": ((X, [1, 1, 1]), {}, "xs is no list; got one tensor"),
    "no tensor": (([X, "x"], [1, 1]), {}, "xs[1] is no tensor"),
    "shapes": (([X, torch.zeros(4)], [1, 1]), {}, "xs[1] differs from xs[0] in shape"),
    "broadcast": (([X, torch.zeros(1)], [1, 1]), {}, "(1,)"),
    "dtypes": (([X, X.half()], [1, 1]), {}, "xs[1] differs from xs[0] in dtype"),
    "meta": (([X.to("meta")], [1]), {}, "meta"),
    "devices": (([X, X.to("meta")], [1, 1]), {}, "meta"),
    "sparse": (([X.to_sparse()], [1]), {}, "sparse"),
    "integers": (([X.int()], [1]), {}, "int32"),
    "booleans": (([X.bool()], [1]), {}, "bool"),
    "complex": (([X.cfloat()], [1]), {}, "complex64"),
    "too few weights": (([X, X], [1]), {}, "weights has the wrong length"),
    "too many weights": (([X], [1, 2]), {}, "weights has the wrong length"),
    "NaN weight": (([X, X], [1, math.nan]), {}, "weights[1] is not finite"),
    "infinite weight": (([X, X], [-math.inf, 1]), {}, "weights[0] is not finite"),
    "weight of text": (([X], ["1x"]), {}, "weights[0] is no number"),
    "weights of text": (([X], "1"), {}, "weights is no list"),
    "one number": (([X], 1.0), {}, "weights is no list"),
    "sum of 0": (
        ([X, X], [1, -1]),
        {"normalize": True},
        "weights cannot be normalized; got a sum of 0",
    ),
    "out_dtype": (([X], [1]), {"out_dtype": torch.int32}, "out_dtype"),
    "out of text": (([X], [1]), {"out": "out"}, "out"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    args, kwargs, words = REFUSALS[what]
    with refused(OP, words):
        mk.weighted_sum(*args, **kwargs)


def test_the_kernel_is_the_compiled_one(
    cpu_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a broken `_cpu.weighted_sum` the named backend fails and does not fall back."""

    def broken(**kwargs: object) -> None:
        raise RuntimeError("this kernel was called")

    monkeypatch.setattr(cpu_backend._cpu, OP, broken)
    for backend in ("cpu", "auto"):
        with pytest.raises(RuntimeError, match="this kernel was called"):
            mk.weighted_sum([X], [1], backend=backend)
