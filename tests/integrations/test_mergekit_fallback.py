"""The drop-in under mergekit: calls that go to mergekit, and what others do to its objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergekern.integrations import mergekit as dropin
from mergekern.integrations.mergekit import calls

from accuracy import assert_bits_equal, assert_bytes_equal
from mergekit_calls import SHAPE, api, arguments, base_api, only_reason, registry, served


@pytest.fixture(autouse=True)
def taken_back() -> Iterator[None]:
    yield
    dropin.uninstall()


@pytest.fixture
def installed() -> None:
    dropin.install(host=False)


# ---- calls that go to mergekit ---------------------------------------------------------------


def autograd(given: dict[str, Any]) -> Tensor:
    xs = [x.requires_grad_() for x in given["tensors"]]
    merged = api.merge_tensors(**given)
    merged.sum().backward()
    return torch.stack([x.grad for x in xs if x.grad is not None])


def fake(given: dict[str, Any]) -> Tensor:
    with FakeTensorMode() as mode:
        xs = [mode.from_tensor(x) for x in given["tensors"]]
        return api.merge_tensors(**given | {"tensors": xs})


def vmap(given: dict[str, Any]) -> Tensor:
    def merge(*xs: Tensor) -> Tensor:
        return api.merge_tensors(**given | {"tensors": xs})

    return torch.func.vmap(merge)(*(x[None] for x in given["tensors"]))


def forward_mode(given: dict[str, Any]) -> Tensor:
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        x, *more = given["tensors"]
        dual = forward.make_dual(x, torch.ones_like(x))
        merged = api.merge_tensors(**given | {"tensors": [dual, *more]})
        return forward.unpack_dual(merged).tangent


class Marked(Tensor):
    pass


def subclass(given: dict[str, Any]) -> Tensor:
    xs = [x.as_subclass(Marked) for x in given["tensors"]]
    return api.merge_tensors(**given | {"tensors": xs})


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "slerp"])
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (autograd, "autograd"),
        (fake, "a torch dispatch mode is active"),
        (vmap, "inside a torch.func transform"),
        (forward_mode, "forward-mode autograd"),
        (subclass, "tensor subclass Marked"),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_tensors_that_go_to_mergekit(call: Any, reason: str, name: str) -> None:
    """With the reason counted, and with mergekit's result."""
    outcome = []
    for place in (dropin.install, dropin.uninstall):
        place()
        before = dropin.counts()
        try:
            outcome.append(call(arguments(name)))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            outcome.append(str(error))
        if place is dropin.install:
            assert only_reason(before) == reason
    got, expected = outcome
    assert type(got) is type(expected)
    if isinstance(got, str) or call is fake:
        assert str(got) == str(expected)
    else:
        assert_bits_equal(got, expected)


def test_meta_tensors_go_to_mergekit(installed: None) -> None:
    """Straight to the function: mergekit's entry points stop at autocast."""
    method = registry.get("ties")
    xs = [torch.empty(SHAPE, device="meta") for _ in range(3)]
    group = base_api.TensorGroup.from_tensors(xs, base_index=0)
    (bound,) = method._bind_parameters((group,), {"weight": 1.0})
    before = dropin.counts()
    assert method.merge_group(group, **bound).is_meta
    assert only_reason(before) == "meta tensors"


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("linear", {"weight": [1.0, -1.0, 0.0]}, "weights sum to 0"),
        ("linear", {"weight": [1.0, float("inf"), 0.0]}, "weight is not finite"),
        ("slerp", {"t": float("nan")}, "t is not finite"),
        ("ties", {"density": 1.5}, "density is outside 0 to 1"),
        ("ties", {"density": -1.0}, "density is outside 0 to 1"),
        ("passthrough", {"scale": None}, "scale is not set"),
    ],
)
def test_values_that_go_to_mergekit(name: str, values: dict[str, Any], reason: str) -> None:
    given = arguments(name, **values)
    dropin.install()
    before = dropin.counts()
    got = api.merge_tensors(**given)
    assert only_reason(before) == reason
    dropin.uninstall()
    assert_bits_equal(got, api.merge_tensors(**given))


def test_a_base_alone_is_handed_on(installed: None) -> None:
    x = torch.randn(3)
    before = dropin.counts()
    merged = api.merge_tensors([x], "ties", base_index=0, parameters={"weight": 1.0})
    assert merged is x
    assert only_reason(before) == "too few models beside the base"


def test_an_error_of_a_kernel_is_no_fallback(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(calls, "merge_tensors", fails)
    before = dropin.counts()
    with pytest.raises(RuntimeError, match="out of memory"):
        api.merge_tensors(**arguments("ties"))
    assert not served(before).fallbacks


# ---- what others do to the same objects ------------------------------------------------------


def test_a_wrapper_around_an_implementation_is_seen_and_stays() -> None:
    method = registry.get("linear")
    original = method.implementation
    given = arguments("linear")
    expected = api.merge_tensors(**given)
    seen = []
    dropin.install()
    inside = method.implementation

    def wrapper(batch: Any, **parameters: Any) -> Tensor:
        seen.append(calls.MODE.installed)
        return inside(batch, **parameters)

    method.implementation = wrapper
    try:
        api.merge_tensors(**given)
        dropin.uninstall()
        assert method.implementation is wrapper
        before = dropin.counts()
        assert_bytes_equal(api.merge_tensors(**given), expected)
        assert served(before) == ({}, {})
        assert seen == [True, False]
    finally:
        method.implementation = original


def test_a_method_that_somebody_replaced_before_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def own(batch: Any, **_: Any) -> Tensor:
        return batch.tensors[0] * 0

    monkeypatch.setattr(registry.get("linear"), "implementation", own)
    assert "linear" not in dropin.install()
    assert not api.merge_tensors(**arguments("linear")).any()


def test_a_merge_group_that_is_replaced_later_is_called(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = registry.get("ties")
    monkeypatch.setattr(type(method), "merge_group", lambda self, group, **_: group.base.tensor)
    before = dropin.counts()
    given = arguments("ties")
    assert api.merge_tensors(**given) is given["tensors"][0]
    assert only_reason(before) == "its merge_group was replaced in mergekit"


def test_the_objects_stay_what_they_are(installed: None) -> None:
    ties = registry.get("ties")
    assert ties.sparsification_method.value == "magnitude"
    assert ties.consensus_method.value == "sum"
    assert dataclasses.replace(ties) == ties
    assert registry.get("linear").supports_batching
