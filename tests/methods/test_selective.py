"""nearswap and arcee_fusion against their formulas in numpy, and the parts of their selection."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.check import accumulator, name_of
from mergekern.methods import fusion
from mergekern.methods.chunked import select

import cases
from accuracy import assert_bits_equal, assert_bytes_equal, assert_within, half_ulp
from refusal import refused

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def pair(
    shape: tuple[int, ...], dtype: torch.dtype, values: str = "normal", layout: str = "contiguous"
) -> tuple[Tensor, Tensor]:
    base = cases.values(shape, dtype, values)
    x = cases.values(shape, dtype, values, 1)
    if values == "normal":
        x = (base.double() + 0.05 * x.double()).to(dtype)
    make = cases.LAYOUTS[layout]
    return make(base), make(x)


# ---- nearswap --------------------------------------------------------------------------------


def nearswap_oracle(base: Tensor, x: Tensor, t: float) -> Tensor:
    """The formula in the widest type there is."""
    a, b = (v.double().numpy().astype(np.longdouble) for v in (base, x))
    with np.errstate(all="ignore"):
        weight = np.clip(np.longdouble(t) / np.maximum(np.abs(a - b), np.longdouble(1e-6)), 0, 1)
        value = weight * b + (1 - weight) * a
        return torch.from_numpy(np.asarray(value, np.float64)).reshape(base.shape)


@pytest.mark.parametrize("t", [-1.0, 0.0, 3e-7, 1e-6, 0.003, 0.05, 4.0])
@pytest.mark.parametrize("values", cases.VALUES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_nearswap(dtype: torch.dtype, values: str, t: float) -> None:
    base, x = pair((1031,), dtype, values)
    got = mk.merge_tensors([x], "nearswap", base=base, t=t)
    oracle = nearswap_oracle(base, x, t)
    # t and the step are rounded (t / 1e-6, 1e-6, the difference and the product where t is below
    # it), then base + step; the oracle loses a bit of longdouble's 64 to its cancellation.
    u = UNIT[accumulator(dtype)]
    error = (
        5 * u * max(t, 0) + u * oracle.abs() + 2.0**-60 * (base.double().abs() + x.double().abs())
    )
    bound = error + half_ulp(oracle.abs() + error, dtype)
    assert_within(got, oracle, bound.nan_to_num(nan=0.0, posinf=0.0))
    assert got.dtype == dtype


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_nearswap_takes_what_is_near_as_it_is(dtype: torch.dtype) -> None:
    base, x = pair((1031,), dtype)
    assert_bits_equal(mk.merge_tensors([x], "nearswap", base=base, t=10), x)
    assert_bits_equal(mk.merge_tensors([x], "nearswap", base=base, t=0), base)


def test_nearswap_of_what_is_no_number() -> None:
    inf, nan = math.inf, math.nan
    base = torch.tensor([nan, 1.0, inf, -inf, 1.0, 1.0, inf, 3e38])
    x = torch.tensor([1.0, nan, 1.0, 1.0, inf, -inf, inf, -3e38])
    want = torch.tensor([nan, nan, inf, -inf, nan, nan, nan, 3e38])
    for t in (0.0, 1e-7, 0.5):
        assert_bits_equal(mk.merge_tensors([x], "nearswap", base=base, t=t), want)


# ---- arcee_fusion ----------------------------------------------------------------------------


def arcee_oracle(base: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and where the importance is farther from the threshold than float64 errs."""
    a, b = (v.double().numpy() for v in (base, x))
    with np.errstate(all="ignore"):

        def softmax(v: np.ndarray) -> np.ndarray:
            e = np.exp(v - (v.max(-1, keepdims=True) if v.ndim else v))
            return e / (e.sum(-1, keepdims=True) if v.ndim else e) + 1e-8

        p, q = softmax(b), softmax(a)
        terms = p * np.log(p / q)
        kl = terms.sum(-1, keepdims=True) if terms.ndim else terms
        importance = np.asarray(np.abs(b - a) * kl)
        flat = np.sort(importance.ravel())
        q1, q2, q3 = (flat[i * (flat.size - 1) // 4] for i in (1, 2, 3))
        threshold = q2 + 1.5 * (q3 - q1)
        taken = importance >= threshold
        value = a + (b - a) * taken.astype(np.float64)
        doubt = np.abs(importance - threshold) <= 1e-6 * abs(threshold)
        doubt &= importance != 0
    return torch.from_numpy(np.asarray(value)), torch.from_numpy(np.asarray(~doubt))


SHAPES = ((), (1,), (7,), (1, 1), (64, 1), (1, 64), (31, 33), (40, 1, 3, 3), (2, 3, 5, 7))


def assert_arcee(base: Tensor, x: Tensor, least: float = 0.97) -> None:
    got = mk.merge_tensors([x], "arcee_fusion", base=base)
    oracle, clear = arcee_oracle(base, x)
    assert clear.double().mean() >= least
    assert got.dtype == x.dtype
    wanted = torch.where((oracle - x.double()).abs() <= (oracle - base.double()).abs(), x, base)
    wanted = torch.where(oracle.isnan(), torch.full_like(wanted, math.nan), wanted)
    assert torch.equal(got[clear].isnan(), oracle[clear].isnan())
    real = clear & ~oracle.isnan()
    assert torch.equal(got[real], wanted[real])  # one of the two inputs, bit for bit but for -0


@pytest.mark.parametrize("shape", SHAPES, ids=cases.shape_id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_arcee_fusion(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_arcee(*pair(shape, dtype))


@pytest.mark.parametrize("values", ["zeros", "ties", "equal", "nan"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_arcee_fusion_of_hostile_values(dtype: torch.dtype, values: str) -> None:
    assert_arcee(*pair((257, 5), dtype, values), least=0.9)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [(31, 33), (12, 4, 3, 3), (97,)], ids=cases.shape_id)
def test_arcee_fusion_of_any_layout(shape: tuple[int, ...], layout: str) -> None:
    base, x = pair(shape, torch.float32, layout=layout)
    got = mk.merge_tensors([x], "arcee_fusion", base=base)
    plain = mk.merge_tensors(
        [x.clone(memory_format=torch.contiguous_format)],
        "arcee_fusion",
        base=base.clone(memory_format=torch.contiguous_format),
    )
    assert_bits_equal(got, plain)


@pytest.mark.parametrize(
    "shape", [(3 * 2**18 + 17,), (2, 2**18 + 5), (1000, 700), (300, 300, 3, 3)], ids=cases.shape_id
)
def test_arcee_fusion_over_many_chunks(shape: tuple[int, ...]) -> None:
    """Rows wider than a chunk, and chunks of many rows."""
    base, x = pair(shape, torch.float32)
    assert_arcee(base, x, least=0.9999)


def test_arcee_fusion_takes_kl_anew_where_there_are_too_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, x = pair((1000, 3), torch.float32)
    want = mk.merge_tensors([x], "arcee_fusion", base=base)
    monkeypatch.setattr(fusion, "_STORED_ROWS", 10)
    assert_bits_equal(mk.merge_tensors([x], "arcee_fusion", base=base), want)


def test_arcee_fusion_of_what_is_no_number() -> None:
    inf, nan = math.inf, math.nan
    base = 0.05 * torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    x = base + 0.001 * torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    base[0, 0], x[1, 0], base[2, 0], x[3, 0], x[4, 0] = nan, nan, inf, inf, -inf
    got = mk.merge_tensors([x], "arcee_fusion", base=base)
    assert got[:4, 0].isnan().all()
    assert_bits_equal(got[:4, 1:], base[:4, 1:])  # no KL: nothing taken
    assert got[4, 0] == -inf  # infinitely important
    y = base.clone()
    y[:30] = nan
    got = mk.merge_tensors([y], "arcee_fusion", base=base)  # all three quantiles are NaN
    assert got[:30].isnan().all()
    assert_bits_equal(got[30:], base[30:])


def test_kl_of_nearly_equal_rows_is_not_noise() -> None:
    """Against the second-order series, which differences of float64 sums do not reach."""
    g = torch.Generator().manual_seed(3)
    base = torch.randn(4, 1000, generator=g, dtype=torch.float64)
    for size in (1e-3, 1e-5):
        x = base + size * torch.randn(4, 1000, generator=g, dtype=torch.float64)
        b, v = (t.numpy().astype(np.longdouble) for t in (base, x))
        p, q = (np.exp(t) / np.exp(t).sum(-1, keepdims=True) + np.longdouble(1e-8) for t in (v, b))
        exact = torch.from_numpy((p * np.log(p / q)).sum(-1).astype(np.float64))
        # 1000 terms of p / q rounded to 2**-53, of random sign, beside KL of about size**2 / 2;
        # longdouble errs by 2**-64 per element of a sum of 1.
        bound = 1000 * 2.0**-53 / 1000 * torch.ones(4, dtype=torch.float64) + 2.0**-50 * exact
        assert_within(fusion._kl(base, x, 1 << 18), exact, bound)
        assert_within(fusion._kl(base, x, 300), exact, bound)  # in columns


@pytest.mark.parametrize("bits", [32, 64])
def test_selection_is_that_of_a_sort(bits: int) -> None:
    g = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 2 ** (bits - 1) - 1, (5000,), generator=g)
    keys[::3] = keys[0]
    keys[1::7] = 0
    ranks = [1, 2500, 2501, 5000]
    want = keys.sort(descending=True).values[[k - 1 for k in ranks]].tolist()
    assert fusion._select(lambda: keys.split(777), ranks, bits) == want


def test_select_is_where() -> None:
    for dtype in cases.DTYPES:
        x, y = (cases.values((999,), dtype, "mixed", seed) for seed in (0, 1))
        condition = torch.rand(999) < 0.5
        assert_bytes_equal(select(condition, x, y), torch.where(condition, x, y))


# ---- both ------------------------------------------------------------------------------------

GIVEN = {"nearswap": {"t": 0.03}, "arcee_fusion": {}}


@pytest.mark.parametrize("host", [None, "mergekit"])
@pytest.mark.parametrize("method", GIVEN)
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()], ids=cases.shape_id)
def test_empty_and_scalar(method: str, shape: tuple[int, ...], host: str | None) -> None:
    for dtype in cases.DTYPES:
        x = torch.full(shape, 2.0, dtype=dtype)
        got = mk.merge_tensors([x], method, base=x.clone(), host=host, **GIVEN[method])
        assert_bits_equal(got, x)


@pytest.mark.parametrize("method", GIVEN)
def test_result_is_rounded_once_and_inputs_stay(method: str) -> None:
    base, x = pair((257, 9), torch.float32)
    before = base.clone(), x.clone()
    got = mk.merge_tensors([x], method, base=base, out_dtype=torch.bfloat16, **GIVEN[method])
    assert_bits_equal(got, mk.merge_tensors([x], method, base=base, **GIVEN[method]).bfloat16())
    for kept, was in zip((base, x), before, strict=True):
        assert_bytes_equal(kept, was)


@pytest.mark.parametrize("method", GIVEN)
def test_refusals(method: str) -> None:
    x = torch.zeros(3)
    given = GIVEN[method]
    with refused(method, "shape"):
        mk.merge_tensors([x], method, base=torch.zeros(4), **given)
    with refused(method, "wrong number of models", "exactly 1"):
        mk.merge_tensors([x, x], method, base=x, **given)
    with refused(method, "unknown host"):
        mk.merge_tensors([x], method, base=x, host="peft", **given)
    with refused(method, "no kernel", error=mk.BackendError, sentence=False):
        mk.merge_tensors([x], method, base=x, backend="cpu", **given)
