"""TSV-M, Iso-C, Iso-CTS and calibrated task arithmetic, by singular values in float64."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ...check import FLOATS
from ...methods.compat import identical
from ...methods.merge import common_dtype, merge_tensors
from .pool import as_pool, load, named, state_dicts


def _merge(modelpool: Any, method: str, plain: Collection[str], **parameters: Any) -> nn.Module:
    """The pool merged into its pretrained model, as FusionBench does."""
    pool = as_pool(modelpool)
    return _merge_into(pool.load_pretrained_model(), pool, method, plain, **parameters)


def _merge_into(
    pretrained: Any, pool: Any, method: str, plain: Collection[str], **parameters: Any
) -> nn.Module:
    """Matrices of `plain` as what is no matrix."""
    merged = {}
    for name, (base, *xs) in named(method, [pretrained.state_dict(), *state_dicts(pool)]):
        if base.dtype not in FLOATS and all(identical(x, base) for x in xs):
            merged[name] = base
            continue
        dtype = common_dtype([x.dtype for x in (base, *xs)])
        dtype = dtype if dtype.is_floating_point else torch.float64
        merged[name] = merge_tensors(
            [x.to(dtype) for x in xs],
            method,
            base=base.to(dtype),
            name=name,
            spectral=name not in plain,
            **parameters,
        )
    return load(pretrained, merged)


class TSVM:
    """The largest singular vectors of each task vector, those of all tasks made orthonormal."""

    alpha: float | Iterable[float] | None
    exclude_keys: Sequence[str]
    return_single_task_models: bool

    @torch.no_grad()
    def run(self, modelpool: Any) -> Any:
        if self.return_single_task_models:
            host: Any = super()
            return host.run(modelpool)
        alpha = 1.0 if self.alpha is None else self.alpha
        scale: dict[str, Any] = {"lambda": alpha}
        if isinstance(alpha, Iterable):
            scale = {"weight": list(alpha)}
        return _merge(modelpool, "tsv_m", self.exclude_keys, host="fusion_bench", **scale)


class IsoC:
    """All singular values of the sum of task vectors made as large as their mean."""

    scaling_factor: float
    exclude_keys: Sequence[str] | None

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        return _merge(
            modelpool, "iso_c", self.exclude_keys or (), **{"lambda": self.scaling_factor}
        )


class IsoCTS:
    """The same of a common space and of what each task vector has beside it."""

    scaling_factor: float
    common_space_fraction: float
    exclude_keys: Sequence[str] | None

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        scale = {"lambda": self.scaling_factor, "common": self.common_space_fraction}
        return _merge(modelpool, "iso_cts", self.exclude_keys or (), **scale)


class CalibratedTaskArithmetic:
    """Task arithmetic whose singular values are divided by how often tasks count them.

    The pretrained model stays as it is, and no model `_merged_` is added to the pool.
    """

    scaling_factor: float
    alpha: float

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        pool = as_pool(modelpool)
        pretrained = copy.deepcopy(pool.load_pretrained_model())
        buffers = {name for name, _ in pretrained.named_buffers()}
        scale = {"lambda": self.scaling_factor, "alpha": self.alpha}
        return _merge_into(pretrained, pool, "svc", buffers, host="fusion_bench", **scale)
