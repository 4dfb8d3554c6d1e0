"""The drop-in under mergekit: who serves which call, what stays mergekit's, what is put back."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mergekern as mk
from mergekern import MergekernError
from mergekern.integrations import mergekit as dropin
from mergekern.integrations.mergekit import calls, executor
from mergekern.integrations.mergekit.native import Kernel
from mergekern.methods import REGISTRY

from accuracy import assert_bits_equal, assert_bytes_equal
from refusal import refused
from required import peer

api = peer("mergekit.merge_methods.api", "mergekit")
registry = peer("mergekit.merge_methods.registry", "mergekit")
base_api = peer("mergekit.merge_methods.base", "mergekit")
graph = peer("mergekit.graph", "mergekit")
loader = peer("mergekit.io.loader", "mergekit")
multigpu = peer("mergekit.multigpu_executor", "mergekit")

if importlib.metadata.version("mergekit") != "0.1.5":
    pytest.skip("these tests are for mergekit 0.1.5", allow_module_level=True)

METHODS = sorted(set(REGISTRY) & set(registry._METHODS))
SHAPE = (12, 10)
VALUES = {"weight": [0.6, 0.9, 0.3], "t": 0.4, "density": 0.5, "scale": 3.0}


@pytest.fixture(autouse=True)
def taken_back() -> Iterator[None]:
    yield
    dropin.uninstall()


@pytest.fixture
def installed() -> None:
    dropin.install(host=False)


def arguments(name: str, *, dtype: torch.dtype = torch.float32, **given: Any) -> dict[str, Any]:
    """Keyword arguments of mergekit's merge_tensors for a plain call of that method."""
    spec = registry.get(name).spec
    contract = spec.contract
    has_base = contract.base in (base_api.BasePolicy.REQUIRED, base_api.BasePolicy.OPTIONAL)
    most = contract.max_inputs or (contract.max_non_base or 3) + has_base
    g = torch.Generator().manual_seed(1)
    tensors = [torch.randn(SHAPE, generator=g).to(dtype) for _ in range(min(3 + has_base, most))]
    parameters = {p.name: VALUES[p.name] for p in spec.parameters if p.name in VALUES} | given
    if isinstance(parameters.get("weight"), list):
        scope = next(p.scope for p in spec.parameters if p.name == "weight")
        n = len(tensors) - (has_base and scope == base_api.ParameterScope.NON_BASE)
        parameters["weight"] = parameters["weight"][:n]
    return {
        "tensors": tensors,
        "method": name,
        "parameters": parameters,
        "base_index": 0 if has_base else None,
    }


def served(before: dropin.Counts) -> dropin.Counts:
    return dropin.counts() - before


def only_reason(before: dropin.Counts) -> str:
    """The one fallback since; nothing was merged by mergekern."""
    since = served(before)
    assert not since.merged
    ((_, reason),) = since.fallbacks
    return reason


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
    missing = sorted(set(registry._METHODS) - set(REGISTRY))
    if missing:
        pytest.skip(f"not in mergekern yet: {', '.join(missing)}")


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


# ---- executor --------------------------------------------------------------------------------


class Value:
    """A result that knows how many others are alive."""

    alive = 0

    def __init__(self, number: int) -> None:
        self.number = number
        Value.alive += 1

    def __del__(self) -> None:
        Value.alive -= 1


LIVING: list[int] = []


class Step(graph.Task):
    number: int
    needs: tuple[graph.Task, ...] = ()

    def arguments(self) -> dict[str, Any]:
        return {f"x{i}": t for i, t in enumerate(self.needs)}

    def priority(self) -> int:
        return self.number % 3

    def execute(self, **values: Value) -> Value:
        LIVING.append(Value.alive)
        return Value(self.number + sum(v.number for v in values.values()))


def steps(seed: int) -> list[Any]:
    """A graph of tasks that need up to three earlier ones; every third is a target."""
    g = torch.Generator().manual_seed(seed)
    made: list[Any] = []
    for i in range(30):
        n = int(torch.randint(0, min(4, i + 1), (), generator=g))
        which = torch.randperm(i, generator=g)[:n].tolist()
        made.append(Step(number=i, needs=tuple(made[j] for j in which)))
    return made[::3]


def ran(seed: int, *, cached: bool) -> tuple[list[tuple[int, int]], list[int]]:
    """Targets and values in order, and how many results were alive at each step."""
    targets = steps(seed)
    universe = graph.TaskUniverse(targets)
    handles = [universe.get_handle(t) for t in targets]
    known = {handles[0]: Value(100)} if cached else None
    run = graph.Executor(handles, cached_values=known)._run(quiet=True)
    LIVING.clear()
    got = []
    for handle, value in run:
        got.append((handle.task().number, value.number))
        del value
    return got, list(LIVING)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cached", [False, True])
def test_executor_runs_frees_and_yields_alike(seed: int, cached: bool) -> None:
    expected = ran(seed, cached=cached)
    dropin.install()
    assert ran(seed, cached=cached) == expected
    assert expected[0]
    assert Value.alive == 0


def test_a_file_lists_its_names_once(installed: None, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    states = {f"w{i}": torch.full((2,), float(i)) for i in range(5)}
    save_file(states, tmp_path / "m.safetensors")
    torch.save(states, tmp_path / "m.bin")
    shard = loader.TensorLoader.get(str(tmp_path / "m.safetensors"))
    assert shard.keys() is not shard.keys()
    assert list(shard.keys()) == list(states)
    assert "w3" in shard.keys()  # noqa: SIM118 (mergekit asks this way)
    assert_bytes_equal(shard.get_tensor("w3"), states["w3"])
    assert not isinstance(loader.TensorLoader.get(str(tmp_path / "m.bin")), executor.Shard)


def test_one_line_a_run(installed: None, caplog: pytest.LogCaptureFixture) -> None:
    class Merge(graph.Task):
        method: str

        def arguments(self) -> dict[str, Any]:
            return {}

        def execute(self, **_: Any) -> Any:
            return api.merge_tensors(**arguments(self.method))

    caplog.set_level(logging.INFO, logger="mergekern")
    tasks = [Merge(method="linear"), Merge(method="ties"), Merge(method="passthrough")]
    graph.Executor(tasks).execute()
    graph.Executor(steps(0)).execute()  # nothing merged, nothing to say
    (line,) = [r.getMessage() for r in caplog.records if r.name == "mergekern"]
    assert line.startswith("mergekern: 3 tensors merged by mergekern (linear 1, passthrough 1, tie")
    assert "backends for cpu: " in line
    api.merge_tensors(**arguments("passthrough", scale=None))
    assert len(caplog.records) == 1


def test_refusals_are_mergekerns_errors() -> None:
    assert issubclass(mk.BackendError, MergekernError)
