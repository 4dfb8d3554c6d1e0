"""WUDI: Adam on one quadratic in the place of autograd through a product for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...methods.merge import merge_tensors
from .pool import Recipe, StateDict, as_pool, load, merge_all, named, state_dicts


def _recipes(device: Any, iter_num: int) -> tuple[Recipe, Recipe]:
    """For a matrix, and for what is averaged."""

    def descend(base: Tensor | None, xs: list[Tensor]) -> Tensor:
        assert base is not None
        there = [x.to(device) for x in xs]
        merged = merge_tensors(there, "wudi", base=base.to(device), steps=iter_num)
        return merged.to(base.device)

    def average(base: Tensor | None, xs: list[Tensor]) -> Tensor:
        return merge_tensors(xs, "task_arithmetic", base=base, weight=1.0, normalize=True)

    return descend, average


def _merged(
    base: StateDict, dicts: Sequence[StateDict], device: Any, iter_num: int, excluded: Sequence[str]
) -> dict[str, Tensor]:
    descend, average = _recipes(device, iter_num)
    merged: dict[str, Tensor] = {}
    for name, (b, *xs) in named("wudi", [base, *dicts]):
        recipe = average if name in excluded else descend
        merged |= merge_all("wudi", {name: b}, [{name: x} for x in xs], recipe)
    return merged


@torch.no_grad()
def wudi_merging(
    task_vectors: Sequence[StateDict],
    accelerator: Any = "cuda",
    iter_num: int = 300,
    exclude_keys: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The merged task vector, as FusionBench's function of that name; see the method "wudi"."""
    zero = {name: torch.zeros_like(x) for name, x in task_vectors[0].items()}
    return _merged(zero, task_vectors, accelerator, iter_num, exclude_keys or ())


class WUDI:
    """out = base + the task vector that disturbs none of the tasks' own; see the method "wudi"."""

    iter_num: int
    exclude_keys: Sequence[str] | None
    fabric: Any

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        pool = as_pool(modelpool)
        pretrained = pool.load_pretrained_model()
        merged = _merged(
            pretrained.state_dict(),
            state_dicts(pool),
            self.fabric.device,
            self.iter_num,
            self.exclude_keys or (),
        )
        return load(pretrained, merged)
