"""Model Stock: how far to go from the base towards the mean, from the angles between models."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...check import FLOATS
from ...errors import ArgumentError
from ...methods.compat import identical
from ...methods.merge import common_dtype
from ...ops.gram import gram
from ...ops.weighted_sum import weighted_sum
from .pool import as_pool, load, named, state_dicts


class ModelStock:
    """out = t mean_i(x_i) + (1 - t) base, t from the mean angle between the x_i - base."""

    ignore_keys: Sequence[str]
    model_save_path: str | None
    model_save_kwargs: Mapping[str, Any]
    config: Any

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        pool = as_pool(modelpool)
        pretrained = pool.load_pretrained_model()
        base, dicts = pretrained.state_dict(), state_dicts(pool)
        n = len(dicts)
        if n < 2:
            raise ArgumentError.of("model stock", "too few fine-tuned models", n, "at least 2")
        merged = {}
        for name, (b, *xs) in named("model stock", [base, *dicts]):
            if b.dtype not in FLOATS and all(identical(x, b) for x in xs):
                merged[name] = b
                continue
            dtype = common_dtype([x.dtype for x in (b, *xs)])
            dtype = dtype if dtype.is_floating_point else torch.float64
            b, xs = b.to(dtype), [x.to(dtype) for x in xs]
            t = 1.0 if name in self.ignore_keys else _stock_ratio(gram(xs, base=b))
            merged[name] = weighted_sum([*xs, b], [t / n] * n + [1 - t])
        result = load(pretrained, merged)
        if self.model_save_path is not None:
            self._save(pool, result)
        return result

    def _save(self, pool: Any, model: nn.Module) -> None:
        """The model, and of a transformers model a card, as FusionBench saves them."""
        pool.save_model(model, path=self.model_save_path, **self.model_save_kwargs)
        if isinstance(model, importlib.import_module("transformers").PreTrainedModel):
            card = importlib.import_module("fusion_bench.models").create_default_model_card(
                models=[pool.get_model_path(name) for name in pool.all_model_names],
                description="Merged model using [Model Stock](https://arxiv.org/abs/2403.19522).",
                algorithm_config=self.config,
                modelpool_config=pool.config,
            )
            (Path(str(self.model_save_path)) / "README.md").write_text(card)


def _stock_ratio(dots: Tensor) -> float:
    """n cos a / ((n - 1) cos a + 1), a the mean of the angles; FusionBench's 1e-8 in both."""
    n = len(dots)
    angles = []
    for i in range(n):
        for j in range(i + 1, n):
            product = math.sqrt(float(dots[i, i]) * float(dots[j, j]))
            cosine = float(dots[i, j]) / (product + 1e-8)
            angles.append(math.acos(min(1.0, max(-1.0, cosine))))
    cosine = math.cos(math.fsum(angles) / len(angles))
    return n * cosine / ((n - 1) * cosine + 1 + 1e-8)
