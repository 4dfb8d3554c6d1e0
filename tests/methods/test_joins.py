"""Small tensors merged end to end give what each gives by itself, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergekern.methods import REGISTRY, Inputs, Method
from mergekern.methods.trims import JOINED

from accuracy import assert_bits_equal
from methods.arguments import ARGUMENTS, cases, count_of, models

SIZES = (0, 1, 2, 3, 7, 64, 1, 0, 65, JOINED - 1, JOINED)


def joining() -> list[Any]:
    """The cases whose method joins tensors of these sizes."""
    found = []
    for case in cases():
        name, given = case.values
        arguments = REGISTRY[name].arguments(_tensors(name, given), count_of(name))
        if REGISTRY[name].joins(arguments):
            found.append(case)
    return found


def _tensors(name: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"fisher": [torch.ones(1)] * 3, **given} if name == "fisher" else given


def inputs(method: Method, xs: list[Tensor], base: Tensor, **others: Any) -> Inputs:
    origin = base if method.base == "required" else None
    return Inputs(xs, origin, "w", 3, xs[0].dtype, "auto", **others)


def test_what_is_joined() -> None:
    """Rules by rank and plain sums; not what is drawn, or restores a norm of one tensor."""
    assert {case.id for case in joining()} == {
        "linear-0",
        "linear-1",
        "passthrough-0",
        "passthrough-1",
        "task_arithmetic-0",
        "ties-0",
        "ties-2",
        "breadcrumbs-0",
        "breadcrumbs-1",
        "magnitude_prune-0",
    }
    assert set(ARGUMENTS) == set(REGISTRY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("values", ["plain", "ties", "odd"])
@pytest.mark.parametrize(("name", "given"), joining())
def test_end_to_end(name: str, given: dict[str, Any], values: str, dtype: torch.dtype) -> None:
    method, n = REGISTRY[name], count_of(name)
    arguments = method.arguments(given, n)
    xs, base = models(n, (sum(SIZES),), dtype, values)
    if values == "odd":  # more of it in small tensors
        for i, x in enumerate(xs):
            x[i:40:5], x[90 + i :: 50] = float("nan"), -float("inf")
    joined = method.merge(inputs(method, xs, base, sizes=SIZES), **arguments)
    each = zip(*(x.split(SIZES) for x in xs), strict=True)
    alone = [
        method.merge(inputs(method, list(parts), origin), **arguments)
        for parts, origin in zip(each, base.split(SIZES), strict=True)
    ]
    assert_bits_equal(joined, torch.cat(alone))
