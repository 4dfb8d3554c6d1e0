"""The two assertions of this suite: equality of bits, and an error within a derived bound.

There is no tolerance to choose: a test either knows the bits or derives its bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekern import dispatch
from mergekern.check import name_of

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: Tensor) -> Tensor:
    """The stored bits of x as a flat int64 tensor (complex: two per element)."""
    x = x.detach().cpu().contiguous().reshape(-1)
    if x.dtype.is_complex:
        x = torch.view_as_real(x).reshape(-1)
    return x.view(_INTEGERS[x.element_size()]).to(torch.int64)


def _same_kind(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype, f"dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"


def _explain(got: Tensor, expected: Tensor, wrong: Tensor) -> str:
    where = torch.nonzero(wrong).reshape(-1)
    i = int(where[0])
    a, b = (x.detach().cpu().reshape(-1)[i].item() for x in (got, expected))
    return (
        f"{len(where)} of {wrong.numel()} elements differ ({name_of(got.dtype)}); "
        f"first at {i}: got {a!r}, expected {b!r}"
    )


def assert_bytes_equal(got: Tensor, expected: Tensor) -> None:
    """Every stored bit equal, NaN payloads included."""
    _same_kind(got, expected)
    wrong = _bits(got) != _bits(expected)
    if expected.dtype.is_complex:
        wrong = wrong.reshape(-1, 2).any(1)
    assert not wrong.any(), _explain(got, expected, wrong)


def assert_bits_equal(got: Tensor, expected: Tensor) -> None:
    """Bits equal, except that every NaN equals every other; -0 is not +0."""
    _same_kind(got, expected)
    wrong = _bits(got) != _bits(expected)
    if expected.dtype.is_floating_point:
        a, b = (x.detach().cpu().reshape(-1) for x in (got, expected))
        wrong &= ~(a.isnan() & b.isnan())
    assert not wrong.any(), _explain(got, expected, wrong)


def _ordered(x: Tensor) -> Tensor:
    """Bits as integers in the order of the values, so that neighbours differ by one."""
    bits = _bits(x)
    low = -(1 << (8 * x.element_size() - 1))
    return torch.where(bits < 0, low - bits, bits)


def assert_backend_bits(got: Tensor, expected: Tensor, backend: str) -> None:
    """`assert_bits_equal`, with the one exception that is documented.

    Triton's interpreter truncates where it stores bfloat16, so a result may lie one unit in the
    last place beside the rounded one. On a GPU there is no exception.
    """
    if not (backend == "triton" and dispatch.interpreting() and expected.dtype == torch.bfloat16):
        assert_bits_equal(got, expected)
        return
    _same_kind(got, expected)
    a, b = (x.detach().cpu().reshape(-1) for x in (got, expected))
    wrong = ((_ordered(got) - _ordered(expected)).abs() > 1) & ~(a.isnan() & b.isnan())
    assert not wrong.any(), _explain(got, expected, wrong)


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the spacing of `dtype` at each |value|, in float64; half its least number at 0."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps  # the smallest subnormal number
    _, exponent = torch.frexp(value.detach().cpu().double().abs())
    spacing = torch.ldexp(torch.tensor(info.eps, dtype=torch.float64), exponent.double() - 1)
    return torch.clamp(spacing, min=least) / 2


def assert_within(got: Tensor, oracle: Tensor, bound: Tensor) -> None:
    """|got - oracle| <= bound at every element; NaN and infinities exactly where the oracle's are.

    `oracle` and `bound` are float64. A NaN anywhere it should not be fails, in the bound as well.
    """
    a, b = (x.detach().cpu().double().reshape(-1) for x in (got, oracle))
    limit = bound.detach().cpu().double().expand(oracle.shape).reshape(-1)
    assert got.shape == oracle.shape, f"shape {got.shape}, expected {oracle.shape}"
    wrong = (a.isnan() != b.isnan()) | (a.isinf() != b.isinf()) | (b.isinf() & (a != b))
    assert not wrong.any(), "non-finite pattern: " + _explain(a, b, wrong)
    finite = b.isfinite()
    within = (a - b).abs() <= limit  # False for NaN on either side
    wrong = finite & ~within
    if wrong.any():
        i = int(torch.nonzero(wrong)[0])
        raise AssertionError(
            f"{_explain(a, b, wrong)}; error {float((a - b)[i].abs())}, bound {float(limit[i])}"
        )
