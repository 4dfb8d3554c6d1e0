"""The drop-in under mergekit: what is replaced and put back, and the calls that it serves."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.integrations import mergekit as dropin
from mergekern.integrations.mergekit import calls, executor
from mergekern.integrations.mergekit.native import Kernel
from mergekern.methods import REGISTRY

from accuracy import assert_bits_equal, assert_bytes_equal
from mergekit_calls import METHODS, SHAPE, api, arguments, base_api, registry, served
from refusal import refused
from required import peer

graph = peer("mergekit.graph", "mergekit")
loader = peer("mergekit.io.loader", "mergekit")
multigpu = peer("mergekit.multigpu_executor", "mergekit")


@pytest.fixture(autouse=True)
def taken_back() -> Iterator[None]:
    yield
    dropin.uninstall()


@pytest.fixture
def installed() -> None:
    dropin.install(host=False)


# ---- what is replaced, what is put back ------------------------------------------------------


def state() -> list[dict[str, Any]]:
    """Every attribute of every object that the drop-in touches."""
    for method in registry.registered_methods():
        assert method.spec  # some compute it once, on first use
    owners = [*registry.registered_methods(), graph.Executor, loader.TensorLoader]
    return [dict(vars(owner)) for owner in (*owners, multigpu.MultiGPUExecutor)]


def assert_same_objects(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] is b[k] for k in a)


def test_every_method_of_both_is_replaced(installed: None) -> None:
    assert list(dropin.install()) == METHODS
    for name in METHODS:
        method = registry.get(name)
        inside = vars(method).get("implementation") or vars(method)["merge_group"]
        assert isinstance(inside, Kernel), name


def test_all_of_mergekits_methods_are_covered() -> None:
    assert len(registry._METHODS) == 20
    assert set(registry._METHODS) <= set(REGISTRY)


def test_uninstall_puts_every_object_back() -> None:
    before = state()
    dropin.install()
    dropin.install()
    assert [a.keys() for a in state()] != [b.keys() for b in before]
    dropin.uninstall()
    assert_same_objects(state(), before)
    dropin.uninstall()
    assert_same_objects(state(), before)


def test_an_install_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    replace = executor.replace

    def half(swaps: Any) -> None:
        replace(swaps)
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "replace", half)
    with pytest.raises(KeyboardInterrupt):
        dropin.install()
    assert_same_objects(state(), before)
    assert not calls.MODE.installed


@pytest.mark.parametrize("version", ["0.1.3", "0.1.6", "0.2.0", "1.0.0"])
def test_unknown_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with refused("mergekit", version, "0.1.4 or 0.1.5", error=mk.BackendError):
        dropin.install()
    assert_same_objects(state(), before)


def test_commands_without_mergekit_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for command in (dropin.yaml_main, dropin.pytorch_main):
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mergekern: mergekit: not installed")
        assert "pip install mergekit==0.1.5" in line


def test_mode_comes_from_the_variable(monkeypatch: pytest.MonkeyPatch, installed: None) -> None:
    for value, host in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("MERGEKERN_HOST", value)
        dropin.install()
        assert calls.MODE.host is host


# ---- calls that mergekern serves -------------------------------------------------------------


def ours(given: dict[str, Any]) -> Tensor:
    """The same call to mergekern itself."""
    spec = REGISTRY[given["method"]]
    tensors, base = list(given["tensors"]), None
    if given["base_index"] is not None and spec.base != "model":
        base = tensors.pop(given["base_index"])
    seed = int(torch.randint(2**63 - 1, ())) if spec.name in calls.RANDOM else 0
    return mk.merge_tensors(tensors, spec.name, base=base, seed=seed, **given["parameters"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_a_call_is_mergekerns(name: str, dtype: torch.dtype, installed: None) -> None:
    given = arguments(name, dtype=dtype)
    if dtype == torch.float32 and name in ("linear", "slerp"):
        # mergekit packs the coefficients of these two as float32.
        given["parameters"] = {
            k: torch.tensor(v).double().tolist() for k, v in given["parameters"].items()
        }
    copies = [x.clone() for x in given["tensors"]]
    before = dropin.counts()
    torch.manual_seed(5)
    got = api.merge_tensors(**given)
    torch.manual_seed(5)
    if dtype == torch.bfloat16 and name in ("linear", "slerp"):
        rounded = {k: torch.tensor(v).tolist() for k, v in given["parameters"].items()}
        given["parameters"] = rounded
    assert_bits_equal(got, ours(given))
    assert served(before).methods() == {name: 1}
    assert not served(before).fallbacks
    for x, copy in zip(given["tensors"], copies, strict=True):
        assert_bytes_equal(x, copy)


@pytest.mark.parametrize("name", METHODS)
def test_strides_autocast_and_grad_mode_change_nothing(name: str, installed: None) -> None:
    given = arguments(name)
    torch.manual_seed(5)
    expected = api.merge_tensors(**given)
    strided = [x.T.contiguous().T.requires_grad_() for x in given["tensors"]]
    assert not any(x.is_contiguous() for x in strided)
    torch.manual_seed(5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_bits_equal(api.merge_tensors(**given | {"tensors": strided}), expected)
    assert_bits_equal(functools.partial(_inference, given)(), expected)


def _inference(given: dict[str, Any]) -> Tensor:
    torch.manual_seed(5)
    with torch.inference_mode():
        return api.merge_tensors(**given)


def test_linear_of_many_outputs(installed: None) -> None:
    """Several outputs in one batch, of equal and of different weights, scalars among them."""
    states = [
        {k: torch.randn(s) for k, s in (("a", (3, 2)), ("b", (3, 2)), ("s", ()), ("t", ()))}
        for _ in range(3)
    ]
    same = api.merge_state_dicts(states, "linear", parameters={"weight": [1.0, 2.0, 0.5]})
    groups = base_api.PerGroupValues([[1.0, 2.0, 0.5], [1.0, 0.5, 4.0]] * 2)
    mixed = api.merge_state_dicts(states, "linear", parameters={"weight": groups})
    for i, key in enumerate(states[0]):
        xs = [s[key] for s in states]
        one, two = (
            mk.merge_tensors(xs, "linear", weight=w) for w in ([1, 2, 0.5], groups.values[i])
        )
        assert_bits_equal(same[key], one)
        assert_bits_equal(mixed[key], two)


def test_slerp_of_many_outputs(installed: None) -> None:
    states = [{k: torch.randn(3, 2) for k in "abc"} for _ in range(2)]
    ts = [0.0, 0.25, 1.0]
    t = base_api.PerGroupValues(ts)
    merged = api.merge_state_dicts(states, "slerp", base=1, parameters={"t": t})
    for key, t in zip("abc", ts, strict=True):
        expected = mk.merge_tensors([states[0][key]], "slerp", base=states[1][key], t=t)
        assert_bits_equal(merged[key], expected)


@pytest.mark.parametrize("name", [m for m in METHODS if m.startswith(("dare", "della"))])
def test_masks_follow_torchs_seed(name: str, installed: None) -> None:
    given = arguments(name)
    torch.manual_seed(3)
    first, second = api.merge_tensors(**given), api.merge_tensors(**given)
    torch.manual_seed(3)
    assert_bits_equal(api.merge_tensors(**given), first)
    assert not torch.equal(first, second)


def test_methods_without_masks_leave_the_generator_alone(installed: None) -> None:
    before = torch.get_rng_state()
    api.merge_tensors(**arguments("ties"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("parity", [{}, {"mergekit": "bits"}])
def test_host_mode_reaches_the_methods_that_have_it(
    host: bool, parity: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(calls, "merge_tensors", lambda *_, host, **__: asked.append(host))
    monkeypatch.setattr(calls.MODE, "host", host)
    spec = dataclasses.replace(REGISTRY["ties"], parity=parity)
    calls.run(spec, calls.Call([torch.ones(2)], torch.ones(2), {"weight": [1.0]}))
    assert asked == ["mergekit" if host and parity else None]


def test_a_batch_says_which_input_is_the_base(installed: None) -> None:
    base, x = torch.randn(2, *SHAPE)
    batch = base_api.TensorBatch((x[None], base[None]), base_index=1)
    got = registry.get("slerp").merge_batch(batch, t=torch.tensor([0.25]))
    assert_bits_equal(got[0], mk.merge_tensors([x], "slerp", base=base, t=0.25))


BITS = [m for m in METHODS if "bits" in REGISTRY[m].parity.get("mergekit", "")]
CHOOSING = {"ties", "breadcrumbs", "breadcrumbs_ties", "sce"}  # among equals, in 16 bits many


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BITS)
def test_host_mode_gives_the_bits_it_promises(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and name in CHOOSING:
        pytest.skip("which of equal magnitudes mergekit keeps is undefined")
    # A restored norm is a long sum, which torch adds up in an order of its own.
    rescale = {"rescale": False} if hasattr(registry.get(name), "default_rescale") else {}
    given = arguments(name, dtype=dtype, **rescale)
    outcome = []
    for place in (functools.partial(dropin.install, host=True), dropin.uninstall):
        place()
        torch.manual_seed(3)
        outcome.append(api.merge_tensors(**given))
    assert_bits_equal(*outcome)
