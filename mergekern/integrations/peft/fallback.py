"""What goes to PEFT's own function, why, and how often."""

from __future__ import annotations

import pkgutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from ...check import FLOATS, accumulator, name_of

UTILS = "peft.utils.merge_utils"
LORA = "peft.tuners.lora.model"
LORA_MODEL = f"{LORA}:LoraModel"
ELECT = {"total": "sum", "frequency": "count"}  # PEFT's names of elections, and ours

served: Counter[str] = Counter()
fallbacks: Counter[tuple[str, str]] = Counter()
originals: dict[tuple[str, str], Callable[..., Any]] = {}  # (owner, name): while installed


def theirs(name: str, reason: str, owner: str = UTILS, called: str = "") -> Callable[..., Any]:
    """PEFT's own function; the call is counted, under the name that users call it by."""
    fallbacks[called or name, reason] += 1
    found = originals.get((owner, name))
    return found or getattr(pkgutil.resolve_name(owner), name)


def why_not(xs: Any, weights: Any, density: Any = 0.5, method: Any = "total") -> str | None:
    """None, or why mergekern does not serve this call. Wrong arguments are PEFT's to refuse."""
    if not isinstance(xs, list | tuple) or not xs:
        return "task_tensors is no list of tensors"
    tensors = [*xs, *([] if weights is None else [weights])]
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return "no plain tensor"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "a gradient is wanted: call under torch.no_grad()"
    first = xs[0]
    if first.is_meta or first.layout != torch.strided:
        return "tensors without plain data"
    if any((x.shape, x.dtype, x.device) != (first.shape, first.dtype, first.device) for x in xs):
        return "task tensors of unequal shape, dtype or device"
    if first.dtype not in FLOATS:
        return f"dtype {name_of(first.dtype)}"
    if not first.numel():
        return "empty tensors"
    kernel = dispatch.select("auto", "merge_deltas", first.device, first.dtype)
    if first.device.type != "cpu" and kernel == "torch":
        return f"no kernel for {first.device.type}"
    if not isinstance(density, int | float) or not density >= 0 or method not in ELECT:
        return "arguments that PEFT refuses"
    return None if weights is None else _why_not_weights(first, weights, len(xs))


def _why_not_weights(first: Tensor, weights: Tensor, n: int) -> str | None:
    if weights.shape != (n,) or weights.device != first.device or weights.is_complex():
        return "weights of another shape, device or kind"
    if accumulator(mean_dtype(first, weights)) != accumulator(first.dtype):
        return "weights wider than the task tensors"
    return None if bool(weights.isfinite().all()) else "weights that are not finite"


def why_not_drawn(xs: list[Tensor], density: float) -> str | None:
    if density == 0:
        return "a density of 0, which PEFT divides by"
    return None if xs[0].device.type == "cpu" else "random draws of another device"


def product_dtype(x: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, weights.dtype)


def mean_dtype(x: Tensor, weights: Tensor) -> torch.dtype:
    """PEFT divides by a count, which is of torch's default type."""
    return torch.promote_types(product_dtype(x, weights), torch.get_default_dtype())
