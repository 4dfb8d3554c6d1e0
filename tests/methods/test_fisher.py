"""fisher against its formula in float64, over tensors and over whole models, and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.check import accumulator, name_of
from mergekern.engine.config import load_config

import cases
from accuracy import assert_bits_equal, assert_within, half_ulp
from refusal import refused

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def models(
    n: int, shape: tuple[int, ...] = (31, 33), dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """n models and their Fisher tensors, which span four orders of magnitude."""
    xs = [cases.values(shape, dtype, "normal", i) for i in range(n)]
    fs = [cases.values(shape, torch.float64, "normal", 100 + i) for i in range(n)]
    return xs, [(10.0 ** (i - 3) * f * f).to(dtype) for i, f in enumerate(fs)]


def oracle(
    xs: list[Tensor], fs: list[Tensor], c: list[float], minimal: float
) -> tuple[Tensor, Tensor]:
    """The mean, and the mean of the magnitudes."""
    shares = [w * (f.double() + minimal) for w, f in zip(c, fs, strict=True)]
    total = sum(shares)
    value = sum(s * x.double() for s, x in zip(shares, xs, strict=True)) / total
    size = sum(s * x.double().abs() for s, x in zip(shares, xs, strict=True)) / total
    return value, size


def assert_fisher(got: Tensor, value: Tensor, size: Tensor, n: int) -> None:
    """F + minimal, c, their product, that with x, n - 1 sums above and below, a quotient."""
    steps = 2 * n + 8
    error = steps * UNIT[accumulator(got.dtype)] * size
    assert_within(got, value, error + half_ulp(value.abs() + error, got.dtype))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_fisher(n: int, normalize: bool, dtype: torch.dtype) -> None:
    xs, fs = models(n, dtype=dtype)
    weight = [0.5 + 0.3 * i for i in range(n)]
    got = mk.merge_tensors(xs, "fisher", fisher=fs, weight=weight, normalize=normalize)
    norms = [float(f.double().norm()) for f in fs]
    c = [w / (s + 1e-6) if normalize else w for w, s in zip(weight, norms, strict=True)]
    assert_fisher(got, *oracle(xs, fs, c, 1e-6), n)
    assert got.dtype == dtype


def test_fisher_tensors_have_a_dtype_of_their_own() -> None:
    xs, fs = models(3)
    mixed = [fs[0].double(), fs[1].bfloat16(), fs[2]]
    got = mk.merge_tensors(xs, "fisher", fisher=mixed, normalize=False, minimal=0)
    assert got.dtype == torch.float32
    read = [f.float() for f in mixed]
    assert_bits_equal(got, mk.merge_tensors(xs, "fisher", fisher=read, normalize=False, minimal=0))


def test_equal_fisher_tensors_give_the_mean() -> None:
    xs, fs = models(2)
    got = mk.merge_tensors(xs, "fisher", fisher=[fs[0], fs[0]])
    assert_fisher(got, (xs[0].double() + xs[1].double()) / 2, xs[0].double().abs() + xs[1].abs(), 2)


def test_over_chunks_and_strides() -> None:
    xs, fs = models(2, (600, 900))
    want = mk.merge_tensors(xs, "fisher", fisher=fs)
    strided = [f.T.contiguous().T for f in fs]
    assert_bits_equal(mk.merge_tensors(xs, "fisher", fisher=strided), want)
    assert_bits_equal(
        mk.merge_tensors([x.T for x in xs], "fisher", fisher=[f.T for f in fs]), want.T
    )


def test_state_dicts_divide_by_the_norm_of_the_whole_model() -> None:
    shapes = {"b": (7,), "w": (20, 30), "s": (), "none": (0, 3)}
    a, b = ({k: models(2, s)[0][i] for k, s in shapes.items()} for i in range(2))
    fa, fb = ({k: models(2, s)[1][i] for k, s in shapes.items()} for i in range(2))
    a["count"] = b["count"] = torch.tensor(3)
    got = mk.merge_state_dicts([a, b], "fisher", fisher=[fa, fb], weight=[1, 2])
    norms = [math.sqrt(sum(float(f.double().square().sum()) for f in d.values())) for d in (fa, fb)]
    c = [w / (s + 1e-6) for w, s in zip([1, 2], norms, strict=True)]
    for key in shapes:
        assert_fisher(got[key], *oracle([a[key], b[key]], [fa[key], fb[key]], c, 1e-6), 2)
    assert list(got) == list(a)
    given: dict[str, Any] = {"fisher": [fa, fb], "weight": [1, 2]}
    again = mk.merge_state_dicts([a, b], "fisher", norm=norms, **given)
    for key in shapes:
        assert_bits_equal(again[key], got[key])
    based = mk.merge_state_dicts([b], "fisher", base=a, **given)  # a base is the first model
    for key in shapes:
        assert_bits_equal(based[key], got[key])


def test_what_is_no_number_stays_where_it_is() -> None:
    xs, fs = models(2, (5,))
    xs[0][1], xs[1][2], fs[0][3] = math.nan, math.inf, math.nan
    got = mk.merge_tensors(xs, "fisher", fisher=fs, normalize=False)
    assert got[[1, 3]].isnan().all()
    assert got[2] == math.inf
    assert got[[0, 4]].isfinite().all()
    zero = [torch.zeros(5)] * 2
    plain = {"normalize": False, "minimal": 0}
    assert mk.merge_tensors(models(2, (5,))[0], "fisher", fisher=zero, **plain).isnan().all()
    with refused("fisher", "norm[0] is not finite"):
        mk.merge_tensors(xs, "fisher", fisher=fs)
    with refused("fisher", "norm[0] + minimal is not positive"):
        mk.merge_tensors(xs, "fisher", fisher=zero, minimal=0)


def test_empty_and_scalar() -> None:
    for shape in ((), (0,), (2, 0)):
        xs, fs = models(2, shape)
        assert mk.merge_tensors(xs, "fisher", fisher=fs).shape == shape


def test_refusals() -> None:
    xs, fs = models(2)
    with refused("fisher", "parameter fisher is required", sentence=False):
        mk.merge_tensors(xs, "fisher")
    with refused("fisher", "fisher has the wrong length", sentence=False):
        mk.merge_tensors(xs, "fisher", fisher=fs[:1])
    with refused("fisher", "fisher is no list", "Tensor"):
        mk.merge_tensors(xs, "fisher", fisher=fs[0])
    with refused("fisher", "fisher is no tensor", "float"):
        mk.merge_tensors(xs, "fisher", fisher=[1.0, 2.0])
    with refused("fisher", "fisher[1] does not fit", "[31]", "[31, 33]"):
        mk.merge_tensors(xs, "fisher", fisher=[fs[0], fs[1][:, 0]])
    with refused("fisher", "minimal is out of range"):
        mk.merge_tensors(xs, "fisher", fisher=fs, minimal=-1)
    a, b = {"w": xs[0]}, {"w": xs[1]}
    with refused("fisher", "fisher does not fit", "2 values", "2 state dicts"):
        mk.merge_state_dicts([a, b], "fisher", fisher=fs)
    with refused("fisher", "fisher does not fit", "NoneType", "2 state dicts"):
        mk.merge_state_dicts([a, b], "fisher")
    with refused("merge_state_dicts", "w: missing from fisher[1]", sentence=False):
        mk.merge_state_dicts([a, b], "fisher", fisher=[{"w": fs[0]}, {}])
    with refused("merge_state_dicts", "v: missing from state_dicts", sentence=False):
        mk.merge_state_dicts([a, b], "fisher", fisher=[{"w": fs[0]}, {"w": fs[1], "v": fs[1]}])


def test_a_configuration_cannot_give_tensors() -> None:
    text = {"merge_method": "fisher", "models": [{"model": "a"}, {"model": "b"}]}
    with pytest.raises(mk.ConfigError, match="fisher needs a tensor per model"):
        load_config(text)
