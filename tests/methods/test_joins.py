"""Small tensors merged end to end give what each gives by itself, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekern import merge_state_dicts, merge_tensors
from mergekern.methods import REGISTRY, Inputs, Method
from mergekern.methods.trims import JOINED

from accuracy import assert_bits_equal
from methods.arguments import ARGUMENTS, cases, count_of, models, with_tensors

SIZES = (0, 1, 2, 3, 7, 64, 1, 0, 65, JOINED - 2, JOINED - 1)


def joining() -> list[Any]:
    """The cases whose method joins tensors of these sizes."""
    found = []
    for case in cases():
        name, given = case.values
        given = with_tensors(name, given, [torch.ones(1)] * count_of(name))
        arguments = REGISTRY[name].arguments(given, count_of(name))
        if REGISTRY[name].joins(arguments):
            found.append(case)
    return found


def by_tensor() -> list[Any]:
    """The cases that merge a tensor without a look at the others."""
    return [
        case
        for case in cases()
        for method in [REGISTRY[case.values[0]]]
        if not (method.survey or method.whole_models or method.tensor_valued)
    ]


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


@pytest.mark.parametrize(("name", "given"), by_tensor())
def test_state_dicts_of_small_tensors(name: str, given: dict[str, Any]) -> None:
    """Every method, joined or not, gives each tensor what it gives by name alone."""
    method, n = REGISTRY[name], count_of(name)
    shapes = {"a": (3, 5), "b": (), "c": (0, 4), "d": (130, 129), "e": (7,), "f": (2, 3, 4)}
    made = {
        key: models(n, shape, torch.bfloat16, "plain", i)
        for i, (key, shape) in enumerate(shapes.items())
    }
    made["g"] = models(n, (3, 3), torch.float32, "plain", 9)
    xs, origin = models(n, (4, 6), torch.float32, "plain", 10)
    made["h"] = [x.t() for x in xs], origin.t()
    state_dicts = [{key: xs[i] for key, (xs, _) in made.items()} for i in range(n)]
    base = {key: b for key, (_, b) in made.items()} if method.base == "required" else None
    got = merge_state_dicts(state_dicts, name, base=base, seed=3, **given)
    for key, (xs, origin) in made.items():
        b = origin if base is not None else None
        alone = merge_tensors(xs, name, base=b, name=key, seed=3, **given)
        assert_bits_equal(got[key], alone)
        assert got[key].is_contiguous()


def test_a_joined_result_can_be_saved(tmp_path: Path) -> None:
    state_dicts = [{f"{i}": torch.full((i,), float(j)) for i in range(5)} for j in (1, 3)]
    merged = merge_state_dicts(state_dicts, "linear", weight=1.0)
    assert len({x.untyped_storage().data_ptr() for x in merged.values() if x.numel()}) == 1
    save_file(merged, tmp_path / "x.safetensors")
    assert all(x.eq(2).all() for x in load_file(tmp_path / "x.safetensors").values())
