"""slerp, nuslerp, multislerp, karcher, model_stock against mergekit: never less accurate.

The formulas are evaluated in float64 on whole tensors (methods/geometry.py). mergekit sums dot
products in float32 or the tensors' type and adds up in that type, so bits are not compared: our
largest error is at most theirs.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.check import name_of

from accuracy import assert_within
from cases import values
from methods.geometry import WEIGHT, Exact, bound, models, oracle
from required import peer

api = peer("mergekit.merge_methods.api", "mergekit")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# method, models, whether there is a base, the axis of its vectors, parameters
METHODS: list[tuple[str, int, bool, int | None, dict[str, Any]]] = [
    ("slerp", 2, False, None, {"t": 0.3}),
    ("nuslerp", 2, False, None, {"weight": WEIGHT[:2]}),
    ("nuslerp", 2, True, None, {"weight": WEIGHT[:2]}),
    ("nuslerp", 2, False, -1, {"weight": WEIGHT[:2], "nuslerp_flatten": False}),
    ("nuslerp", 2, True, -1, {"weight": WEIGHT[:2], "nuslerp_flatten": False}),
    (
        "nuslerp",
        2,
        True,
        0,
        {"weight": WEIGHT[:2], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    ("multislerp", 2, False, None, {"weight": WEIGHT[:2]}),
    ("multislerp", 3, False, None, {"weight": WEIGHT[:3]}),
    ("multislerp", 3, True, None, {"weight": WEIGHT[:3], "normalize_weights": False}),
    ("karcher", 2, False, None, {}),
    ("karcher", 3, False, None, {}),
    ("model_stock", 2, True, None, {}),
    ("model_stock", 3, True, None, {}),
    ("model_stock", 3, True, -1, {"filter_wise": True}),
]
IDS = [
    f"{m}-{n}{'-base' if b else ''}{'' if d is None else f'-dim{d}'}" for m, n, b, d, _ in METHODS
]
each_method = pytest.mark.parametrize(("method", "n", "based", "dim", "given"), METHODS, ids=IDS)


def theirs(base: Tensor | None, xs: list[Tensor], method: str, given: dict[str, Any]) -> Tensor:
    first = method == "slerp"
    tensors = xs if base is None else [base, *xs]
    return api.merge_tensors(
        tensors, method, parameters=given, base_index=None if base is None and not first else 0
    )


def exact(
    base: Tensor | None, xs: list[Tensor], dim: int | None, method: str, given: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The value, and the bound of our error."""

    def rows(x: Tensor) -> Tensor:
        if dim is None or x.ndim < 2:
            return x.reshape(1, -1)
        x = x.movedim(dim, -1)
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    parameters = {k: v for k, v in given.items() if not k.startswith(("nuslerp", "filter"))}
    found, bounds = [], []
    origins = None if base is None else rows(base).double()
    for r in range(len(rows(xs[0]))):
        origin = None if origins is None else origins[r]
        vectors = [rows(x)[r].double() - (0 if origin is None else origin) for x in xs]
        one: Exact = oracle(method, vectors, **parameters)
        found.append(one.value if origin is None else origin + one.value)
        bounds.append(bound(one, origin, xs[0].dtype, len(xs), len(vectors[0])))
    shape = list(xs[0].shape)
    if dim == 0 and len(shape) > 1:
        shape = [*shape[1:], shape[0]]
    value, limit = (
        torch.stack(x).reshape(shape) if x else torch.empty(shape) for x in (found, bounds)
    )
    if dim == 0 and len(shape) > 1:
        value, limit = value.movedim(-1, 0), limit.movedim(-1, 0)
    return value, limit


KINDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "random": ("normal", (31, 33)),
    "fine-tuned": ("close", (31, 33)),
    "barely tuned": ("closest", (31, 33)),
    "ties": ("ties", (31, 33)),
    "depthwise": ("close", (24, 1, 3, 3)),
    "vector": ("close", (257,)),
    "one element": ("positive", (1,)),
    "scalar": ("positive", ()),
    "empty": ("positive", (0, 3)),
    "one zero vector": ("zero", (31, 33)),
    "zeros": ("zeros", (31, 33)),
}


def data(kind: str, n: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    values_, shape = KINDS[kind]
    if values_ == "positive":  # in one dimension all others are opposite
        base = 0.1 * values(shape, torch.float64, seed=99)
        xs = [base + values(shape, torch.float64, seed=i).abs() + 0.3 for i in range(n)]
        return base.to(dtype), [x.to(dtype) for x in xs]
    base, xs = models("normal" if values_.startswith("zero") else values_, n, dtype, shape)
    for i in range({"zero": 1, "zeros": n}.get(values_, 0)):
        xs[i] = torch.zeros_like(base)
    return base, xs


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
@each_method
def test_no_less_accurate(
    method: str,
    n: int,
    based: bool,
    dim: int | None,
    given: dict[str, Any],
    kind: str,
    dtype: torch.dtype,
) -> None:
    base, xs = data(kind, n, dtype)
    if kind in ("one zero vector", "zeros") and based:
        zero = torch.zeros_like(base)
        xs = [base.clone() if torch.equal(x, zero) else x for x in xs]
    origin = base if based else None
    mine = mk.merge_tensors(xs, method, base=origin, **given)
    value, limit = exact(origin, xs, dim, method, given)
    assert_within(mine, value, limit)
    try:
        other = theirs(origin, xs, method, given)
    except ValueError:
        # Three models without a direction: what is defined here.
        assert (method, n, kind in ("zeros", "empty")) == ("multislerp", 3, True)
        return
    assert other.shape == mine.shape
    if other.dtype != dtype:  # their norm, a float32 scalar, promotes a scalar
        assert (method, kind) == ("karcher", "scalar")
        other = other.to(dtype)
    if not mine.numel():
        return
    errors = [float((x.double() - value).abs().max()) for x in (mine, other)]
    print(f"max error {errors[0]:.3e} (theirs {errors[1]:.3e})")
    if other.isfinite().all():
        assert errors[0] <= errors[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("special", [math.nan, math.inf])
@each_method
def test_nan_where_theirs_are(
    method: str,
    n: int,
    based: bool,
    dim: int | None,
    given: dict[str, Any],
    special: float,
    dtype: torch.dtype,
) -> None:
    base, xs = models("close", n, dtype, (31, 33))
    xs[1][3, 7] = special
    origin = base if based else None
    mine = mk.merge_tensors(xs, method, base=origin, **given)
    assert torch.equal(mine.isnan(), theirs(origin, xs, method, given).isnan())
    assert mine.isnan().any()


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_karcher_of_short_vectors_by_the_rule_of_the_host(scale: float) -> None:
    """mergekit leaves out vectors up to `tol` long, and makes tensors of such vectors 0."""
    _, (x, y, z) = models("normal", 3, torch.float32, (301,))
    xs = [1e-7 * x, scale * 1e-2 * y, scale * 1e-2 * z]
    other = theirs(None, xs, "karcher", {})
    mine = mk.merge_tensors(xs, "karcher", host="mergekit")
    least = 1e-5
    value = oracle("karcher", [v.double() for v in xs], least=least)
    limit = bound(value, None, torch.float32, 3, 301)
    assert_within(mine, value.value, limit)
    assert bool(other.any()) == bool(mine.any()) == (scale == 1)
    # Their norms and dot products are float32 sums of 301 terms, ten iterations over.
    off = 10 * 4 * 310 * 2.0**-24 * value.size
    assert_within(other, value.value, limit + off)
