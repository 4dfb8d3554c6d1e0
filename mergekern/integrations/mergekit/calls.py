"""One call of a merge method: may mergekern serve it, the call itself, and who served how often."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from ...check import FLOATS, name_of
from ...methods import Method
from ...methods.merge import merge_tensors

# Their masks are drawn: the key comes from torch's generator.
RANDOM = frozenset({"dare_linear", "dare_ties", "della", "della_linear"})


@dataclass
class Mode:
    """Whether the drop-in is in place, and whether results are to be mergekit's own."""

    installed: bool = False
    host: bool = False
    running: bool = False  # a run of mergekit's executor is under way
    seed: int | None = None  # of the masks of that run, once one was asked for


MODE = Mode()


class Call(NamedTuple):
    """What a method of mergekit was asked to do, in the terms of `merge_tensors`."""

    xs: list[Tensor]
    base: Tensor | None
    parameters: dict[str, Any]  # by mergekit's names; a list where there is one value per x
    name: str = ""


# ---- who served ------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Tensors merged: by mergekern, per (method, device type), and by mergekit, with the reason."""

    merged: Counter[tuple[str, str]]
    fallbacks: Counter[tuple[str, str]]

    def __sub__(self, before: Counts) -> Counts:
        return Counts(self.merged - before.merged, self.fallbacks - before.fallbacks)

    def methods(self) -> Counter[str]:
        """Tensors that went through mergekern, by method."""
        by_method: Counter[str] = Counter()
        for (method, _), n in self.merged.items():
            by_method[method] += n
        return by_method

    def sentence(self) -> str:
        """One line: methods, backends, fallbacks with their reasons."""
        methods = ", ".join(f"{m} {n}" for m, n in sorted(self.methods().items()))
        text = f"{self.merged.total()} tensors merged by mergekern"
        if methods:
            devices = sorted({device for _, device in self.merged})
            served = "; ".join(f"{d}: {', '.join(_backends(d))}" for d in devices)
            text += f" ({methods}; backends for {served})"
        if self.fallbacks:
            why = ", ".join(f"{m} {n}: {r}" for (m, r), n in sorted(self.fallbacks.items()))
            text += f"; {self.fallbacks.total()} by mergekit ({why})"
        return text


_LOCK = threading.Lock()  # mergekit's multi-GPU executor merges in several threads
_COUNTS = Counts(Counter(), Counter())


def counts() -> Counts:
    """A copy of all that was counted since the import."""
    with _LOCK:
        return Counts(_COUNTS.merged.copy(), _COUNTS.fallbacks.copy())


def count_merged(method: str, device: torch.device, n: int = 1) -> None:
    with _LOCK:
        _COUNTS.merged[method, device.type] += n


def count_fallback(method: str, reason: str, n: int = 1) -> None:
    with _LOCK:
        _COUNTS.fallbacks[method, reason] += n


def _backends(device: str) -> list[str]:
    """The backends that "auto" takes there for one op or another."""
    ops = [op for op in dispatch.OPS if op != "permute"]
    found = {dispatch.select("auto", op, torch.device(device), torch.float32) for op in ops}
    return sorted(found)


# ---- may we, and the call --------------------------------------------------------------------


def why_not(tensors: Iterable[Tensor], coefficients: Iterable[Any] = ()) -> str | None:
    """None, or why mergekit's own code must serve: known before anything is computed."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "torch is tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode autograd"
    if torch._C._len_torch_dispatch_stack():
        return "a torch dispatch mode is active"
    tensors = list(tensors)
    if torch.is_grad_enabled():
        for x in (*tensors, *coefficients):
            if isinstance(x, Tensor) and x.requires_grad:
                return "autograd"
    return next(filter(None, map(_why_not_tensor, tensors)), None)


def _why_not_tensor(x: Tensor) -> str | None:
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"tensor subclass {type(x).__name__}"
    if x.is_meta:
        return "meta tensors"
    if x.layout != torch.strided:
        return f"{str(x.layout).removeprefix('torch.')} tensors"
    if x.dtype not in FLOATS:
        return f"dtype {name_of(x.dtype)}"
    if x.device.type not in dispatch.ORDER:
        return f"no kernel for {x.device.type} tensors"
    return None


def why_not_values(spec: Method, call: Call) -> str | None:
    """None, or which parameter only mergekit gives a meaning to."""
    if spec.base == "required" and len(call.xs) < spec.models[0]:
        return "too few models beside the base"
    for name, value in call.parameters.items():
        low, high = spec.parameter(name).bounds or (-math.inf, math.inf)
        for v in value if isinstance(value, list) else [value]:
            if v is None:
                return f"{name} is not set"
            if not math.isfinite(v):
                return f"{name} is not finite"
            if not low <= v <= high:
                return f"{name} is outside {low:g} to {high:g}"
    normalized = spec.name == "linear" and call.parameters.get("normalize", True)
    return "weights sum to 0" if normalized and sum(call.parameters["weight"]) == 0 else None


def _seed(name: str) -> int:
    """The key of a mask, from torch's generator: one for all named tensors of a run.

    A mask is keyed by tensor name as well, so within a run the order of tensors does not matter.
    """
    with _LOCK:
        if not (MODE.running and name):
            return _draw()
        if MODE.seed is None:
            MODE.seed = _draw()
        return MODE.seed


def _draw() -> int:
    return int(torch.randint(2**63 - 1, ()))


def run(spec: Method, call: Call) -> Tensor:
    """The merged tensor. mergekit's own rules draw from torch's generator themselves."""
    host = "mergekit" if MODE.host and "mergekit" in spec.parity else None
    keyed = spec.name in RANDOM and host is None
    return merge_tensors(
        call.xs,
        spec.name,
        base=call.base,
        name=call.name,
        seed=_seed(call.name) if keyed else 0,
        host=host,
        **call.parameters,
    )
