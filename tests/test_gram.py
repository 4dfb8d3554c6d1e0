"""gram: within the derived bound of the exact products, symmetric and repeatable."""

from __future__ import annotations

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
from cases import CATALOGUE, CHUNK, Case, values
from refusal import refused
from serving import affordable, affordable_shape, in_turn, interpreted

OP = "gram"


def oracle(xs: list[Tensor], base: Tensor | None) -> Tensor:
    xs = [x.cpu() for x in xs]
    out = torch.empty(len(xs), len(xs), dtype=torch.float64)
    reference.gram(out, xs, None if base is None else base.cpu())
    return out


def magnitude(xs: list[Tensor], base: Tensor | None) -> Tensor:
    """<|x_i - base|, |x_j - base|>, which the bound is a share of."""
    rows = [x.cpu().double() - (0 if base is None else base.cpu().double()) for x in xs]
    return oracle([r.abs() for r in rows], None)


def bound(xs: list[Tensor], base: Tensor | None, sums: int = 1) -> Tensor:
    """The docstring's (numel + 2) 2**-53, for each of `sums` float64 computations compared.

    Products below the normal numbers lose up to half of the smallest one each.
    """
    numel = xs[0].numel()
    return sums * (1.0001 * (numel + 2) * 2.0**-53 * magnitude(xs, base) + numel * 2.0**-1074)


def exact(xs: list[Tensor], base: Tensor | None) -> Tensor:
    """Products of rational numbers, rounded once."""
    rows = [[Fraction(v) for v in x.cpu().reshape(-1).tolist()] for x in xs]
    if base is not None:
        zero = [Fraction(v) for v in base.cpu().reshape(-1).tolist()]
        rows = [[v - z for v, z in zip(row, zero)] for row in rows]
    dots = [[float(sum(a * b for a, b in zip(r, s))) for s in rows] for r in rows]
    return torch.tensor(dots, dtype=torch.float64)


# ---- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CATALOGUE, ids=str)
def test_near_the_oracle(case: Case, backend: str, device: str) -> None:
    xs = case.tensors(device)
    got = mk.gram(xs, backend=backend)
    assert got.dtype == torch.float64
    assert got.shape == (case.n, case.n)
    assert_bits_equal(got, got.T)
    assert_within(got, oracle(xs, None), bound(xs, None, sums=2))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_near_the_oracle_with_base(
    dtype: torch.dtype, layout: str, backend: str, device: str
) -> None:
    base, *xs = Case(shape=(29, 5, 7), n=5, dtype=dtype, layout=layout).tensors(device)
    got = mk.gram(xs, base=base, backend=backend)
    assert_within(got, oracle(xs, base), bound(xs, base, sums=2))
    mixed = mk.gram([x.contiguous() for x in xs], base=base, backend=backend)
    assert_within(mixed, oracle(xs, base), bound(xs, base, sums=2))


@pytest.mark.parametrize("based", [False, True], ids=["alone", "base"])
@pytest.mark.parametrize("kind", ["normal", "tiny", "subnormal", "ties"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_error_is_within_the_bound(
    dtype: torch.dtype, kind: str, based: bool, backend: str, device: str
) -> None:
    base, *xs = Case(shape=(257,), n=4, dtype=dtype, values=kind).tensors(device)
    origin = base if based else None
    got = mk.gram(xs, base=origin, backend=backend)
    assert_within(got, exact(xs, origin), bound(xs, origin))


def test_differences_and_products_are_float64(backend: str, device: str) -> None:
    """float32 would lose the low bits of both."""
    x = torch.tensor([1.0, 2.0**-30], device=device)
    base = torch.tensor([2.0**-25, 0.0], device=device)
    got = mk.gram([x], base=base, backend=backend).item()
    assert got == (1 - 2.0**-25) ** 2 + 2.0**-60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_across_chunks(dtype: torch.dtype, backend: str, device: str) -> None:
    n = affordable(backend, 2 * CHUNK + 17)
    xs = Case(shape=(n,), n=3, dtype=dtype).tensors(device)
    got = mk.gram(xs, base=xs[0], backend=backend)
    assert_within(got, oracle(xs, xs[0]), bound(xs, xs[0], sums=2))
    assert_bits_equal(got[0], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("special", [math.inf, math.nan], ids=str)
def test_non_finite_values_propagate(special: float, backend: str, device: str) -> None:
    xs = [values((300,), torch.float32, seed=i).to(device) for i in range(3)]
    xs[1][299] = special
    got = mk.gram(xs, backend=backend)
    expected = oracle(xs, None)
    assert not got[1].isfinite().any()
    assert_within(got, expected, bound(xs, None, sums=2))
    assert bool(got[[0, 0, 2], [0, 2, 2]].isfinite().all())


def test_infinities_that_cancel_give_nan(backend: str, device: str) -> None:
    a = torch.tensor([math.inf, 1.0], device=device)
    b = torch.tensor([0.0, 1.0], device=device)
    got = mk.gram([a, b], backend=backend)
    assert_bits_equal(got, torch.tensor([[math.inf, math.nan], [math.nan, 1]]).double())
    got = mk.gram([a, b], base=a, backend=backend)
    assert_bits_equal(got, torch.tensor([[math.nan, math.nan], [math.nan, math.inf]]).double())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(
    threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    xs = Case(shape=(2 * CHUNK + 17,), n=2).tensors(device)
    monkeypatch.setenv("MERGEKERN_THREADS", "1")
    once = mk.gram(xs, backend=backend)
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    for _ in range(3):
        assert_bits_equal(mk.gram(xs, backend=backend), once)


def test_layout_does_not_change_bits(backend: str, device: str) -> None:
    xs = Case(shape=(64, 65), n=3).tensors(device)
    once = mk.gram(xs, backend=backend)
    for layout in ("transposed", "sliced", "misaligned"):
        again = mk.gram([cases.LAYOUTS[layout](x) for x in xs], backend=backend)
        if backend == "torch":  # its matrix products may differ in order between layouts
            assert_within(again, once, bound(xs, None, sums=2))
        else:
            assert_bits_equal(again, once)


def test_bits_are_those_of_the_pair(cpu_backend: Any) -> None:
    """Few vectors go through registers, many through blocks; a pair gives the same either way."""
    for dtype in cases.DTYPES:
        xs = Case(shape=(CHUNK + 1031,), n=9, dtype=dtype).tensors()
        whole = mk.gram(xs, base=xs[3], backend="cpu")
        for few in ([0], [1, 4], [0, 2, 8], [5, 6, 7, 8], [8, 1, 2, 3, 0]):
            got = mk.gram([xs[i] for i in few], base=xs[3], backend="cpu")
            assert_bits_equal(got, whole[few][:, few])


def test_the_bound_of_blocks(cpu_backend: Any) -> None:
    """A sum that only grows, by a product that rounds: the docstring's bound for this backend."""
    x = torch.full((2 * CHUNK + 17,), 1 / 3, dtype=torch.float64)
    length = len(x)
    exact_ = float(Fraction(1 / 3) ** 2 * length)
    steps = min(length, CHUNK) / 512 + length / CHUNK + 66
    bound_ = torch.tensor([[steps * 2.0**-53 * exact_]], dtype=torch.float64)
    assert_within(
        mk.gram([x], backend="cpu"), torch.tensor([[exact_]], dtype=torch.float64), bound_
    )


# ---- along one dimension -----------------------------------------------------------------------


def vectors(x: Tensor, dim: int) -> Tensor:
    """[number of vectors, length], in the order of the result."""
    return (x if x.ndim else x[None]).movedim(dim, -1).reshape(-1, x.shape[dim] if x.ndim else 1)


ALONG = [
    ((31, 33), -1),
    ((31, 33), 0),
    ((7, 1031), 1),
    ((1031, 7), 0),
    ((19, 1100), 0),
    ((5, 1, 3, 3), -1),
    ((5, 1, 3, 3), 0),
    ((2, 3, 5, 7), 1),
    ((2, 3, 5, 7), -2),
    ((1031,), 0),
    ((1, 1), 0),
    ((), 0),
    ((), -1),
]


ALONG_MODELS = (torch.float32, 3), (torch.bfloat16, 2), (torch.float16, 5)


@pytest.mark.parametrize("based", [False, True], ids=["alone", "base"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(("shape", "dim"), ALONG, ids=str)
def test_along_a_dimension(
    shape: tuple[int, ...], dim: int, layout: str, based: bool, backend: str, device: str
) -> None:
    turn = ALONG.index((shape, dim)) + list(cases.LAYOUTS).index(layout)
    for dtype, n in in_turn(backend, ALONG_MODELS, turn):
        base, *xs = Case(shape=shape, n=n + 1, dtype=dtype, layout=layout).tensors(device)
        origin = base if based else None
        got = mk.gram(xs, base=origin, dim=dim, backend=backend)
        others = [size for d, size in enumerate(shape) if d != dim % len(shape)]
        assert got.shape == (*others, n, n)
        assert_bits_equal(got, got.mT)
        rows = [vectors(x, dim) for x in xs]
        zeros = None if origin is None else vectors(origin, dim)
        for r, dots in enumerate(got.view(-1, n, n)):
            pair = [x[r] for x in rows], None if zeros is None else zeros[r]
            assert_within(dots, oracle(*pair), bound(*pair, sums=2))


def test_along_a_dimension_is_the_whole_of_each_vector(cpu_backend: Any) -> None:
    """Bit for bit, also where vectors are longer than a chunk's block or strided."""
    for shape, dim in (((3, CHUNK // 2 + 5), 1), ((1031, 300), 0), ((300, 1031), 1)):
        xs = Case(shape=shape, n=2, layout="sliced").tensors()
        got = mk.gram(xs, base=xs[1], dim=dim, backend="cpu")
        for r in (0, len(got) - 1):
            row = [x.movedim(dim, -1)[r] for x in xs]
            assert_bits_equal(got[r], mk.gram(row, base=row[1], backend="cpu"))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_along_a_dimension_of_a_large_strided_tensor(dim: int, backend: str, device: str) -> None:
    """No axis lies beside another in memory, and it is too large to be copied at once."""
    shape = affordable_shape(backend, (60, 70, 2 * 300))
    x = values(shape, torch.float32).to(device)[:, :, ::2].transpose(0, 1)
    assert x.numel() > 1 << 20 or interpreted(backend)
    got = mk.gram([x, x], dim=dim, backend=backend)
    norms = x.double().square().sum(dim)
    limit = 2 * (x.shape[dim] + 2) * 2.0**-53 * norms
    for i, j in ((0, 0), (0, 1), (1, 1)):
        assert_within(got[..., i, j], norms, limit)


def test_many_columns(backend: str, device: str) -> None:
    """More than one task and block takes."""
    xs = [x[:, 3:] for x in Case(shape=(700, 1303), n=2).tensors(device)]
    got = mk.gram(xs, base=xs[1], dim=0, backend=backend)
    delta = xs[0].double() - xs[1].double()
    limit = 2 * 702 * 2.0**-53 * delta.square().sum(0)
    assert_within(got[:, 0, 0], delta.square().sum(0), limit)
    assert not got[:, 1].any()


def test_long_vectors_side_by_side(backend: str, device: str) -> None:
    """More chunks of a vector than a warp adds up."""
    xs = Case(shape=(affordable(backend, 70_000), 2), n=2).tensors(device)
    got = mk.gram(xs, dim=0, backend=backend)
    for r in range(2):
        pair = [x[:, r] for x in xs]
        assert_within(got[r], oracle(pair, None), bound(pair, None, sums=2))


@pytest.mark.parametrize(("shape", "dim"), [((0, 4), 0), ((0, 4), 1), ((3, 0, 2), 1), ((0,), 0)])
def test_along_a_dimension_without_elements(
    shape: tuple[int, ...], dim: int, backend: str, device: str
) -> None:
    x = torch.zeros(shape, device=device)
    got = mk.gram([x, x], dim=dim, backend=backend)
    others = [size for d, size in enumerate(shape) if d != dim]
    assert_bits_equal(got, torch.zeros(*others, 2, 2, dtype=torch.float64))


def test_non_finite_values_stay_in_their_vector(backend: str, device: str) -> None:
    xs = [values((4, 33), torch.float32, seed=i).to(device) for i in range(2)]
    xs[0][1, 3] = math.nan
    xs[1][2, 0] = math.inf
    got = mk.gram(xs, dim=-1, backend=backend)
    assert got[[0, 3]].isfinite().all()
    assert got[1, 0].isnan().all()
    assert got[1, 1, 1].isfinite()
    assert not got[2, 1].isfinite().any()


@pytest.mark.parametrize("step", [1, 3])
def test_out_along_a_dimension(step: int, backend: str, device: str) -> None:
    xs = Case(shape=(5, 33), n=2).tensors(device)
    buffer, out = cases.guarded((5, 2, 2), torch.float64, device, step)
    assert mk.gram(xs, dim=1, out=out, backend=backend).data_ptr() == out.data_ptr()
    assert_bits_equal(out, mk.gram(xs, dim=1, backend=backend))
    assert cases.untouched(buffer, out)


@pytest.mark.parametrize("n", [1, 3])
def test_nothing_to_sum_gives_zeros(n: int, backend: str, device: str) -> None:
    got = mk.gram([torch.zeros(0, 4, device=device)] * n, backend=backend)
    assert_bits_equal(got, torch.zeros(n, n, dtype=torch.float64))


# ---- out and the door ------------------------------------------------------------------------


def test_out(backend: str, device: str) -> None:
    xs = Case(shape=(300,), n=3).tensors(device)
    expected = mk.gram(xs, backend=backend)
    for step in (1, 3):
        buffer, out = cases.guarded((3, 3), torch.float64, device, step)
        assert mk.gram(xs, out=out, backend=backend).data_ptr() == out.data_ptr()
        assert_bits_equal(out, expected)
        assert cases.untouched(buffer, out)


def test_out_that_overlaps_is_refused() -> None:
    buffer = torch.ones(20, dtype=torch.float64)
    x, y = buffer[:4], buffer[10:14]
    for out in (x.view(2, 2), y.view(2, 2), buffer[3:7].view(2, 2)):
        with refused(OP, "overlaps an input"):
            mk.gram([x, y], out=out)
    with refused(OP, "overlaps an input"):
        mk.gram([x, y], base=buffer[14:18], out=buffer[14:18].view(2, 2))
    assert bool((buffer == 1).all())


def test_numpy_inputs(backend: str, device: str) -> None:
    xs = Case(shape=(31, 33)).tensors(device)
    given_ = [x.numpy() for x in xs] if device == "cpu" else xs
    assert_bits_equal(mk.gram(given_, backend=backend), mk.gram(xs, backend=backend))


X = torch.zeros(3)
REFUSALS: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "empty": (([],), {}, "xs is empty"),
    "one tensor": ((X,), {}, "xs is no list; got one tensor"),
    "shapes": (([X, torch.zeros(4)],), {}, "xs[1] differs from xs[0] in shape"),
    "dtypes": (([X, X.half()],), {}, "xs[1] differs from xs[0] in dtype"),
    "meta": (([X, X.to("meta")],), {}, "meta"),
    "integers": (([X.int()],), {}, "int32"),
    "base shape": (([X],), {"base": torch.zeros(2)}, "base differs from xs[0] in shape"),
    "base dtype": (([X],), {"base": X.double()}, "base differs from xs[0] in dtype"),
    "dim": (([X],), {"dim": 1}, "dim is out of range; got 1; expected -1 to 0"),
    "dim of a scalar": (([X[0]],), {"dim": 1}, "dim is out of range; got 1; expected -1 to 0"),
    "dim type": (([X],), {"dim": 0.0}, "dim is out of range"),
    "out dtype": (([X],), {"out": torch.zeros(1, 1)}, "out"),
    "out shape": (([X],), {"out": torch.zeros(2, 2, dtype=torch.float64)}, "out"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    args, kwargs, words = REFUSALS[what]
    with refused(OP, words):
        mk.gram(*args, **kwargs)


@pytest.mark.parametrize(("kernel", "dim"), [("gram", None), ("gram_rows", 0)])
def test_the_kernel_is_the_compiled_one(
    kernel: str, dim: int | None, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**kwargs: object) -> None:
        raise RuntimeError("this kernel was called")

    monkeypatch.setattr(cpu_backend._cpu, kernel, broken)
    with pytest.raises(RuntimeError, match="this kernel was called"):
        mk.gram([X], dim=dim, backend="cpu")
