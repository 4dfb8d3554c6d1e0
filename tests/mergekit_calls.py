"""Calls of mergekit's merge_tensors for the tests of its drop-in, and who served them."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch

from mergekern.integrations import mergekit as dropin
from mergekern.methods import REGISTRY

from required import peer

api = peer("mergekit.merge_methods.api", "mergekit")
registry = peer("mergekit.merge_methods.registry", "mergekit")
base_api = peer("mergekit.merge_methods.base", "mergekit")

if importlib.metadata.version("mergekit") != "0.1.5":
    pytest.skip("these tests are for mergekit 0.1.5", allow_module_level=True)

METHODS = sorted(set(REGISTRY) & set(registry._METHODS))
SHAPE = (12, 10)
VALUES = {"weight": [0.6, 0.9, 0.3], "t": 0.4, "density": 0.5, "scale": 3.0}


def arguments(name: str, *, dtype: torch.dtype = torch.float32, **given: Any) -> dict[str, Any]:
    """Keyword arguments of mergekit's merge_tensors for a plain call of that method."""
    spec = registry.get(name).spec
    contract = spec.contract
    has_base = contract.base in (base_api.BasePolicy.REQUIRED, base_api.BasePolicy.OPTIONAL)
    most = contract.max_inputs or (contract.max_non_base or 3) + has_base
    g = torch.Generator().manual_seed(1)
    tensors = [torch.randn(SHAPE, generator=g).to(dtype) for _ in range(min(3 + has_base, most))]
    parameters = {p.name: VALUES[p.name] for p in spec.parameters if p.name in VALUES} | given
    if isinstance(parameters.get("weight"), list):
        scope = next(p.scope for p in spec.parameters if p.name == "weight")
        n = len(tensors) - (has_base and scope == base_api.ParameterScope.NON_BASE)
        parameters["weight"] = parameters["weight"][:n]
    return {
        "tensors": tensors,
        "method": name,
        "parameters": parameters,
        "base_index": 0 if has_base else None,
    }


def served(before: dropin.Counts) -> dropin.Counts:
    return dropin.counts() - before


def only_reason(before: dropin.Counts) -> str:
    """The one fallback since; nothing was merged by mergekern."""
    since = served(before)
    assert not since.merged
    ((_, reason),) = since.fallbacks
    return reason
