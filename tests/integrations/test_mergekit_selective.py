"""nearswap and arcee_fusion against mergekit: never less accurate, and its own bits on request.

The oracles are the formulas in float64. An arcee_fusion takes or leaves an element: where float64
itself leaves no doubt, a wrong choice is an error of |x - base|.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.check import name_of

from accuracy import assert_bits_equal, assert_bytes_equal
from required import peer

api = peer("mergekit.merge_methods.api", "mergekit")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = (
    "random",
    "near",
    "ties",
    "zeros",
    "equal",
    "nan",
    "infinite",
    "one",
    "depthwise",
    "scalar",
)
STEPS = (0.0, 1e-7, 1e-6, 1e-4, 0.003, 0.1, 2.0, -1.0)


def pair(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A base and a model."""
    g = torch.Generator().manual_seed(KINDS.index(kind))
    shape = {"one": (1,), "depthwise": (96, 1, 3, 3), "scalar": ()}.get(kind, (67, 131))
    base = 0.05 * torch.randn(shape, generator=g)
    x = base + (1e-4 if kind == "near" else 0.01) * torch.randn(shape, generator=g)
    if kind == "ties":
        base = torch.randint(-3, 4, shape, generator=g) / 64
        x = base + torch.randint(-2, 3, shape, generator=g) / 64
    elif kind == "zeros":
        base = torch.zeros(shape)
        x = torch.where(torch.rand(shape, generator=g) < 0.1, x, -0.0)
    elif kind == "equal":
        x = base.clone()
    elif kind in ("nan", "infinite"):
        bad = math.nan if kind == "nan" else math.inf
        base[3, 5] = base[7, 1] = x[7, 1] = x[9, 2] = bad
        x[11, 4] = -bad
    return base.to(dtype), x.to(dtype)


def theirs(base: Tensor, x: Tensor, method: str, **parameters: Any) -> Tensor:
    return api.merge_tensors([base, x], method, parameters=parameters, base_index=0)


def largest_error(got: Tensor, exact: Tensor) -> float:
    """NaN and infinities must be those of the oracle, and count as no error then."""
    a, b = got.double(), exact
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, (a - b).abs())
    return float(error.nan_to_num(nan=math.inf).max()) if error.numel() else 0.0


# ---- nearswap --------------------------------------------------------------------------------


def nearswap_oracle(base: Tensor, x: Tensor, t: float) -> Tensor:
    a, b = base.double(), x.double()
    weight = (t / (a - b).abs().clamp(min=1e-6)).clamp(0, 1)
    return weight * b + (1 - weight) * a


@pytest.mark.parametrize("t", STEPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nearswap(dtype: torch.dtype, kind: str, t: float) -> None:
    base, x = pair(kind, dtype)
    exact = nearswap_oracle(base, x, t)
    mine = mk.merge_tensors([x], "nearswap", base=base, t=t)
    other = theirs(base, x, "nearswap", t=t)
    errors = largest_error(mine, exact), largest_error(other, exact)
    print(f"{name_of(dtype)} {kind} t={t:g}: max error {errors[0]:.3e}, theirs {errors[1]:.3e}")
    assert errors[0] <= errors[1]
    assert mine.dtype == dtype
    like = mk.merge_tensors([x], "nearswap", base=base, t=t, host="mergekit")
    assert_bits_equal(like, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nearswap_over_many_chunks_has_their_bits(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(3 * 2**18 + 17, generator=g).to(dtype)
    x = (base + 0.01 * torch.randn(base.shape, generator=g)).to(dtype)
    like = mk.merge_tensors([x], "nearswap", base=base, t=0.004, host="mergekit")
    assert_bits_equal(like, theirs(base, x, "nearswap", t=0.004))


# ---- arcee_fusion ----------------------------------------------------------------------------


def arcee_oracle(base: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The value in float64, and where the choice is clear: beyond 1e-6 of the threshold."""
    b, v = base.double(), x.double()
    p, q = (torch.softmax(w, -1) + 1e-8 for w in (v, b))
    importance = (v - b).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    flat = importance.flatten().sort().values
    q1, q2, q3 = (flat[math.floor(i / 4 * (len(flat) - 1))] for i in (1, 2, 3))
    threshold = q2 + 1.5 * (q3 - q1)
    value = b + (v - b) * (importance >= threshold).double()
    clear = ~((importance - threshold).abs() <= 1e-6 * threshold.abs()) | (importance == 0)
    return value, clear


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_arcee_fusion(dtype: torch.dtype, kind: str) -> None:
    base, x = pair(kind, dtype)
    exact, clear = arcee_oracle(base, x)
    assert clear.double().mean() > 0.99
    mine = mk.merge_tensors([x], "arcee_fusion", base=base)
    other = theirs(base, x, "arcee_fusion")
    errors = [largest_error(y[clear], exact[clear]) for y in (mine, other)]
    differ = int((other.to(dtype) != mine)[clear].sum())
    print(f"{name_of(dtype)} {kind}: max error {errors[0]:.3e}, theirs {errors[1]:.3e}")
    print(f"{differ} of {x.numel()} differ")
    assert errors[0] <= errors[1]
    assert errors[0] == 0
    assert mine.dtype == dtype


def as_theirs(base: Tensor, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    like = mk.merge_tensors([x], "arcee_fusion", base=base, host="mergekit")
    after = torch.rand(1)
    torch.manual_seed(seed)
    other = theirs(base, x, "arcee_fusion")
    assert_bytes_equal(torch.rand(1), after)  # as many random numbers taken
    return like, other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_arcee_fusion_with_their_bits(dtype: torch.dtype, kind: str) -> None:
    like, other = as_theirs(*pair(kind, dtype))
    assert like.dtype == dtype
    assert other.dtype == torch.float32  # the mask's: of 16-bit tensors, a bug of theirs
    assert_bits_equal(like, other.to(dtype))
    base, x = pair(kind, dtype)
    wide = mk.merge_tensors([x], "arcee_fusion", base=base, host="mergekit", out_dtype=other.dtype)
    assert_bits_equal(wide, other)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("shape", [(1031, 1021), (3, 1100, 400)])
def test_arcee_fusion_with_their_sample(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(5)
    base = 0.05 * torch.randn(shape, generator=g)
    x = (base + 0.01 * torch.randn(shape, generator=g)).to(dtype)
    like, other = as_theirs(base.to(dtype), x)
    assert_bits_equal(like, other.to(dtype))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
@pytest.mark.parametrize("method", ["nearswap", "arcee_fusion"])
def test_empty_tensors(method: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    given = {"t": 0.1} if method == "nearswap" else {}
    for host in (None, "mergekit"):
        assert_bytes_equal(mk.merge_tensors([x], method, base=x, host=host, **given), x)
    if method == "arcee_fusion":
        with pytest.raises(IndexError), warnings.catch_warnings():
            theirs(x, x, method)
