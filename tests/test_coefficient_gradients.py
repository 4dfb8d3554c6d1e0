"""coefficient_gradients: within the derived bound, repeatable, with gram's bits."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import reference
from mergekern.check import name_of

import cases
from accuracy import assert_bits_equal, assert_within
from cases import CHUNK, Case
from refusal import refused
from serving import affordable, in_turn

OP = "coefficient_gradients"
Inputs = tuple[Tensor, list[Tensor], Tensor | None]


def inputs(
    case: Case, device: str, *, grad: torch.dtype | None = None, based: bool = True
) -> Inputs:
    """A gradient, perhaps of a dtype of its own, n tensors, and a base or none."""
    base, *xs = dataclasses.replace(case, n=case.n + 1).tensors(device)
    alone = dataclasses.replace(case, n=1, dtype=grad or case.dtype)
    return alone.tensors(device, seed=1)[0], xs, base if based else None


def call(given: Inputs, **options: Any) -> Tensor:
    grad, xs, base = given
    return mk.coefficient_gradients(grad, xs, base=base, **options)


def oracle(given: Inputs) -> Tensor:
    grad, xs, base = given
    out = torch.empty(len(xs), dtype=torch.float64)
    zero = None if base is None else base.cpu()
    reference.coefficient_gradients(out, grad.cpu(), [x.cpu() for x in xs], zero)
    return out


def bound(given: Inputs, sums: int = 1) -> Tensor:
    """The docstring's (numel + 2) 2**-53 <|grad|, |x - base|>, for each of `sums` computations.

    Products below the normal numbers lose up to half of the smallest one each.
    """
    grad, xs, base = given
    zero = 0 if base is None else base.cpu().double()
    size = oracle((grad.abs(), [(x.cpu().double() - zero).abs() for x in xs], None))
    return sums * (1.0001 * (grad.numel() + 2) * 2.0**-53 * size + grad.numel() * 2.0**-1074)


def exact(given: Inputs) -> Tensor:
    """Products of rational numbers, rounded once."""
    grad, xs, base = given
    g, *rows = [[Fraction(v) for v in x.cpu().reshape(-1).tolist()] for x in (grad, *xs)]
    zero = [Fraction(0)] * len(g) if base is None else map(Fraction, base.cpu().tolist())
    origin = list(zero)
    dots = [float(sum(a * (v - z) for a, v, z in zip(g, row, origin))) for row in rows]
    return torch.tensor(dots, dtype=torch.float64)


# ---- numbers ---------------------------------------------------------------------------------

MIXED = (
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
)
NUMBERS = [Case(shape=(size,)) for size in cases.SIZES]
NUMBERS += [Case(shape=s, layout=k) for s in cases.SHAPES for k in cases.LAYOUTS]
NUMBERS += [Case(values=v) for v in cases.VALUES]
NUMBERS += [Case(shape=(1025,), n=n) for n in cases.MODELS]


@pytest.mark.parametrize("case", NUMBERS, ids=str)
def test_near_the_oracle(case: Case, backend: str, device: str) -> None:
    turn = NUMBERS.index(case)
    for grad, dtype in in_turn(backend, MIXED, turn):
        own = dataclasses.replace(case, dtype=dtype)
        for based in in_turn(backend, (False, True), turn // 2):
            given = inputs(own, device, grad=grad, based=based)
            got = call(given, backend=backend)
            assert got.dtype == torch.float64
            assert_within(got, oracle(given), bound(given, sums=2))


@pytest.mark.parametrize("based", [False, True], ids=["alone", "base"])
@pytest.mark.parametrize("kind", ["normal", "tiny", "subnormal", "ties"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_error_is_within_the_bound(
    dtype: torch.dtype, kind: str, based: bool, backend: str, device: str
) -> None:
    given = inputs(Case(shape=(257,), n=3, dtype=dtype, values=kind), device, based=based)
    assert_within(call(given, backend=backend), exact(given), bound(given))


def test_differences_and_products_are_float64(backend: str, device: str) -> None:
    """float32 would lose the low bits of both."""
    x = torch.tensor([1.0, 2.0**-30], device=device)
    base = torch.tensor([2.0**-25, 0.0], device=device)
    grad = torch.tensor([1 + 2.0**-23, 2.0**-30], device=device)
    got = call((grad, [x], base), backend=backend).item()
    assert got == (1 + 2.0**-23) * (1 - 2.0**-25) + 2.0**-60


def test_across_chunks(backend: str, device: str) -> None:
    n = affordable(backend, 2 * CHUNK + 17)
    for dtype in in_turn(backend, (torch.float32, torch.bfloat16), 1):
        grad, xs, base = inputs(Case(shape=(n,), dtype=dtype), device, grad=torch.float32)
        assert base is not None
        given = (grad, [*xs, base], base)
        got = call(given, backend=backend)
        assert_within(got, oracle(given), bound(given, sums=2))
        assert got[-1] == 0


@pytest.mark.parametrize("special", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("where", ["grad", "x", "base"])
def test_non_finite_values_propagate(where: str, special: float, backend: str, device: str) -> None:
    grad, xs, base = inputs(Case(shape=(300,)), device)
    assert base is not None
    {"grad": grad, "x": xs[1], "base": base}[where][299] = special
    given = grad, xs, base
    got = call(given, backend=backend)
    assert_within(got, oracle(given), bound(given, sums=2))
    finite = [0, 2] if where == "x" else []
    assert got.isfinite().nonzero().flatten().tolist() == finite


def test_a_gradient_of_zero_does_not_hide_an_infinity(backend: str, device: str) -> None:
    x = torch.tensor([math.inf, 1.0], device=device)
    grad = torch.tensor([0.0, 1.0], device=device)
    assert call((grad, [x, grad], None), backend=backend).isnan().tolist() == [True, False]


# ---- bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(
    threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(Case(shape=(affordable(backend, 2 * CHUNK + 17),), n=2), device)
    monkeypatch.setenv("MERGEKERN_THREADS", "1")
    once = call(given, backend=backend)
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    for _ in range(3):
        assert_bits_equal(call(given, backend=backend), once)


def test_layout_does_not_change_bits(backend: str, device: str) -> None:
    given = inputs(Case(shape=(64, 65)), device)
    once = call(given, backend=backend)
    grad, xs, base = given
    for layout in ("transposed", "sliced", "misaligned"):
        lay = cases.LAYOUTS[layout]
        moved = lay(grad), [lay(xs[0]), *xs[1:]], lay(base)
        again = call(moved, backend=backend)
        if backend == "torch":  # its matrix products may differ in order between layouts
            assert_within(again, once, bound(given, sums=2))
        else:
            assert_bits_equal(again, once)


@pytest.mark.parametrize("length", [9, 1031, CHUNK + 1031])
def test_bits_are_those_of_gram_and_of_the_pair(length: int, cpu_backend: Any) -> None:
    """Of every task vector alone, whatever stands beside it."""
    for dtype in cases.DTYPES:
        grad, xs, base = inputs(Case(shape=(length,), n=6, dtype=dtype), "cpu")
        assert base is not None
        got = call((grad, xs, base), backend="cpu")
        deltas = [x.double() - base.double() for x in xs]  # the kernel's
        dots = mk.gram([grad.double(), *deltas], backend="cpu")
        assert_bits_equal(got, dots[0, 1:])
        assert_bits_equal(call((grad, xs[2:3], base), backend="cpu"), got[2:3])
        assert_bits_equal(
            call((grad, xs, None), backend="cpu"), mk.gram([grad, *xs], backend="cpu")[0, 1:]
        )


def test_the_bound_of_blocks(cpu_backend: Any) -> None:
    """A sum that only grows, by a product that rounds: the docstring's bound for this backend."""
    x = torch.full((2 * CHUNK + 17,), 1 / 3, dtype=torch.float64)
    length = len(x)
    exact_ = float(Fraction(1 / 3) ** 2 * length)
    limit = (min(length, CHUNK) / 512 + length / CHUNK + 66) * 2.0**-53 * exact_
    got = call((x, [x], None), backend="cpu")
    assert_within(got, *(torch.tensor([v], dtype=torch.float64) for v in (exact_, limit)))


# ---- out and the door ------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3])
def test_out(step: int, backend: str, device: str) -> None:
    given = inputs(Case(shape=(300,)), device)
    buffer, out = cases.guarded((3,), torch.float64, device, step)
    assert call(given, out=out, backend=backend).data_ptr() == out.data_ptr()
    assert_bits_equal(out, call(given, backend=backend))
    assert cases.untouched(buffer, out)


def test_out_that_overlaps_is_refused() -> None:
    buffer = torch.ones(20, dtype=torch.float64)
    for given in (
        (buffer[:2], [X64], X64),
        (X64, [X64, buffer[:2]], None),
        (X64, [X64, X64], buffer[:2]),
    ):
        with refused(OP, "overlaps an input"):
            call(given, out=buffer[1 : 1 + len(given[1])])
    assert bool((buffer == 1).all())


def test_numpy_inputs_and_parameters(backend: str, device: str) -> None:
    grad, xs, base = inputs(Case(shape=(31, 33)), device)
    expected = call((grad, xs, base), backend=backend)
    given = [x.numpy() for x in xs] if device == "cpu" else xs
    assert_bits_equal(call((grad, given, torch.nn.Parameter(base)), backend=backend), expected)


X = torch.zeros(3)
X64 = torch.zeros(2, dtype=torch.float64)
REFUSALS: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "empty": ((X, []), {}, "xs is empty"),
    "one tensor": ((X, X), {}, "xs is no list; got one tensor"),
    "no gradient": ((None, [X]), {}, "grad is no tensor; got NoneType"),
    "shapes": ((X, [X, torch.zeros(4)]), {}, "xs[1] differs from xs[0] in shape"),
    "dtypes": ((X, [X, X.half()]), {}, "xs[1] differs from xs[0] in dtype"),
    "grad shape": ((X[:1], [X]), {}, "grad differs from xs[0] in shape; got (1,); expected (3,)"),
    "grad device": ((X.to("meta"), [X]), {}, "grad holds no plain data"),
    "grad integers": ((X.int(), [X]), {}, "grad has an unsupported dtype; got int32"),
    "base shape": ((X, [X]), {"base": torch.zeros(2)}, "base differs from xs[0] in shape"),
    "base dtype": ((X, [X]), {"base": X.double()}, "base differs from xs[0] in dtype"),
    "out dtype": ((X, [X]), {"out": torch.zeros(1)}, "out does not fit the result"),
    "out shape": ((X, [X]), {"out": X64}, "out does not fit the result"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    args, kwargs, words = REFUSALS[what]
    with refused(OP, words):
        mk.coefficient_gradients(*args, **kwargs)


def test_the_kernel_is_the_compiled_one(cpu_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**kwargs: object) -> None:
        raise RuntimeError("this kernel was called")

    monkeypatch.setattr(cpu_backend._cpu, OP, broken)
    with pytest.raises(RuntimeError, match="this kernel was called"):
        mk.coefficient_gradients(X, [X], backend="cpu")


def test_what_autograd_finds(backend: str, device: str) -> None:
    """The gradients of a loss of base + sum_t c_t (x_t - base), in float64."""
    grad, xs, base = inputs(Case(shape=(31, 33), dtype=torch.float64), device)
    assert base is not None
    coefficients = torch.full((3,), 0.3, dtype=torch.float64, device=device, requires_grad=True)
    merged = base + sum(c * (x - base) for c, x in zip(coefficients, xs))
    (merged * grad).sum().backward()
    assert coefficients.grad is not None
    got = call((grad, xs, base), backend=backend)
    assert_within(got, coefficients.grad, bound((grad, xs, base), sums=2))
