"""Reports: numbers that add up over slices, pages that can be read, the model card."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekern.engine.report.numbers import Row, added, numbers, numbers_of_slices
from mergekern.engine.report.summary import summarise
from mergekern.methods import REGISTRY
from mergekern.methods.registry import Inputs, Method

from accuracy import assert_bits_equal, assert_within
from cases import values

# ---- numbers ---------------------------------------------------------------------------------


def inputs_of(
    n: int = 3, shape: tuple[int, ...] = (37, 41), dtype: Any = torch.bfloat16, **more: Any
) -> Inputs:
    base = values(shape, dtype, seed=1)
    noise = [values(shape, torch.float32, seed=9 + i) for i in range(n)]
    return Inputs(
        xs=[(base.float() + 0.1 * e).to(dtype) for e in noise],
        base=base,
        name="encoder.layers.0.weight",
        seed=4,
        out_dtype=dtype,
        backend="auto",
        **more,
    )


def merged(inputs: Inputs, name: str, **given: Any) -> tuple[Row, Method, dict[str, Any], Tensor]:
    method = REGISTRY[name]
    arguments = method.arguments(given, len(inputs.xs))
    result = method.merge(inputs, **arguments)
    return numbers(inputs, arguments, method, result), method, arguments, result


def products(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact dot products, one rounding, and a bound on the error of any order of summation."""
    flat = [t.double().reshape(-1).tolist() for t in tensors]
    dots = torch.tensor(
        [[math.fsum(x * y for x, y in zip(a, b)) for b in flat] for a in flat], dtype=torch.float64
    )
    sizes = [[sum(abs(x * y) for x, y in zip(a, b)) for b in flat] for a in flat]
    bound = (len(flat[0]) + 3) * 2.0**-53 * torch.tensor(sizes, dtype=torch.float64)
    return dots, bound


def test_numbers_of_ties() -> None:
    inputs = inputs_of()
    row, _, _, result = merged(inputs, "ties", weight=1.0, density=0.2)
    total, n = inputs.xs[0].numel(), 3
    base = inputs.base
    assert base is not None
    taus = [x.double() - base.double() for x in inputs.xs]
    dots, bound = products(taus)
    assert_within(torch.tensor(row["task_vectors"]).double().view(n, n), dots, bound)
    square, its_bound = products([result.double() - base.double()])
    assert_within(torch.tensor([row["merged"]], dtype=torch.float64), square, its_bound)
    assert row["elements"] == [total] * n
    assert row["kept"] == [int(0.2 * total)] * n
    kept = [
        torch.zeros(total).scatter(0, t.float().abs().view(-1).argsort()[-int(0.2 * total) :], 1.0)
        for t in taus
    ]
    signs = torch.stack([k * t.sign().view(-1) for k, t in zip(kept, taus, strict=True)])
    # Equal magnitudes may be chosen otherwise there: at most as many places as there are ties.
    ties = sum(int((t.abs() == t.abs().view(-1).sort()[0][-int(0.2 * total)]).sum()) for t in taus)
    exact = int(((signs > 0).any(0) & (signs < 0).any(0)).sum())
    assert abs(row["conflicts"][0] - exact) <= ties
    assert row["conflicts"][0] > 0


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("task_arithmetic", {"weight": 1.0}),
        ("ties", {"weight": 1.0, "density": 0.3}),
        ("magnitude_prune", {"weight": 1.0, "density": 0.3}),
        ("breadcrumbs", {"weight": 1.0, "density": 0.5, "gamma": 0.1}),
        ("dare_linear", {"weight": 1.0, "density": 0.3, "rescale": False}),
        ("ram", {"epsilon": 0.05}),
    ],
)
def test_what_is_kept_is_what_the_merge_keeps(name: str, given: dict[str, Any]) -> None:
    """Of one model, result - base is nonzero exactly where something nonzero is kept."""
    inputs = replace(inputs_of(1, dtype=torch.float64))
    row, _, _, result = merged(inputs, name, **given)
    assert inputs.base is not None
    assert bool((inputs.xs[0] != inputs.base).all())
    assert row["kept"] == [int((result != inputs.base).sum())]
    assert row["conflicts"] == [0.0]
    share = row["kept"][0] / inputs.base.numel()
    assert share == 1 if name == "task_arithmetic" else 0 < share < 1


def test_ties_global_keeps_by_its_survey() -> None:
    inputs = inputs_of()
    method = REGISTRY["ties_global"]
    arguments = method.arguments({"density": 0.25}, 3)
    assert method.survey is not None
    found = method.survey(lambda visitor: visitor(inputs, **arguments))
    inputs = replace(inputs, survey=found)
    row = numbers(inputs, arguments, method, method.merge(inputs, **arguments))
    assert row["kept"] == [int(0.25 * inputs.xs[0].numel())] * 3


def test_draws_of_a_host_are_not_drawn_again() -> None:
    inputs = inputs_of(host="mergekit")
    torch.manual_seed(0)
    row, *_ = merged(inputs, "dare_ties", weight=1.0, density=0.5)
    after = torch.rand(())
    torch.manual_seed(0)
    REGISTRY["dare_ties"].merge(
        inputs, **REGISTRY["dare_ties"].arguments({"weight": 1.0, "density": 0.5}, 3)
    )
    assert_bits_equal(after, torch.rand(()))
    assert "kept" not in row
    everything = numbers(inputs, {"weight": [1.0] * 3}, REGISTRY["sce"], inputs.xs[0])
    assert row["conflicts"] == everything["conflicts"]


@pytest.mark.parametrize("name", ["linear", "karcher"])
def test_without_a_base_the_models_are_compared(name: str) -> None:
    inputs = replace(inputs_of(), base=None)
    row, _, _, result = merged(inputs, name, **({"weight": 1.0} if name == "linear" else {}))
    assert set(row) == {"elements", "models", "merged"}
    dots, bound = products([*inputs.xs, result])
    assert_within(torch.tensor(row["models"]).double().view(3, 3), dots[:3, :3], bound[:3, :3])
    assert_within(torch.tensor(row["merged"]).double(), dots[3, 3:], bound[3, 3:])


def test_absent_models_count_nothing() -> None:
    row, *_ = merged(inputs_of(2, models=[0, 2]), "ties", weight=1.0, density=0.5)
    alone, *_ = merged(inputs_of(2), "ties", weight=1.0, density=0.5)
    total = 37 * 41
    assert row["elements"] == [total, 0, total]
    assert row["kept"] == [alone["kept"][0], 0, alone["kept"][1]]
    assert row["conflicts"] == alone["conflicts"]
    whole = torch.tensor(row["task_vectors"]).view(3, 3)
    assert_bits_equal(whole[::2, ::2], torch.tensor(alone["task_vectors"]).view(2, 2))
    assert not whole[1].any()
    assert not whole[:, 1].any()


def cut(inputs: Inputs, first: int, last: int) -> Inputs:
    flat = [x.reshape(-1)[first:last] for x in inputs.xs]
    base = None if inputs.base is None else inputs.base.reshape(-1)[first:last]
    return replace(inputs, xs=flat, base=base, offset=first, shape=tuple(inputs.xs[0].shape))


@pytest.mark.parametrize("name", ["task_arithmetic", "ram", "linear"])
def test_slices_that_are_together_have_the_bits_of_slices_alone(name: str) -> None:
    inputs = inputs_of()
    inputs = replace(inputs, base=None) if name == "linear" else inputs
    _, method, arguments, result = merged(
        inputs, name, **({} if name == "ram" else {"weight": 1.0})
    )
    ranges = [(0, 500), (500, 501), (501, 1500), (1500, 1517)]
    together = numbers_of_slices(inputs, arguments, method, result, ranges)
    alone = [numbers(cut(inputs, a, b), arguments, method, result.view(-1)[a:b]) for a, b in ranges]
    assert together == alone
    total: Row | None = None
    for row in together:
        total = added(total, row)
    whole = numbers(inputs, arguments, method, result)
    assert total is not None
    assert total.keys() == whole.keys()
    for key in ("elements", "kept", "conflicts"):
        assert total.get(key) == whole.get(key)


def test_slices_share_the_rules_of_the_whole() -> None:
    """Thresholds, draws and ties of the tensor, though slices are counted one by one."""
    inputs = inputs_of(dtype=torch.float32)
    inputs = replace(inputs, xs=[(4 * x).round() / 4 for x in inputs.xs])
    for name in ("ties", "dare_ties", "breadcrumbs"):
        whole, method, arguments, result = merged(inputs, name, weight=1.0, density=0.4)
        rows = numbers_of_slices(inputs, arguments, method, result, [(0, 700), (700, 1517)])
        for key in ("elements", "kept", "conflicts"):
            assert added(rows[0], rows[1])[key] == whole[key]


def test_numbers_of_nothing_and_of_nan() -> None:
    row, *_ = merged(inputs_of(shape=(0, 3)), "ties", weight=1.0, density=0.5)
    assert row["elements"] == row["kept"] == [0.0] * 3
    assert row["conflicts"] == row["merged"] == [0.0]
    inputs = inputs_of(shape=())
    inputs.xs[1].fill_(math.nan)
    row, *_ = merged(inputs, "task_arithmetic", weight=1.0)
    assert math.isnan(row["task_vectors"][4])
    assert not math.isnan(row["task_vectors"][0])
    assert math.isnan(row["merged"][0])


def test_results_of_another_dtype() -> None:
    """result - base is exact in float64, however each is stored."""
    for out in (torch.float16, torch.float32, torch.float64):
        inputs = replace(inputs_of(2), out_dtype=out)
        row, _, _, result = merged(inputs, "task_arithmetic", weight=0.37)
        assert inputs.base is not None
        square, bound = products([result.double() - inputs.base.double()])
        assert_within(torch.tensor([row["merged"]], dtype=torch.float64), square, bound)


# ---- summary ---------------------------------------------------------------------------------


def test_norms_and_cosines_of_known_vectors() -> None:
    def row(*vectors: list[float], elements: int = 4) -> Row:
        v = np.array(vectors)
        return {
            "elements": [float(elements)] * len(v),
            "task_vectors": (v @ v.T).ravel().tolist(),
            "merged": [float((v.mean(0) ** 2).sum())],
            "conflicts": [1.0],
        }

    rows = {
        "stem.weight": row([3.0, 4.0], [0.0, 0.0]),
        "layers.10.b": row([1.0, 0.0], [0.0, 2.0]),
        "layers.9.a": row([1.0, 0.0], [1.0, 0.0]),
        "layers.9.b": row([2.0, 0.0], [-2.0, 0.0]),
    }
    rows["layers.10.c"] = row([2.0, 2.0])  # of model 0 alone
    s = summarise(rows, ["a", "b"])
    assert [layer.name for layer in s.layers] == ["layers.9", "layers.10"]
    assert s.outside == [0]
    assert {k: [t for _, t in v] for k, v in s.kinds().items()} == {
        "a": [2],
        "b": [3, 1],
        "c": [4],
    }
    assert s.norms[0].tolist() == [5.0, 0.0]
    assert math.isnan(s.norms[4, 1])
    assert s.means[2] == 1.0
    assert s.means[3] == 0.0
    assert s.means[4] == math.sqrt(8.0)
    assert s.cosines([2])[0, 1] == 1.0
    assert s.cosines([3])[0, 1] == -1.0
    assert s.cosines([1, 4])[0, 1] == 0.0
    assert math.isnan(s.cosines([0])[0, 1])  # one of them did not move
    assert math.isnan(s.cosines([4])[0, 1])
    assert abs(s.cosines([2, 3])[0, 1] - (1 - 4) / 5) <= 4 * 2.0**-53
    assert s.joint_norms([2, 3]).tolist() == [math.sqrt(5), math.sqrt(5)]
    assert s.conflict_shares is not None
    assert s.conflict_shares.tolist() == [0.25] * 5
    assert s.kept_shares is None
