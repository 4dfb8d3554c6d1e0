"""Averages, task arithmetic and MagMax: each tensor by itself, in one pass over all models.

By `merge_deltas`, whose sums are FusionBench's in float32; `weighted_sum` is closer to float64.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...check import FLOATS
from ...errors import ArgumentError
from ...methods.merge import merge_tensors
from ...ops.merge_deltas import merge_deltas
from .pool import as_pool, load, merge_all, named, state_dicts


class SimpleAverage:
    """out = sum_i x_i / N."""

    inplace: bool

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        utils = importlib.import_module("fusion_bench.models.utils")
        pool = as_pool(modelpool)
        models = [pool.load_model(name) for name in pool.model_names]
        dicts = [utils.get_target_state_dict(m) for m in models]

        def mean(_: Tensor | None, xs: list[Tensor]) -> Tensor:
            return merge_deltas(None, xs, [1.0] * len(xs), normalize=True)

        merged = merge_all("simple average", None, dicts, mean)
        if not isinstance(models[0], nn.Module):
            return load(models[0], merged)
        model = models[0] if self.inplace else copy.deepcopy(models[0])
        result = utils.load_state_dict_into_target_modules(model, merged, strict=False)
        if result.unexpected_keys:
            raise ValueError(f"unexpected keys in the state dict: {result.unexpected_keys}")
        return model


class WeightedAverage:
    """out = sum_i w_i x_i, with normalize over sum_i w_i."""

    weights: Sequence[float]
    normalize: bool

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        pool = as_pool(modelpool)
        weights = np.array([float(w) for w in self.weights])
        if len(weights) != len(pool.model_names):
            raise ArgumentError.of(
                "weighted average",
                "weights has the wrong length",
                len(weights),
                len(pool.model_names),
            )
        if self.normalize:
            weights = weights / np.sum(weights)
        models = [pool.load_model(name) for name in pool.model_names]

        def mean(_: Tensor | None, xs: list[Tensor]) -> Tensor:
            return merge_deltas(None, xs, weights.tolist())

        dicts = [m.state_dict() for m in models]
        return load(models[0], merge_all("weighted average", None, dicts, mean))


class TaskArithmetic:
    """out = base + scaling_factor * sum_i (x_i - base)."""

    scaling_factor: float
    inplace: bool

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        pool = as_pool(modelpool)
        pretrained = pool.load_model("_pretrained_")

        def add(base: Tensor | None, xs: list[Tensor]) -> Tensor:
            return merge_deltas(base, xs, [1.0] * len(xs), scale=self.scaling_factor)

        dicts = state_dicts(pool)
        merged = merge_all("task arithmetic", pretrained.state_dict(), dicts, add)
        return load(pretrained if self.inplace else copy.deepcopy(pretrained), merged)


class MagMax:
    """out = base + scaling_factor * the task vector of the largest magnitude at each element."""

    scaling_factor: float
    inplace: bool

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        pool = as_pool(modelpool)
        pretrained = pool.load_model("_pretrained_")
        merged = {}
        models = [pretrained.state_dict(), *state_dicts(pool)]
        for name, (base, *xs) in named("magmax", models):
            merged[name] = base  # FusionBench takes integers from the base, equal or not
            if base.dtype in FLOATS:
                merged[name] = merge_tensors(
                    xs, "magmax", base=base, scale=self.scaling_factor, host="fusion_bench"
                )
        return load(pretrained if self.inplace else copy.deepcopy(pretrained), merged)
