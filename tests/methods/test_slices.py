"""Merged slice by slice, every method gives the bits of the whole tensor."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from mergekern import dispatch
from mergekern.keep import NOTHING, Band, Threshold
from mergekern.methods import REGISTRY, Inputs, Method, slices
from mergekern.methods.found import dump, load
from mergekern.methods.passes import Study, Visitor
from mergekern.methods.sce import Chosen
from mergekern.methods.trims import Kept
from mergekern.methods.whole_model import Found

from accuracy import assert_bits_equal, assert_bytes_equal
from methods.arguments import ARGUMENTS, cases, count_of, models, with_tensors
from refusal import refused

BACKENDS = ("torch", "cpu")

# What stays whole, and why; the host None is the method itself.
WHOLE: dict[tuple[str, str | None], str] = {
    ("arcee_fusion", None): "quantiles: the softmax of every row anew in each of four passes",
    ("regmean", None): "one Gram matrix for all rows",
    ("wudi", None): "every step has products of the whole matrix",
    ("wudi_exact", None): "the Gram matrix of all rows",
    ("breadcrumbs_ties", "mergekit"): "rescale: norms as torch sums a whole tensor",
    ("tsv_m", None): "singular vectors of a matrix",
    ("tsv_m", "fusion_bench"): "singular vectors of a matrix",
    ("iso_c", None): "singular vectors of a matrix",
    ("iso_cts", None): "singular vectors of a matrix",
    ("svc", None): "singular vectors of a matrix",
    ("svc", "fusion_bench"): "singular vectors of a matrix",
    ("arcee_fusion", "mergekit"): "takes its quantiles from a sample that torch draws",
    ("dare_linear", "mergekit"): "masks come from torch's generator, model by model",
    ("dare_linear", "peft"): "masks come from torch's generator, model by model",
    ("dare_ties", "mergekit"): "masks come from torch's generator, model by model",
    ("dare_ties", "peft"): "masks come from torch's generator, model by model",
    ("della", "mergekit"): "masks come from torch's generator, model by model",
    ("della_linear", "mergekit"): "masks come from torch's generator, model by model",
}
TORCH_ONLY = {"nearswap", "arcee_fusion", "fisher", "emr", "magmax", "consensus"}
TORCH_ONLY |= {"regmean", "wudi", "wudi_exact", "tsv_m", "iso_c", "iso_cts", "svc"}


class Merge:
    """One tensor of one method, whole and in slices."""

    def __init__(
        self,
        name: str,
        given: dict[str, Any],
        xs: list[Tensor],
        base: Tensor,
        *,
        backend: str = "auto",
        host: str | None = None,
    ) -> None:
        self.method: Method = REGISTRY[name]
        self.xs, self.base = xs, base if self.method.base == "required" else None
        self.arguments = self.method.arguments(with_tensors(name, given, xs), len(xs))
        self.whole = Inputs(self.xs, self.base, "w", 3, xs[0].dtype, backend, host)
        self.shape = tuple(xs[0].shape)
        self.cut = self.method.cut(self.arguments, self.shape, host)

    def merged(self) -> Tensor:
        """Of tensors in memory."""
        inputs = self.whole
        if self.method.survey is not None:
            inputs = replace(inputs, survey=self.method.survey(self.visit_whole))
        return self.method.merge(inputs, **self.arguments)

    def visit_whole(self, visitor: Visitor) -> None:
        visitor(self.whole, **self.arguments)

    def slices(self) -> list[Inputs]:
        """As an engine reads them: contiguous copies."""
        result = []
        for begin, end in slices.slices(self.shape, self.cut):
            xs = [slices.part(x, begin, end, self.cut).clone() for x in self.xs]
            base = None
            if self.base is not None:
                base = slices.part(self.base, begin, end, self.cut).clone()
            result.append(
                replace(self.whole, xs=xs, base=base, offset=begin, shape=self.shape, shared={})
            )
        return result

    def visit(self, visitor: Visitor) -> None:
        for one in self.slices():
            visitor(one, **self.arguments)

    def by_slices(self) -> Tensor:
        parts = self.slices()
        assert len(parts) > 1, "one slice proves nothing"
        study: Study | None = self.method.survey
        if self.method.measure and self.method.needs(self.arguments, self.shape, self.whole.host):
            study = self.method.measure
        found = None if study is None else study(self.visit)
        found = load(json.loads(json.dumps(dump(found), allow_nan=False)))
        merged = [self.method.merge(replace(one, survey=found), **self.arguments) for one in parts]
        return torch.cat([m.reshape(-1) for m in merged]).view(self.shape)


def hosts() -> list[tuple[str, str]]:
    return [(name, host) for name, method in REGISTRY.items() for host in method.parity]


def test_every_method_is_here() -> None:
    assert set(ARGUMENTS) == set(REGISTRY)


def test_what_stays_whole_is_known() -> None:
    """Of matrices, with arguments that make a method choose; nothing else may need all at once."""
    found = set()
    for name, method in REGISTRY.items():
        n = count_of(name)
        given = with_tensors(name, ARGUMENTS[name][0], [torch.zeros(300, 70)] * n)
        arguments = method.arguments(given, n)
        for host in (None, *method.parity):
            if method.cut(arguments, (300, 70), host) is None:
                found.add((name, host))
    assert found == set(WHOLE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1000, 4096])
@pytest.mark.parametrize(("name", "given"), cases())
def test_slices_give_the_bits_of_the_whole(
    name: str, given: dict[str, Any], size: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "cpu" and name in TORCH_ONLY:
        backend = "auto"
    monkeypatch.setattr(slices, "SLICE", size)
    n = count_of(name)
    for shape, dtype, values in (
        ((97, 131), torch.bfloat16, "plain"),
        ((130, 7, 11), torch.float32, "plain"),
        ((10007,), torch.float16, "plain"),
        ((97, 131), torch.float32, "ties"),
        ((103, 99), torch.float64, "ties"),
        ((103, 99), torch.float64, "plain"),
        ((97, 131), torch.float32, "odd"),
    ):
        merge = Merge(name, given, *models(n, shape, dtype, values), backend=backend)
        if merge.cut is None:
            continue
        assert_bits_equal(merge.by_slices(), merge.merged())


@pytest.mark.parametrize(("name", "given"), cases())
def test_slices_change_no_tensor_in_memory(
    name: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order are the same after one rounding to 16 bits."""
    for shape, values in (((97, 131), "plain"), ((53, 9, 17), "ties")):
        merge = Merge(name, given, *models(count_of(name), shape, torch.bfloat16, values))
        expected = merge.merged()
        monkeypatch.setattr(slices, "SLICE", 1000)
        assert_bits_equal(merge.merged(), expected)
        monkeypatch.undo()


@pytest.mark.parametrize(("name", "host"), hosts())
def test_hosts_in_slices(name: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE", 1 << 12)
    for given in ARGUMENTS[name]:
        for dtype, values in ((torch.float32, "plain"), (torch.bfloat16, "ties")):
            tensors = models(count_of(name), (97, 131), dtype, values)
            merge = Merge(name, given, *tensors, backend="auto", host=host)
            if merge.cut is not None:
                assert_bits_equal(merge.by_slices(), merge.merged())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (), (1,), (1, 1, 5000), (5000, 1)])
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_shapes_without_rows_or_elements(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "SLICE", 999)
    for given in ARGUMENTS[name]:
        merge = Merge(name, given, *models(count_of(name), shape, torch.float32, "plain"))
        parts = slices.slices(shape, merge.cut)
        assert [b for b, _ in parts[1:]] == [e for _, e in parts[:-1]]
        merged = merge.merged()
        if len(parts) > 1:
            assert_bits_equal(merge.by_slices(), merged)


@drawn(st.data())
@settings(max_examples=60, deadline=None)
def test_any_slices_of_any_tensor(data: st.DataObject) -> None:
    """Sizes that are no multiple of anything, few distinct values, any of the arguments."""
    name = data.draw(st.sampled_from(sorted(REGISTRY)))
    chosen = data.draw(st.sampled_from(ARGUMENTS[name]))
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    values = data.draw(st.sampled_from(["plain", "ties"]))
    seed = data.draw(st.integers(0, 9))
    backend = "auto" if name in TORCH_ONLY else data.draw(st.sampled_from(BACKENDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "SLICE", data.draw(st.integers(1, 700)) + math.prod(shape) // 9)
        tensors = models(count_of(name), shape, dtype, values, seed)
        merge = Merge(name, chosen, *tensors, backend=backend)
        if len(slices.slices(shape, merge.cut)) > 1:
            assert_bits_equal(merge.by_slices(), merge.merged())


def test_strided_tensors_are_cut_as_contiguous_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE", 1000)
    for name, given in (
        ("slerp", {"t": 0.3}),
        ("sce", {"select_topk": 0.3}),
        ("dare_ties", {"weight": 1.0, "density": 0.5}),
    ):
        xs, base = models(count_of(name), (67, 5, 41), torch.float32, "plain")
        there = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (*xs, base)]
        merge = Merge(name, given, xs, base)
        strided = Merge(name, given, there[:-1], there[-1])
        assert_bits_equal(strided.merged(), merge.merged())
        assert_bits_equal(strided.by_slices(), merge.by_slices())


# ---- surveys over several processes and several points ----------------------------------------


class Processes:
    """Surveys of several processes in threads that gather."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count)
        self._given: list[Any] = [None] * count

    def gather(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(mine: Any) -> list[Any]:
            self._given[rank] = copy.deepcopy(mine)
            self._barrier.wait(20)
            everything = copy.deepcopy(self._given)
            self._barrier.wait(20)
            return everything

        return gather

    def run(self, survey: Callable[[int], Any]) -> list[Any]:
        def one(rank: int) -> Any:
            try:
                return survey(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            runs = [pool.submit(one, rank) for rank in range(self.count)]
        errors = [run.exception() for run in runs]
        for error in errors:
            if error is not None and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [run.result() for run in runs]


def model_units(values: str, host: str | None, density: Any) -> list[tuple[Inputs, dict[str, Any]]]:
    """Slices of four tensors in the order of a plan; every other tensor lacks a model."""
    units = []
    spec = REGISTRY["ties_global"]
    for order, shape in enumerate([(40, 30), (7,), (0,), (1700,)]):
        xs, base = models(3, shape, torch.float32, values, seed=order)
        present = [0, 1, 2] if order % 2 == 0 else [0, 2]
        xs = [xs[i] for i in present]
        chosen = density if isinstance(density, float) else [density[i] for i in present]
        arguments = spec.arguments({"density": chosen}, len(xs))
        whole = Inputs(xs, base, f"t{order}", 0, torch.float32, "cpu", host, present, order=order)
        for one in slices.parts(whole, "elements"):
            units.append((one, arguments))
    return units


@pytest.mark.parametrize("host", [None, "fusion_bench"])
@pytest.mark.parametrize("density", [0.13, 0.5, [0.2, 0.7, 1.0]])
@pytest.mark.parametrize("values", ["plain", "ties"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_find_what_one_finds(
    count: int, values: str, density: Any, host: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slices are dealt out; with five, one process has next to nothing."""
    whole = model_units(values, host, density)
    monkeypatch.setattr(slices, "SLICE", 256)
    units = model_units(values, host, density)
    survey = REGISTRY["ties_global"].survey
    assert survey is not None

    def visits(of: list[tuple[Inputs, dict[str, Any]]]) -> Callable[[Visitor], None]:
        def visit(visitor: Visitor) -> None:
            for inputs, arguments in of:
                visitor(inputs, **arguments)

        return visit

    alone = survey(visits(units))
    processes = Processes(count)
    shares = [units[: 1 - count], *([one] for one in units[1 - count :])]
    if count == 2:
        shares = [units[::2], units[1::2]]
    found = processes.run(lambda rank: survey(visits(shares[rank]), processes.gather(rank)))
    for one in found:
        assert dump(one) == dump(alone)
    method = REGISTRY["ties_global"]
    by_slice: dict[str, list[Tensor]] = {}
    for inputs, arguments in units:
        merged = method.merge(replace(inputs, survey=found[-1]), **arguments)
        by_slice.setdefault(inputs.name, []).append(merged.reshape(-1))
    surveyed = survey(visits(whole))
    for inputs, arguments in whole:
        expected = method.merge(replace(inputs, survey=surveyed), **arguments)
        assert_bits_equal(torch.cat(by_slice[inputs.name]), expected.reshape(-1))


def test_processes_of_other_widths_are_refused() -> None:
    survey = REGISTRY["ties_global"].survey
    assert survey is not None
    processes = Processes(2)

    def one(rank: int) -> Any:
        dtype = (torch.float32, torch.float64)[rank]
        xs, base = models(1, (50,), dtype, "plain")
        inputs = Inputs(xs, base, f"t{rank}", 0, dtype, "cpu", order=rank)
        return survey(lambda f: f(inputs, density=[0.5]), processes.gather(rank))

    with refused("kth_magnitude", "float64"):
        processes.run(one)


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("ties", [{"weight": 1.0, "density": d} for d in (0.1, 0.35, 0.6, 1.0)]),
        ("breadcrumbs", [{"weight": 1.0, "density": d, "gamma": 0.1} for d in (0.2, 0.5)]),
        ("slerp", [{"t": t} for t in (0.1, 0.5, 0.9)]),
        ("nuslerp", [ARGUMENTS["nuslerp"][2], ARGUMENTS["nuslerp"][0]]),
        ("sce", [{"select_topk": k} for k in (0.1, 0.5, 1.0)]),
        ("dare_ties", [{"weight": 1.0, "density": d} for d in (0.1, 0.5)]),
        ("ties_global", [{"density": d} for d in (0.1, 0.35, 0.6)]),
    ],
)
def test_points_of_a_sweep_share_the_passes(
    name: str, points: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "SLICE", 1000)
    tensors = models(count_of(name), (97, 60), torch.float32, "ties")
    merges = [Merge(name, point, *tensors) for point in points]
    study = merges[0].method.measure or merges[0].method.survey
    assert study is not None
    passes = [0]

    def visit(visitor: Callable[..., None]) -> None:
        passes[0] += 1
        for one in merges[0].slices():
            for i, merge in enumerate(merges):
                visitor(one, i, **merge.arguments)

    if len({m.cut for m in merges}) > 1:
        merges = merges[:1]
    together = study.sweep(visit, len(merges))
    longest, passes[0] = passes[0], 0
    most = 0
    for merge, found in zip(merges, together, strict=True):
        counted = [0]

        def alone(visitor: Visitor, merge: Merge = merge, counted: list[int] = counted) -> None:
            counted[0] += 1
            merge.visit(visitor)

        assert dump(study(alone)) == dump(found)
        most = max(most, counted[0])
    assert longest == most


def test_points_count_common_digits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The topmost digits of three models, and the next ones of each point."""
    cpu_kth = pytest.importorskip("mergekern.backends.cpu.kth_magnitude")
    tensors = models(3, (3000,), torch.float32, "plain")
    merges = [Merge("ties", {"weight": 1.0, "density": d}, *tensors) for d in (0.2, 0.4)]
    counted: list[int] = []
    histogram = cpu_kth.digit_histogram
    monkeypatch.setattr(
        cpu_kth, "digit_histogram", lambda *a: counted.append(a[3]) or histogram(*a)
    )
    dispatch.load.cache_clear()

    def visit(visitor: Callable[..., None]) -> None:
        one = replace(merges[0].whole, shared={})
        for i, merge in enumerate(merges):
            visitor(one, i, **merge.arguments)

    study = merges[0].method.measure
    assert study is not None
    study.sweep(visit, 2)
    dispatch.load.cache_clear()
    assert counted.count(16) == 3
    assert counted.count(0) <= 6


# ---- what is found, as plain data -------------------------------------------------------------


def test_found_is_written_and_read_without_loss() -> None:
    odd = torch.tensor([0.1, -0.0, math.inf, math.nan, 5e-324], dtype=torch.float64)
    found = {
        ("a", 1): Threshold(0.1, 2**53 + 1, 3, 4),
        "b": [Band(Threshold(1e-300, 1, 2, 3), Threshold(math.inf, 0, 1, 0)), None, True],
        "c": (odd.view(5, 1), torch.zeros(0, 2, dtype=torch.float64)),
        "d": Kept([NOTHING, None], [1.0, -0.0]),
        "e": Chosen(None, [0.3, math.nan]),
        "f": Found({("w", 0): None}, "negative"),
    }
    text = json.dumps(dump(found), allow_nan=False)
    back = load(json.loads(text))
    assert json.dumps(dump(back), allow_nan=False) == text
    assert list(back) == list(found)
    assert type(back["d"]) is Kept
    assert type(back["f"]) is Found
    assert back["a", 1] == found["a", 1]
    assert back["b"] == found["b"]
    assert_bytes_equal(back["c"][0], odd.view(5, 1))
    assert back["c"][1].shape == (0, 2)
    assert math.copysign(1, back["d"].factors[1]) == -1


@pytest.mark.parametrize("wrong", [object(), torch.zeros(2), {1: {2: set()}}, np.int64(3)])
def test_what_no_method_finds_is_not_written(wrong: Any) -> None:
    with refused("dump", type(wrong).__name__ if not isinstance(wrong, dict) else "set"):
        dump(wrong)


@pytest.mark.parametrize("wrong", [{"Spam": []}, {}, 0.5])
def test_what_was_not_dumped_is_not_read(wrong: Any) -> None:
    with refused("load"):
        load(wrong)
