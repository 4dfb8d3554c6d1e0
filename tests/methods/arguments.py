"""Arguments of every method, and models for it, for tests that hold all methods to one rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergekern.methods import REGISTRY

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
    "regmean": [{}, {"weight": [1.0, 0.0, 2.5], "reduce": 0.9}],
    "wudi": [{"steps": 30}, {"steps": 0, "lambda": 0.4}],
    "wudi_exact": [{}],
    "emr": [{"scale": 0.7}],
    "magmax": [{}],
    "consensus": [{"lambda": 0.4}, {"lambda": 1.0, "k": 1}],
    "tsv_m": [{"weight": [1.0, 0.5, -2.0], "lambda": 0.7}, {"spectral": False}],
    "iso_c": [{}, {"weight": 0.4, "spectral": False}],
    "iso_cts": [{"common": 0.5}, {"spectral": False}],
    "svc": [{"lambda": 0.3, "alpha": 0.5}, {"spectral": False}],
}


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


def with_tensors(name: str, given: dict[str, Any], xs: list[Tensor]) -> dict[str, Any]:
    """The arguments, and those that are tensors, for these models."""
    if name == "fisher":
        return {"fisher": [x.nan_to_num(0.5, 0.5, 0.5).abs() for x in xs], **given}
    if name == "regmean" and xs[0].ndim == 2:
        rows = [x.nan_to_num(0.5, 0.5, 0.5).double() for x in xs]
        eye = torch.eye(xs[0].shape[1], dtype=torch.float64)
        return {"gram": [r.T @ r + eye for r in rows], **given}
    return given


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
