"""mergekit 0.1.5: kernels over TensorBatch and TensorGroup, called by the registered methods.

The registered objects stay what they are: names, contracts, parameters, batching and validation
are mergekit's. Only the one attribute that computes is replaced, on each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...methods import REGISTRY, Method
from .._swaps import Swaps
from . import calls
from .calls import MODE, Call


class Kernel:
    """Takes the place of the function that computes one method of mergekit, and keeps it."""

    def __init__(self, spec: Method, method: Any, original: Callable[..., Tensor]) -> None:
        self.spec = spec
        self.method = method
        self.original = original

    def __call__(self, inputs: Any, /, **parameters: Any) -> Tensor:
        if not MODE.installed:  # called through a wrapper that was put around it meanwhile
            return self.original(inputs, **parameters)
        reason = self.why_not(inputs, parameters)
        todo = [] if reason else self.read(inputs, parameters)
        reasons = (calls.why_not_values(self.spec, call) for call in todo)
        reason = reason or next(filter(None, reasons), None)
        if reason:
            calls.count_fallback(self.spec.name, reason)
            return self.original(inputs, **parameters)
        merged = self.merge(inputs, todo)
        calls.count_merged(self.spec.name, merged.device, len(todo))
        return merged

    def why_not(self, inputs: Any, parameters: dict[str, Any]) -> str | None:
        return calls.why_not(inputs.tensors, parameters.values())

    def ignores_base(self) -> bool:
        """Whether a base is one model among the others."""
        ignored: bool = self.method.spec.contract.base == "ignored"
        return ignored

    def read(self, inputs: Any, parameters: dict[str, Any]) -> list[Call]:
        raise NotImplementedError

    def merge(self, inputs: Any, todo: list[Call]) -> Tensor:
        (call,) = todo
        return calls.run(self.spec, call)


class BatchKernel(Kernel):
    """linear and slerp: [outputs, ...] tensors, coefficients as tensors with a row per output."""

    def read(self, batch: Any, parameters: dict[str, Any]) -> list[Call]:
        index = None if self.ignores_base() else batch.base_index
        rows = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in parameters.items()}
        found = []
        for i in range(batch.tensors[0].shape[0]):
            xs = [x[i] for x in batch.tensors]
            base = None if index is None else xs.pop(index)
            own = {k: v[i] if isinstance(v, list) else v for k, v in rows.items()}
            found.append(Call(xs, base, own))
        return found

    def merge(self, batch: Any, todo: list[Call]) -> Tensor:
        if len(todo) == 1:
            return calls.run(self.spec, todo[0])[None]
        if self.spec.name == "linear" and all(c.parameters == todo[0].parameters for c in todo):
            # Element by element, so that many small outputs are one call.
            return calls.run(self.spec, todo[0]._replace(xs=list(batch.tensors)))
        return torch.stack([calls.run(self.spec, call) for call in todo])


class GroupKernel(Kernel):
    """Methods that merge one output at a time."""

    def read(self, group: Any, parameters: dict[str, Any]) -> list[Call]:
        from mergekit.merge_methods.base import PerInputValues

        base = None if self.ignores_base() else group.base
        entries = group.entries if base is None else group.non_base
        own = {
            k: v.values_for(entries) if isinstance(v, PerInputValues) else v
            for k, v in parameters.items()
        }
        xs = [entry.tensor for entry in entries]
        name = group.metadata.name or ""
        return [Call(xs, None if base is None else base.tensor, own, name)]


class FamilyKernel(GroupKernel):
    """Task arithmetic and its kin: instances of one class, whose function computes."""

    def __init__(self, spec: Method, method: Any) -> None:
        super().__init__(spec, method, self.current)
        self.known = type(method).merge_group

    def current(self, group: Any, /, **parameters: Any) -> Tensor:
        return type(self.method).merge_group(self.method, group, **parameters)

    def why_not(self, group: Any, parameters: dict[str, Any]) -> str | None:
        if type(self.method).merge_group is not self.known:
            return "its merge_group was replaced in mergekit"
        return super().why_not(group, parameters)


def replace(swaps: Swaps) -> list[str]:
    """Replace every method that mergekit computes itself and mergekern has; their names."""
    from mergekit.merge_methods.base import BatchedMergeMethod, FunctionalGroupMergeMethod
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
    from mergekit.merge_methods.registry import _METHODS

    replaced = []
    for name, method in _METHODS.items():
        spec = REGISTRY.get(name)
        if spec is None:
            continue
        if type(method) is GeneralizedTaskArithmeticMerge:
            swaps.attribute(method, "merge_group", FamilyKernel(spec, method))
        elif type(method) in (BatchedMergeMethod, FunctionalGroupMergeMethod):
            own = method.implementation
            if not own.__module__.startswith("mergekit."):
                continue  # somebody else's: it stays in charge
            kernel = BatchKernel if method.supports_batching else GroupKernel
            swaps.attribute(method, "implementation", kernel(spec, method, own))
        else:
            continue
        replaced.append(name)
    return replaced
