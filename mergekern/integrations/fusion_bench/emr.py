"""EMR merging: one task vector for all models, with a mask and a factor for each."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...bits import unpack
from ...errors import ArgumentError
from ...methods.compat import identical
from ...methods.emr import emr_state_dicts
from .pool import StateDict, as_pool, state_dicts


class EMR:
    """FusionBench's modulated model of EMR's unified task vector, masks and rescalers."""

    @torch.no_grad()
    def run(self, modelpool: Any) -> Any:
        host = importlib.import_module("fusion_bench.method.emr_merging.utils")
        pool = as_pool(modelpool)
        pretrained = pool.load_pretrained_model()
        dicts: list[StateDict] = [pretrained.state_dict(), *state_dicts(pool)]
        if isinstance(pretrained, nn.Module):
            self._check_buffers(pretrained, dicts)
            names = [name for name, _ in pretrained.named_parameters()]
            dicts = [{name: d[name] for name in names} for d in dicts]
        found = emr_state_dicts(dicts[0], dicts[1:])
        result = host.EMRModulatedModel(
            backbone=pretrained,
            modulators={},
            unified_task_vector={name: e.unified for name, e in found.items()},
        )
        for i, task in enumerate(pool.model_names):
            masks = {
                name: unpack(e.masks[i].bits, 0, e.unified.numel()).view(e.unified.shape)
                for name, e in found.items()
            }
            rescaler = next(iter(found.values())).rescale[i]
            result.add_modulator(task, host.EMRTaskModulator(mask=masks, rescaler=rescaler))
        return result

    @staticmethod
    def _check_buffers(pretrained: nn.Module, dicts: Sequence[StateDict]) -> None:
        for name, _ in pretrained.named_buffers():
            if name in dicts[0] and not all(identical(d[name], dicts[0][name]) for d in dicts):
                raise ArgumentError.of(
                    "emr", "FusionBench's model holds parameters only", f"buffer {name}", "equal"
                )
