"""The spectral drop-ins: never further from float64 than FusionBench, on its own pools."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergekern as mk
from mergekern.integrations import fusion_bench as dropin

from accuracy import assert_bits_equal, assert_within, half_ulp
from methods.spectral_oracle import ORACLES
from refusal import refused
from required import peer

host = peer("fusion_bench", "fusion-bench")

CLASSES: list[tuple[str, str, dict[str, Any]]] = [
    ("TaskSingularVectorMerging", "tsv_m", {"alpha": 0.7}),
    ("TaskSingularVectorMerging", "tsv_m", {}),
    ("IsotropicMergingInCommonSubspace", "iso_c", {"scaling_factor": 0.7}),
    ("ISO_C_Merge", "iso_c", {"scaling_factor": 1.3, "exclude_keys": ["last.weight"]}),
    (
        "IsotropicMergingInCommonAndTaskSubspace",
        "iso_cts",
        {"scaling_factor": 0.7, "common_space_fraction": 0.6},
    ),
    ("ISO_CTS_Merge", "iso_cts", {"scaling_factor": 1.3, "common_space_fraction": 0.8}),
    ("SingularValueCalibrationArithmeticTask", "svc", {"scaling_factor": 0.4, "alpha": 0.8}),
]


class Net(nn.Module):
    """Tall, wide and square matrices, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 60)
        self.last = nn.Linear(60, 24)
        self.mix = nn.Linear(24, 24, bias=False)
        self.filters = nn.Conv2d(4, 4, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.tensor([2**24 + 1]))


def pool(n: int = 3) -> Any:
    g = torch.Generator().manual_seed(0)
    base = Net()
    for p in base.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=g)
    models: dict[str, nn.Module] = {"_pretrained_": base}
    for i in range(n):
        model = models[f"m{i}"] = copy.deepcopy(base)
        for p in model.parameters():
            p.data = p.data + 0.01 * torch.randn(p.shape, generator=g)
    return host.BaseModelPool(models)


def run(cls: type, models: Any, **parameters: Any) -> dict[str, Tensor]:
    with contextlib.redirect_stdout(io.StringIO()):
        return cls(**parameters).run(models).state_dict()


def theirs(name: str) -> type:
    return getattr(importlib.import_module(f"fusion_bench.method.{dropin._CLASSES[name][1]}"), name)


@pytest.mark.parametrize(("name", "method", "parameters"), CLASSES)
def test_never_less_accurate(name: str, method: str, parameters: dict[str, Any]) -> None:
    models = [model.state_dict() for model in (pool().load_model(m) for m in pool().model_names)]
    base = pool().load_pretrained_model().state_dict()
    got = run(getattr(dropin, name), pool(), **parameters)
    if method != "svc":  # FusionBench computes integers in float32
        for given in (base, *models):
            given.pop("steps")
    expected = run(theirs(name), _without_integers(pool()), **parameters)
    assert_bits_equal(got.pop("steps"), torch.tensor([2**24 + 1]))
    base.pop("steps", None)
    scale = parameters.get("scaling_factor", parameters.get("alpha", 1.0))
    for key, b in base.items():
        taus = [m[key].double() - b.double() for m in models]
        if b.ndim == 2 and key not in parameters.get("exclude_keys", ()):
            given = {"alpha": 0.8, "scale": scale} if method == "svc" else {}
            if method == "iso_cts":
                given = {"common": parameters["common_space_fraction"]}
            oracle = ORACLES[method](taus, **given)
            exact = b.double() + (1.0 if method == "svc" else scale) * oracle.merged
            bound = scale * oracle.error + half_ulp(exact, torch.float32) * (1 + 2.0**-20)
            assert_within(got[key], exact, bound)
        else:
            total = torch.stack(taus).sum(0) / (1 if method == "svc" else len(taus))
            exact = b.double() + scale * total
            size = b.double().abs() + torch.stack(taus).abs().sum(0)
            assert_within(got[key], exact, 8 * 2.0**-24 * size)
        own, other = ((x[key].double() - exact).norm() for x in (got, expected))
        assert own <= other * (1 + 2.0**-10), key


def _without_integers(models: Any) -> Any:
    for name in models.all_model_names:
        del models.load_model(name).steps
    return models


def test_calibrated_task_arithmetic_leaves_the_models_as_they_are() -> None:
    models = pool()
    kept = copy.deepcopy(models.load_pretrained_model().state_dict())
    options = {"scaling_factor": 0.4, "alpha": 0.8}
    first, second = (
        run(dropin.SingularValueCalibrationArithmeticTask, models, **options) for _ in range(2)
    )
    for key, x in models.load_pretrained_model().state_dict().items():
        assert_bits_equal(x, kept[key])
        assert_bits_equal(first[key], second[key])


def test_alpha_for_each_model() -> None:
    weight = [0.3, 1.0, -0.5]
    got = run(dropin.TaskSingularVectorMerging, pool(), alpha=weight)
    base = pool().load_pretrained_model().state_dict()
    xs = [pool().load_model(name).state_dict() for name in pool().model_names]
    for key, b in base.items():
        if b.is_floating_point():
            own = mk.merge_tensors([x[key] for x in xs], "tsv_m", base=b, weight=weight)
            assert_bits_equal(got[key], own)
    expected = run(theirs("TaskSingularVectorMerging"), _without_integers(pool()), alpha=weight)
    error = 2.0**-14 * (expected["mix.weight"] - base["mix.weight"]).norm().double()
    assert_within(got["mix.weight"], expected["mix.weight"].double(), error)


def test_more_models_than_rows_leave_the_base_as_in_fusion_bench() -> None:
    def narrow() -> Any:
        models = _without_integers(pool(5))
        for name in models.all_model_names:
            model = models.load_model(name)
            model.mix = nn.Linear(3, 24, bias=False)
            torch.manual_seed(len(name))
            nn.init.normal_(model.mix.weight)
        return models

    for name in ("TaskSingularVectorMerging",):
        expected = run(theirs(name), narrow())
        assert_bits_equal(
            run(getattr(dropin, name), narrow())["mix.weight"], expected["mix.weight"]
        )


def test_single_task_models_are_fusion_bench_s() -> None:
    def each(cls: Callable[..., Any]) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return cls(return_single_task_models=True).run(_without_integers(pool()))

    own, other = each(dropin.TaskSingularVectorMerging), each(theirs("TaskSingularVectorMerging"))
    assert own.keys() == other.keys() == {"m0", "m1", "m2", "merged"}
    for name, model in other.items():
        for key, value in model.state_dict().items():
            assert_bits_equal(own[name].state_dict()[key], value)


def test_a_model_with_a_nan_is_refused() -> None:
    models = pool()
    models.load_model("m1").mix.weight.data[3, 4] = float("nan")
    with refused("iso_c", "task vector 1 of mix.weight[3, 4]", "nan"):
        run(dropin.ISO_C_Merge, models, scaling_factor=1.0)


@pytest.mark.parametrize("shape", [(768, 768), (192, 768), (768, 192)])
def test_layers_of_encoders(shape: tuple[int, int]) -> None:
    """Attention of ViT-B, an MLP of a fourth of it: FusionBench's functions beside the methods."""
    utils = importlib.import_module("fusion_bench.method.task_singular_vector.utils.TSVM_utils")
    iso = importlib.import_module("fusion_bench.method.isotropic_merging.iso_utils")
    g = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(shape, generator=g)
    xs = [base + 1e-3 * torch.randn(shape, generator=g) for _ in range(4)]
    vectors = [{"w": x - base} for x in xs]
    exact = [{"w": x.double() - base.double()} for x in xs]
    calls: dict[str, Callable[[Any], Any]] = {
        "tsv_m": lambda v: utils.compute_and_sum_svd_mem_reduction(v, accelerator="cpu"),
        "iso_c": lambda v: iso.iso_c(v, "cpu"),
        "iso_cts": lambda v: iso.iso_cts(v, 0.8, "cpu"),
    }
    names = list(calls) if shape[0] != shape[1] else ["tsv_m"]
    for name in names:
        with contextlib.redirect_stdout(io.StringIO()):
            theirs, oracle = (calls[name](v)["w"].double() for v in (vectors, exact))
        own = mk.merge_tensors(xs, name, base=base, out_dtype=torch.float64) - base.double()
        errors = [float((x - oracle).norm() / oracle.norm()) for x in (own, theirs)]
        assert errors[0] <= 2.0**-23
        assert errors[0] <= errors[1]
