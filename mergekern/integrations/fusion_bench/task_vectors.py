"""TIES over a whole model, DARE, and both."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...check import FLOATS
from ...errors import ArgumentError
from ...methods.compat import identical
from ...methods.merge import common_dtype
from .pool import StateDict, as_pool, load, named, state_dicts
from .vectors import Drop, Entry, draw, majority, trims

log = logging.getLogger(__name__)


def _merge_ties(
    entries: list[Entry], threshold: float, merge_func: str, scaling_factor: float
) -> dict[str, Tensor]:
    """TIES over the whole model, in three walks through it and no copy of it."""
    function = merge_func.rpartition("-")[2]
    if function not in ("sum", "mean", "max"):
        raise ArgumentError.of("ties", "merge_func is unknown", merge_func, "sum, mean or max")
    share = threshold / 100 if threshold > 1 else threshold
    if not 0 <= share <= 1:
        raise ArgumentError.of("ties", "threshold is out of range", threshold, "0 to 100")
    dtype = common_dtype([x.dtype for e in entries for x in (e.base, *e.xs)])
    dtype = dtype if dtype.is_floating_point else torch.promote_types(dtype, torch.float32)
    keep = trims(entries, dtype, share)
    if keep is None:
        log.warning("ties: threshold %s keeps everything (FusionBench raises there)", threshold)
    sign = majority(entries, dtype, keep)
    # FusionBench gives a tied vote the sign that most elements have. Where that is none, its max
    # is 0, and its sum and mean are over the negative ones.
    tied = "positive" if sign > 0 else "none" if sign == 0 and function == "max" else "negative"
    return {
        e.name: e.base
        if e.base.dtype not in FLOATS and all(identical(x, e.base) for x in e.xs)
        else e.merge(
            dtype,
            keep=keep,
            elect="sum",
            zero=tied,
            combine="max" if function == "max" else "sum",
            normalize="count" if function == "mean" else False,
            scale=scaling_factor,
        )
        for e in entries
    }


def _restored(
    base: StateDict, merged: dict[str, Tensor], removed: Sequence[str]
) -> dict[str, Tensor]:
    """With the removed keys: T5's tied embeddings follow the shared one, others stay the base's."""
    shared = merged.get("transformer.shared.weight")
    for name in removed:
        if name in base:
            merged[name] = base[name] if shared is None else shared
    return merged


class Ties:
    """TIES of FusionBench: one threshold per model over all its tensors, every tie kept."""

    scaling_factor: float
    threshold: float
    remove_keys: Sequence[str] | None
    merge_func: str

    @torch.no_grad()
    def run(self, modelpool: Any, **kwargs: Any) -> nn.Module:
        pool = importlib.import_module("fusion_bench.compat.modelpool").to_modelpool(modelpool)
        pretrained = pool.load_model("_pretrained_")
        base, dicts = pretrained.state_dict(), state_dicts(pool)
        removed = list(self.remove_keys or [])
        entries = [
            Entry(name, b, xs, [None] * len(xs))
            for name, (b, *xs) in named("ties", [base, *dicts])
            if name not in removed
        ]
        merged = _merge_ties(entries, self.threshold, self.merge_func, self.scaling_factor)
        return load(pretrained, _restored(base, merged, removed))


class _Dropped:
    """What both DARE algorithms share: task vectors with elements dropped at random."""

    sparsity_ratio: float
    only_on_linear_weights: bool
    rescale: bool
    scaling_factor: float

    def _entries(self, models: Sequence[nn.Module], dicts: Sequence[StateDict]) -> dict[str, Entry]:
        """Every tensor, with FusionBench's draws: model by model, parameter by parameter.

        `models` and `dicts` begin with the base. A tied parameter is drawn for once, under all of
        its names.
        """
        if not 0 <= self.sparsity_ratio <= 1:
            raise ArgumentError.of(
                "dare", "sparsity_ratio is out of range", self.sparsity_ratio, "0 to 1"
            )
        divisor = 1 - self.sparsity_ratio if self.rescale else 1.0
        shared: dict[tuple[int, torch.Size], list[Drop]] = {}
        entries = {}
        for name, (base, *xs) in named("dare", dicts):
            drops = shared.setdefault((base.data_ptr(), base.shape), [None] * len(xs))
            entries[name] = Entry(name, base, xs, drops, divisor)
        for i, model in enumerate(models[1:]):
            linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
            names = [
                name
                for name, p in model.named_parameters()
                if id(p) in linear or not self.only_on_linear_weights
            ]
            draw([entries[name] for name in names], i, self.sparsity_ratio)
        return entries


class DareTaskArithmetic(_Dropped):
    """out = base + scaling_factor * sum_i drop_i(x_i - base), of the trainable parameters."""

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        pool = as_pool(modelpool)
        pretrained = pool.load_pretrained_model()
        models = [pretrained, *(pool.load_model(name) for name in pool.model_names)]
        entries = self._entries(models, [dict(m.named_parameters()) for m in models])
        merged = {}
        for name, p in models[1].named_parameters():
            if p.requires_grad:
                e = entries[name]
                dtype = common_dtype([x.dtype for x in (e.base, *e.xs)])
                merged[name] = e.merge(dtype, scale=self.scaling_factor)
        for name, value in merged.items():
            pretrained.get_parameter(name).copy_(value)
        return pretrained


class DareTies(_Dropped):
    """TIES of task vectors with elements dropped at random."""

    threshold: float
    remove_keys: Sequence[str] | None
    merge_func: str

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        pool = as_pool(modelpool)
        pretrained = pool.load_pretrained_model()
        models = [pretrained, *(pool.load_model(name) for name in pool.model_names)]
        dicts = [m.state_dict() for m in models]
        entries = self._entries(models, dicts)
        removed = list(self.remove_keys or [])
        left = [e for name, e in entries.items() if name not in removed]
        merged = _merge_ties(left, self.threshold, self.merge_func, self.scaling_factor)
        return load(pretrained, _restored(dicts[0], merged, removed))
