"""FusionBench's pools and models as state dicts, and back."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...check import FLOATS
from ...errors import ArgumentError
from ...methods.compat import Signature, agree, identical
from ...methods.merge import common_dtype

log = logging.getLogger(__name__)

StateDict = Mapping[str, Tensor]
Recipe = Callable[[Tensor | None, list[Tensor]], Tensor]


def named(op: str, models: Sequence[StateDict]) -> Iterator[tuple[str, list[Tensor]]]:
    """Every tensor of every model, checked to fit, read one name at a time (they may be lazy)."""
    names = list(models[0])
    for i, model in enumerate(models[1:], start=1):
        other = set(names) ^ set(model)
        if other:
            got = ", ".join(sorted(other))
            raise ArgumentError.of(op, f"model {i} has other tensors", got, "the same names")
    for name in names:
        tensors = [model[name].detach() for model in models]
        labelled = {f"model {i}": {name: Signature.of(x)} for i, x in enumerate(tensors)}
        for problem in agree(labelled).values():
            raise ArgumentError.of(op, f"{name} does not fit", problem, "one shape and kind")
        yield name, tensors


def merge_all(
    op: str, base: StateDict | None, models: Sequence[StateDict], recipe: Recipe
) -> dict[str, Tensor]:
    """recipe(base, xs) of every floating tensor; others are copied where equal.

    Other integers are merged in float64, and what takes the result cuts off the fraction.
    """
    merged = {}
    for name, tensors in named(op, models if base is None else [base, *models]):
        first = tensors[0]
        if first.dtype not in FLOATS:
            if all(identical(x, first) for x in tensors):
                merged[name] = first
                continue
            tensors = [x.double() for x in tensors]
        dtype = common_dtype([x.dtype for x in tensors])
        tensors = [x.to(dtype) for x in tensors]
        origin, xs = (None, tensors) if base is None else (tensors[0], tensors[1:])
        merged[name] = recipe(origin, xs)
    return merged


def load(model: Any, merged: StateDict) -> nn.Module:
    """The merged tensors in a model of the pool, or in the module that a lazy one stands for."""
    if isinstance(model, nn.Module):
        model.load_state_dict(merged)
        return model
    module: nn.Module = copy.deepcopy(model.meta_module).to_empty(device=model._device)
    result = module.load_state_dict(merged, strict=False)
    if result.unexpected_keys:
        raise ValueError(f"unexpected keys in the state dict: {result.unexpected_keys}")
    if result.missing_keys:
        log.warning("keys missing from the state dict: %s", result.missing_keys)
    return module


def as_pool(models: Any) -> Any:
    """A pool, also of a plain dict or list of models."""
    base_pool = importlib.import_module("fusion_bench.modelpool").BaseModelPool
    older = importlib.import_module("fusion_bench.compat.modelpool")
    if isinstance(models, (base_pool, older.ModelPool)):
        return models
    return base_pool(models)


def state_dicts(pool: Any) -> list[StateDict]:
    return [pool.load_model(name).state_dict() for name in pool.model_names]
