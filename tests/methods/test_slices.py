"""Merged slice by slice, every method gives the bits of the whole tensor."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekern.methods import REGISTRY, Inputs, Method, slices
from mergekern.methods.found import dump, load
from mergekern.methods.passes import Study, Visitor

from accuracy import assert_bits_equal

BACKENDS = ("torch", "cpu")

# Arguments that every rule of a method is reached with; the first has those that most users give.
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weight": [0.3, 1.7, -0.4]}, {"weight": 1.0, "normalize": False}],
    "passthrough": [{"scale": 0.7}, {}],
    "slerp": [{"t": 0.3}],
    "nuslerp": [
        {"weight": [1.0, 3.0]},
        {"weight": 1.0, "nuslerp_flatten": False},
        {"weight": [2.0, 1.0], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ],
    "multislerp": [{"weight": [1.0, 0.5, 2.0]}],
    "karcher": [{}],
    "model_stock": [{}, {"filter_wise": True}],
    "task_arithmetic": [{"weight": [1.0, -0.5, 0.3], "lambda": 0.8}],
    "ties": [
        {"weight": 1.0, "density": [0.2, 0.5, 1.0]},
        {"weight": [1.0, 0.0, 2.0], "density": 0.3, "rescale": True, "normalize": False},
        {"weight": 1.0, "density": [0.0, 1.0, 0.9]},
    ],
    "dare_linear": [{"weight": 0.5, "density": 0.4}, {"weight": 1.0, "density": [0.1, 1.0, 0.0]}],
    "dare_ties": [{"weight": 1.0, "density": 0.6}, {"weight": 1.0, "density": 0.5, "rescale": 0}],
    "breadcrumbs": [{"weight": 1.0, "density": 0.5, "gamma": 0.02}, {"weight": 1.0}],
    "breadcrumbs_ties": [
        {"weight": 1.0, "density": [0.9, 0.3, 0.5], "gamma": [0.3, 0.0, 0.01], "rescale": True}
    ],
    "magnitude_prune": [{"weight": [1.0, 0.2, 0.4], "density": 0.35}],
    "della": [{"weight": 1.0, "density": 0.5}, {"weight": 1.0, "density": [0.0, 0.4, 1.0]}],
    "della_linear": [
        {"weight": 1.0, "density": 0.3, "epsilon": 0.2, "rescale": False},
        {"weight": 1.0},
    ],
    "sce": [{"select_topk": 0.4}, {}, {"select_topk": 0.0}],
    "ram": [{}],
    "ramplus_tl": [{"r": 0.4, "alpha": 3.0}],
    "ties_global": [
        {"density": 0.3},
        {"density": [0.2, 0.9, 1.0], "merge_func": "sum"},
        {"density": 0.5, "merge_func": "max", "lambda": 0.5},
    ],
    "nearswap": [{"t": 0.001}, {"t": 1e-8}],
    "arcee_fusion": [{}],
    "fisher": [{}, {"norm": [1.0, 2.0, 3.0]}, {"normalize": False}],
    "emr": [{"scale": 0.7}],
    "magmax": [{}],
    "consensus": [{"lambda": 0.4}, {"lambda": 1.0, "k": 1}],
}

# What stays whole, and why; the host None is the method itself.
WHOLE: dict[tuple[str, str | None], str] = {
    ("arcee_fusion", None): "quantiles",
    ("breadcrumbs_ties", "mergekit"): "rescale: norms as torch sums a whole tensor",
    ("arcee_fusion", "mergekit"): "takes its quantiles from a sample that torch draws",
    ("dare_linear", "mergekit"): "masks come from torch's generator, model by model",
    ("dare_linear", "peft"): "masks come from torch's generator, model by model",
    ("dare_ties", "mergekit"): "masks come from torch's generator, model by model",
    ("dare_ties", "peft"): "masks come from torch's generator, model by model",
    ("della", "mergekit"): "masks come from torch's generator, model by model",
    ("della_linear", "mergekit"): "masks come from torch's generator, model by model",
}
TORCH_ONLY = {"nearswap", "arcee_fusion", "fisher", "emr", "magmax", "consensus"}


def models(
    n: int, shape: tuple[int, ...], dtype: torch.dtype, values: str, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """n models and their base. ties: task vectors of few magnitudes; odd: NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    noise = torch.randn((n, *shape), generator=generator) * 0.01
    if values == "ties":
        base, noise = base.sign(), (noise * 300).round() / 256
    xs = (base + noise).to(dtype)
    if values == "odd":
        for i, x in enumerate(xs.view(n, -1)):
            x[7 + 11 * i :: 997] = float("nan")
            x[13 + 5 * i :: 1499] = float("inf")
            x[3 + i :: 1211] = -float("inf")
            x[:40] = base.view(-1)[:40]
    return list(xs), base.to(dtype)


class Merge:
    """One tensor of one method, whole and in slices."""

    def __init__(
        self,
        name: str,
        given: dict[str, Any],
        xs: list[Tensor],
        base: Tensor,
        *,
        backend: str = "cpu",
        host: str | None = None,
    ) -> None:
        self.method: Method = REGISTRY[name]
        self.xs, self.base = xs, base if self.method.base == "required" else None
        if name == "fisher":
            given = {"fisher": [x.nan_to_num(0.5, 0.5, 0.5).abs() for x in xs], **given}
        self.arguments = self.method.arguments(given, len(xs))
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


def count_of(name: str) -> int:
    """Models besides the base, or as many as there may be."""
    most = REGISTRY[name].models[1]
    return 3 if most is None else most


def cases() -> list[Any]:
    return [
        pytest.param(name, given, id=f"{name}-{i}")
        for name, all_given in ARGUMENTS.items()
        for i, given in enumerate(all_given)
    ]


def hosts() -> list[tuple[str, str]]:
    return [(name, host) for name, method in REGISTRY.items() for host in method.parity]


def test_every_method_is_here() -> None:
    assert set(ARGUMENTS) == set(REGISTRY)


def test_what_stays_whole_is_known() -> None:
    """Of matrices, with arguments that make a method choose; nothing else may need all at once."""
    found = set()
    for name, method in REGISTRY.items():
        arguments = method.arguments(
            {"fisher": [torch.zeros(1)] * 3, **ARGUMENTS[name][0]}
            if name == "fisher"
            else ARGUMENTS[name][0],
            count_of(name),
        )
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
        ((97, 131), torch.float32, "odd"),
    ):
        merge = Merge(name, given, *models(n, shape, dtype, values), backend=backend)
        if merge.cut is None:
            continue
        assert_bits_equal(merge.by_slices(), merge.merged())
