"""mergekit 0.1.4: registered objects that make a task per tensor; theirs are wrapped."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from ...methods import REGISTRY, Method
from .._swaps import Swaps
from . import calls
from .calls import MODE, Call


class OlderMethod:
    """A registered method whose tasks ask mergekern first. All else is the original's."""

    def __init__(self, spec: Method, original: Any) -> None:
        self._spec = spec
        self._original = original

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask before there is an original
            raise AttributeError(name)
        return getattr(self._original, name)

    def make_task(self, **given: Any) -> Any:
        inner = self._original.make_task(**given)
        return _task_class()(
            inner=inner,
            method=self._spec.name,
            weight_name=given["output_weight"].name,
            base_model=given.get("base_model"),
            parameters=given.get("parameters") or {},
            tensor_parameters=given.get("tensor_parameters") or {},
        )


def read(task: Any, spec: Method, tensors: dict[Any, Tensor]) -> Call | str:
    """What the task asks for, or why mergekit must do it."""
    base = None if spec.base == "model" else tensors.get(task.base_model)
    models = [m for m in tensors if base is None or m != task.base_model]
    xs = [tensors[m] for m in models]
    if len({(x.shape, x.dtype) for x in tensors.values()}) > 1:
        return "shapes or dtypes differ"
    if base is None and spec.base != "model" and task.base_model is not None:
        return "the base lacks the tensor"
    if len(xs) + (base is not None and spec.base != "required") < spec.models[0]:
        return "too few models"
    own: dict[str, Any] = {}
    for p in spec.parameters:
        if p.scope == "tensor":
            own[p.name] = task.parameters[p.name]
        else:
            own[p.name] = [task.tensor_parameters[m][p.name] for m in models]
    return Call(xs, base, own, task.weight_name)


@functools.cache
def _task_class() -> Any:
    """The task, defined once mergekit is there to derive it from."""
    from mergekit.common import ImmutableMap, ModelReference
    from mergekit.graph import Task

    class MergekernTask(Task):  # type: ignore[misc]
        inner: Task
        method: str
        weight_name: str
        base_model: ModelReference | None
        parameters: ImmutableMap[str, Any]
        tensor_parameters: ImmutableMap[ModelReference, ImmutableMap[str, Any]]

        def arguments(self) -> Any:
            return self.inner.arguments()

        def group_label(self) -> Any:
            return self.inner.group_label()

        def uses_accelerator(self) -> Any:
            return self.inner.uses_accelerator()

        def execute(self, tensors: dict[Any, Tensor], **more: Any) -> Any:
            if not MODE.installed:
                return self.inner.execute(tensors=tensors, **more)
            spec = REGISTRY[self.method]
            reason = calls.why_not(tensors.values())
            call = reason or read(self, spec, tensors)
            if isinstance(call, Call):
                call = calls.why_not_values(spec, call) or call
            if isinstance(call, str):
                calls.count_fallback(spec.name, call)
                return self.inner.execute(tensors=tensors, **more)
            merged = calls.run(spec, call)
            calls.count_merged(spec.name, merged.device)
            return merged

    return MergekernTask


def _home(method: Any) -> str:
    """The module that computes it. Decorated functions hide in the closures of made-up classes."""
    made = inspect.getclosurevars(type(method).make_task).nonlocals.get("tt_cls")
    if made is None:
        return type(method).__module__
    home: str = inspect.getclosurevars(made.execute).nonlocals["func"].__module__
    return home


def replace(swaps: Swaps) -> list[str]:
    """Replace every method that mergekit computes itself and mergekern has; their names."""
    from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS as registered

    replaced = []
    for name, method in list(registered.items()):
        if name in REGISTRY and _home(method).startswith("mergekit."):
            swaps.item(registered, name, OlderMethod(REGISTRY[name], method))
            replaced.append(name)
    return replaced
