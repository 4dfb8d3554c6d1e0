"""Several adapters beside each other: whether they fit, and what they have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from .adapter import Adapter, Factors
from .kohya_file import lasting

OP = "merge_adapters"


def fitting(loaded: Sequence[Adapter], union: bool) -> dict[str, list[Factors]]:
    """The factors of each module, one of each adapter."""
    names = sorted({name for a in loaded for name in a.modules})
    problems = []
    given: dict[str, list[Factors]] = {}
    for name in names:
        there = [a.modules[name] for a in loaded if name in a.modules]
        first = there[0]
        missing = [str(i) for i, a in enumerate(loaded) if name not in a.modules]
        if missing and not union:
            problems.append(f"{name} is missing from adapters {', '.join(missing)}")
        sizes = {(len(f.b), f.shape, f.embedding) for f in there}
        if len(sizes) > 1:
            problems.append(f"{name} differs in shape: {sorted(map(str, sizes))}")
        nothing = Factors(first.a[:0], first.b[:, :0], 1.0, first.shape, first.embedding)
        given[name] = [a.modules.get(name, nothing) for a in loaded]
        for i, a in enumerate(loaded):
            if name in a.modules:
                check.finite(OP, f"{name} of adapter {i}", a.modules[name].a)
                check.finite(OP, f"{name} of adapter {i}", a.modules[name].b)
    layouts = {a.layout for a in loaded}
    if len(layouts) > 1:
        what = "adapters name modules in different ways"
        raise ArgumentError.of(OP, what, f"layouts {', '.join(sorted(layouts))}", "one layout")
    bases = {str(a.config.get("base_model_name_or_path") or "") for a in loaded} - {""}
    if len(bases) > 1 and not union:
        problems.append(f"their bases have the names {sorted(bases)}")
    if problems:
        listed = ", ".join(problems)
        raise ArgumentError.of(
            OP, "adapters do not fit together", listed, "the same modules and shapes, or union=True"
        )
    if not given:
        raise ArgumentError.of(OP, "adapters have no modules", "none", "factors of at least one")
    return given


def config(loaded: Sequence[Adapter], modules: list[str]) -> dict[str, Any]:
    """The first adapter's settings, with what PEFT has to look for in those of all."""
    config = dict(loaded[0].config)
    if "metadata" in config:
        config["metadata"] = lasting(config["metadata"])
    for key in ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules"):
        if any(a.config.get(key) != config.get(key) for a in loaded):
            config |= {"target_modules": modules, "layers_to_transform": None}
            config |= {"layers_pattern": None, "exclude_modules": None}
            break
    if "components" in config:  # of diffusers; what is written names its modules itself
        settings = config["components"].items()
        config["components"] = {
            component: {k: v for k, v in each.items() if k != "target_modules"}
            for component, each in settings
        }
    wholes = [name for a in loaded for name in a.config.get("modules_to_save") or ()]
    if wholes:
        config["modules_to_save"] = sorted(set(wholes))
    return config


def saved(loaded: Sequence[Adapter], factored: Collection[str]) -> dict[str, Tensor]:
    """The tensors that are not factored, which nobody says how to merge."""
    saved: dict[str, Tensor] = {}
    for i, adapter in enumerate(loaded):
        for name, x in adapter.saved.items():
            module, _, part = name.rpartition(".")
            if part == "weight" and module in factored:
                what = f"{name} is saved whole by adapter {i}"
                raise ArgumentError.of(OP, what, "factors of it in another", "one or the other")
            if name in saved and not torch.equal(saved[name], x):
                raise ArgumentError.of(
                    OP, f"{name} is saved whole by several adapters", f"another one in {i}", "equal"
                )
            saved[name] = x
    return saved


def widest(loaded: Sequence[Adapter]) -> torch.dtype:
    dtype = loaded[0].dtype()
    for adapter in loaded[1:]:
        dtype = torch.promote_types(dtype, adapter.dtype())
    return dtype
