"""linear and passthrough against mergekit: its bits on request, otherwise never less accurate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import reference
from mergekern.check import name_of

import cases
from accuracy import assert_bits_equal, half_ulp
from cases import values
from required import peer

api = peer("mergekit.merge_methods.api", "mergekit")

F64 = torch.float64
# name -> (shape, kind of values, layout)
INPUTS: dict[str, tuple[tuple[int, ...], str, str]] = {
    "random": ((64, 193), "normal", "contiguous"),
    "ties": ((31, 33), "ties", "contiguous"),
    "equal": ((31, 33), "equal", "contiguous"),
    "zeros": ((31, 33), "zeros", "contiguous"),
    "tiny": ((1031,), "tiny", "contiguous"),
    "subnormal": ((1031,), "subnormal", "contiguous"),
    "huge": ((1031,), "huge", "contiguous"),
    "nan": ((31, 33), "nan", "contiguous"),
    "inf": ((31, 33), "infinite", "contiguous"),
    "mixed": ((31, 33), "mixed", "contiguous"),
    "one element": ((1,), "normal", "contiguous"),
    "scalar": ((), "normal", "contiguous"),
    "empty": ((3, 0, 5), "normal", "contiguous"),
    "depthwise": ((257, 1, 3, 3), "normal", "contiguous"),
    "transposed": ((257, 33), "normal", "transposed"),
    "sliced": ((31, 33), "normal", "sliced"),
    "chunks": ((2, 131_075), "normal", "contiguous"),
}
WEIGHTS = {
    "soup": [1.0, 1.0, 1.0],
    "signs": [0.7, -0.4, 0.55],
    "one": [0.3],
    "many": [0.1 * i + 0.3 for i in range(17)],
}


def models(what: str, dtype: torch.dtype, n: int) -> list[Tensor]:
    shape, kind, layout = INPUTS[what]
    return [cases.LAYOUTS[layout](values(shape, dtype, kind, seed=i)) for i in range(n)]


def theirs(xs: list[Tensor], method: str, **parameters: Any) -> Tensor:
    return api.merge_tensors(xs, method, parameters=parameters)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "plain"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("what", INPUTS)
def test_host_mode_has_the_bits(
    what: str, dtype: torch.dtype, weights: str, normalize: bool
) -> None:
    weight = WEIGHTS[weights]
    xs = models(what, dtype, len(weight))
    before = [x.clone() for x in xs]
    expected = theirs(xs, "linear", weight=weight, normalize=normalize)
    got = mk.merge_tensors(xs, "linear", weight=weight, normalize=normalize, host="mergekit")
    assert_bits_equal(got, expected)
    assert got.is_contiguous()
    for x, y in zip(xs, before, strict=True):
        assert_bits_equal(x, y)


def test_host_mode_with_weights_that_cancel() -> None:
    """mergekit divides by 0; by default that is an error."""
    xs = models("zeros", torch.float32, 2)
    got = mk.merge_tensors(xs, "linear", weight=[1, -1], host="mergekit")
    assert_bits_equal(got, theirs(xs, "linear", weight=[1.0, -1.0]))
    with pytest.raises(mk.ArgumentError, match="a sum of 0"):
        mk.merge_tensors(xs, "linear", weight=[1, -1])


@pytest.mark.parametrize("to", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_host_mode_rounds_to_another_dtype_last(
    method: str, dtype: torch.dtype, to: torch.dtype
) -> None:
    xs = models("random", dtype, 3 if method == "linear" else 1)
    parameters = {"weight": WEIGHTS["signs"]} if method == "linear" else {"scale": 0.3}
    expected = theirs(xs, method, **parameters).to(to)
    got = mk.merge_tensors(xs, method, out_dtype=to, host="mergekit", **parameters)
    assert_bits_equal(got, expected)


def exact_linear(xs: list[Tensor], weight: list[float], normalize: bool) -> Tensor:
    out = torch.empty(xs[0].shape, dtype=F64)
    reference.weighted_sum(out, xs, weight, sum(weight) if normalize else 1.0)
    return out


def largest_error(got: Tensor, exact: Tensor) -> float:
    """Over the elements within the dtype's range; a wrong infinity or NaN is an infinite one."""
    errors = (got.double() - exact)[exact.to(got.dtype).isfinite()].abs()
    errors = torch.where(errors.isnan(), math.inf, errors)
    return float(errors.max()) if errors.numel() else 0.0


def assert_no_worse(mine: Tensor, other: Tensor, exact: Tensor) -> None:
    """The largest error is at most mergekit's, or what rounding any sum to the dtype may cost.

    That is half a unit at the largest value, and 2**-14 of it for the sums before the rounding.
    """
    finite = exact[exact.to(mine.dtype).isfinite()].abs()
    top = finite.max() if finite.numel() else torch.zeros((), dtype=F64)
    rounding = float(half_ulp(top, mine.dtype)) * (1 + 2.0**-14)
    assert largest_error(mine, exact) <= max(largest_error(other, exact), rounding)
    assert torch.equal(mine.isnan(), exact.isnan())


def within_sums(xs: list[Tensor], weight: list[float]) -> Tensor:
    """Elements none of whose partial sums leaves the accumulator's range.

    All of them, except for bfloat16, whose values reach as far as the float32 they are summed in.
    """
    if xs[0].dtype != torch.bfloat16:
        return torch.ones(xs[0].shape, dtype=torch.bool)
    finite = [x.nan_to_num(0, 0, 0).abs() for x in xs]
    size = exact_linear(finite, [abs(w) for w in weight], False)
    return size < torch.finfo(torch.float32).max


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "plain"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", cases.DTYPES[:3], ids=name_of)
@pytest.mark.parametrize("what", INPUTS)
def test_by_default_never_less_accurate(
    what: str, dtype: torch.dtype, weights: str, normalize: bool
) -> None:
    weight = WEIGHTS[weights]
    xs = models(what, dtype, len(weight))
    mine = mk.merge_tensors(xs, "linear", weight=weight, normalize=normalize)
    other = theirs(xs, "linear", weight=weight, normalize=normalize)
    clear = within_sums(xs, weight)
    assert clear.all() or what in ("huge", "mixed")
    assert_no_worse(mine[clear], other[clear], exact_linear(xs, weight, normalize)[clear])


def test_bfloat16_products_beyond_float32_are_the_exception() -> None:
    """A product that is rounded by itself overflows where a fused one need not: a known limit."""
    top = torch.finfo(torch.bfloat16).max
    xs = [torch.tensor([v], dtype=torch.bfloat16) for v in (-top, top)]
    mine = mk.merge_tensors(xs, "linear", weight=[1.0, 1.5], normalize=False)
    assert not within_sums(xs, [1.0, 1.5]).any()
    assert_bits_equal(mine, torch.tensor([torch.inf], dtype=torch.bfloat16))
    wide = mk.merge_tensors([x.float() for x in xs], "linear", weight=[1.0, 1.5], normalize=False)
    assert_bits_equal(wide, torch.tensor([top / 2]))


@pytest.mark.parametrize("seed", range(20))
def test_float32_error_is_half_a_unit(seed: int) -> None:
    """Element by element, where mergekit's float32 sums lose more."""
    weight = WEIGHTS["many"]
    xs = [values((10_007,), torch.float32, seed=100 * seed + i) for i in range(len(weight))]
    exact = exact_linear(xs, weight, True)
    # Products, sums and the division, in the op and in the oracle.
    size = exact_linear([x.abs() for x in xs], weight, True)
    limit = half_ulp(exact, torch.float32) + 2 * (len(weight) + 3) * 2.0**-53 * size
    share = [
        float(((y.double() - exact).abs() / limit).max())
        for y in (
            mk.merge_tensors(xs, "linear", weight=weight),
            theirs(xs, "linear", weight=weight),
        )
    ]
    assert share[0] <= 1 < share[1]


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, -2.0])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("what", INPUTS)
def test_passthrough(what: str, dtype: torch.dtype, scale: float | None) -> None:
    """The bits as host; by default the float32 product with the scale as it was given."""
    xs = models(what, dtype, 1)
    parameters = {} if scale is None else {"scale": scale}
    other = theirs(xs, "passthrough", **parameters)
    got = mk.merge_tensors(xs, "passthrough", host="mergekit", **parameters)
    assert_bits_equal(got, other)
    mine = mk.merge_tensors(xs, "passthrough", **parameters)
    assert_no_worse(mine, other, exact_linear(xs, [scale or 1.0], False))
