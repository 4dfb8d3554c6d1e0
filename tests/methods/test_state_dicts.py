"""merge_state_dicts: names kept, nothing dropped or guessed, every misfit in one error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mergekern as mk
from mergekern import ArgumentError, merge_state_dicts, merge_tensors

from accuracy import assert_bits_equal, assert_bytes_equal
from engine.models import tensors
from refusal import refused

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_names_order_and_values(dtype: torch.dtype) -> None:
    models = [tensors(i, dtype) for i in range(3)]
    merged = merge_state_dicts(models, "linear", weight=[1, 2, 3])
    assert list(merged) == list(models[0])
    for key, x in merged.items():
        if x.dtype == torch.int64:
            assert_bytes_equal(x, models[0][key])
        else:
            want = merge_tensors([m[key] for m in models], "linear", weight=[1, 2, 3])
            assert_bits_equal(x, want)


def test_masks_are_keyed_by_the_name_of_the_tensor() -> None:
    base, model = tensors(0), tensors(1)
    merged = merge_state_dicts([model], "dare_linear", base=base, seed=3, weight=1, density=0.5)
    for key, x in merged.items():
        if x.dtype.is_floating_point:
            options = {"base": base[key], "weight": 1, "density": 0.5}
            want = merge_tensors([model[key]], "dare_linear", name=key, seed=3, **options)
            assert_bits_equal(x, want)


def test_base_of_linear_is_the_first_model() -> None:
    a, b = tensors(0), tensors(1)
    merged = merge_state_dicts([b], "linear", base=a, weight=[1, 3])
    for key, x in merge_state_dicts([a, b], "linear", weight=[1, 3]).items():
        assert_bits_equal(merged[key], x)


def test_all_misfits_are_in_one_error() -> None:
    a = {
        "fine": torch.zeros(2),
        "gone": torch.zeros(2),
        "shape": torch.zeros(2, 3),
        "kind": torch.zeros(2),
        "count": torch.tensor(3),
        "mixed": torch.zeros(2, dtype=torch.bfloat16),
    }
    b = {
        "fine": torch.zeros(2),
        "new": torch.zeros(2),
        "shape": torch.zeros(3, 2),
        "kind": torch.zeros(2, dtype=torch.int64),
        "count": torch.tensor(4),
        "mixed": torch.zeros(2, dtype=torch.float16),
    }
    with pytest.raises(ArgumentError) as caught:
        merge_state_dicts([a, b], "linear", weight=1)
    text = str(caught.value)
    assert "5 tensors" in text
    for part in (
        "gone: missing from state_dicts[1]",
        "new: missing from state_dicts[0]",
        "shape: shape differs: [2, 3] in state_dicts[0], [3, 2] in state_dicts[1]",
        "kind: dtype differs: floating in state_dicts[0], int64 in state_dicts[1]",
        "count: values differ in state_dicts[1]",
    ):
        assert part in text
    assert "fine" not in text
    assert "mixed" not in text


def test_the_base_must_fit_too() -> None:
    with pytest.raises(ArgumentError, match="missing from base"):
        merge_state_dicts([{"w": torch.zeros(2)}], "ties", base={}, weight=1)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(5),
        torch.tensor([True, False]),
        torch.tensor(7, dtype=torch.uint8),
        torch.tensor([0, 1, 60000], dtype=torch.uint16),
        torch.zeros(0, dtype=torch.int32),
        torch.tensor([1 + 2j, complex("nan")]),
        *(torch.tensor([1.5, float("nan"), -0.0]).to(d) for d in FLOAT8),
    ],
    ids=lambda x: str(x.dtype).removeprefix("torch."),
)
def test_other_dtypes_are_copied_if_equal(x: torch.Tensor) -> None:
    merged = merge_state_dicts([{"x": x}, {"x": x.clone()}], "linear", weight=1)
    assert_bytes_equal(merged["x"], x)
    assert not x.numel() or merged["x"].data_ptr() != x.data_ptr()
    if x.numel():
        other = x.clone().reshape(-1)
        other[0] = torch.zeros((), dtype=torch.float32).to(x.dtype) if x.reshape(-1)[0] else True
        with pytest.raises(ArgumentError, match="x: values differ"):
            merge_state_dicts([{"x": x}, {"x": other.view(x.shape)}], "linear", weight=1)


def test_strided_buffers_compare_by_value() -> None:
    x = torch.arange(12).reshape(3, 4)
    merged = merge_state_dicts([{"x": x.T}, {"x": x.T.contiguous()}], "linear", weight=1)
    assert_bytes_equal(merged["x"], x.T)


def test_wrong_calls_are_refused_even_where_nothing_floats() -> None:
    only = {"n": torch.tensor(3)}
    for states, method, given in (
        ([], "linear", {"weight": 1}),
        ([only], "nonsense", {}),
        ([only], "linear", {"weight": 1, "wieght": 1}),
        ([only], "linear", {}),
        ([only], "ties", {"weight": 1}),
        ([only], "slerp", {"t": 0.5}),
    ):
        with pytest.raises(ArgumentError):
            merge_state_dicts(states, method, **given)


def test_out_dtype_leaves_buffers_alone() -> None:
    merged = merge_state_dicts([tensors(0)], "passthrough", out_dtype=torch.float16)
    kinds = {x.dtype for x in merged.values()}
    assert kinds == {torch.float16, torch.int64}


def test_thousands_of_tiny_tensors() -> None:
    models = [{f"p{i}": torch.full((i % 3,), float(m)) for i in range(4000)} for m in (1, 3)]
    merged = mk.merge_state_dicts(models, "linear", weight=1)
    assert len(merged) == 4000
    assert all(torch.equal(x, torch.full_like(x, 2.0)) for x in merged.values())


# ---- the door ----------------------------------------------------------------------------------


class Producer:
    """What another library's array is to us: two methods of DLPack."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x = x

    def __dlpack__(self, **options: Any) -> Any:
        return self._x.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("wrap", [torch.Tensor.numpy, Producer, torch.nn.Parameter])
def test_arrays_of_other_libraries(wrap: Callable[[torch.Tensor], Any], base: bool) -> None:
    """Mixed with tensors; integer buffers as well."""
    models = [tensors(i) for i in range(3)]
    first, *rest = models
    options: dict[str, Any] = {"weight": 1.0, "density": 0.5}
    want = merge_state_dicts(rest, "ties", base=first, **options)

    def wrapped(model: dict[str, torch.Tensor]) -> dict[str, Any]:
        kept = wrap is torch.nn.Parameter
        return {k: x if kept and not x.is_floating_point() else wrap(x) for k, x in model.items()}

    given = [wrapped(rest[0]), rest[1]]
    got = merge_state_dicts(given, "ties", base=wrapped(first) if base else first, **options)
    assert list(got) == list(want)
    for key, x in want.items():
        assert_bytes_equal(got[key], x)
        assert not got[key].requires_grad


def test_buffers_are_copies_of_what_was_given() -> None:
    count = np.arange(3)
    merged = merge_state_dicts([{"n": count}, {"n": count.copy()}], "linear", weight=1.0)
    count[0] = 7
    assert_bytes_equal(merged["n"], torch.arange(3))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (torch.nn.Linear(1, 1), "state_dicts[0] is no mapping; got Linear"),
        ([("w", torch.ones(1))], "state_dicts[0] is no mapping; got list"),
        ({"w": [1.0]}, "state_dicts[0]['w'] is no tensor; got list"),
        ({"w": None}, "state_dicts[0]['w'] is no tensor; got NoneType"),
        ({"w": np.array(["a"])}, "state_dicts[0]['w'] has an unsupported dtype"),
        ({"w": torch.ones(1, device="meta")}, "state_dicts[0]['w'] holds no plain data; got meta"),
    ],
)
def test_what_is_no_state_dict(given: Any, what: str) -> None:
    with refused("merge_state_dicts", what):
        merge_state_dicts([given, {"w": torch.ones(1)}], "linear", weight=1.0)
