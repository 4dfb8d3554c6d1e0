"""What a traced model takes: calls and batches as a list of values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...errors import ArgumentError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Inputs(NamedTuple):
    """The structure of arguments and keyword arguments, and a placeholder for each value."""

    spec: TreeSpec
    nodes: Sequence[fx.Node]

    def flatten(self, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The values of a call model(*args, **kwargs), in order."""
        order = self.spec.child(1).context or []
        if sorted(kwargs) != sorted(order):
            got, expected = sorted(kwargs), f"{sorted(order)} as in the example"
            raise ArgumentError.of(op, "inputs have other names", got, expected)
        flat, found = tree_flatten((args, {name: kwargs[name] for name in order}))
        if found != self.spec:
            expected = f"{self.spec.num_leaves} as in the example"
            raise ArgumentError.of(op, "inputs have another structure", len(flat), expected)
        for node, x in zip(self.nodes, flat, strict=True):
            _check_shape(op, node, x)
        return flat

    def first_rows(self, flat: Sequence[Any], rows: int) -> list[Any]:
        """The values of a smaller batch: the first rows of those whose number of rows is open."""
        return [
            x[:rows] if isinstance(x, Tensor) and _sizes(node)[:1] == [None] else x
            for node, x in zip(self.nodes, flat, strict=True)
        ]

    def call(self, flat: Sequence[Any]) -> Arguments:
        """Values in order as args and kwargs: what `flatten` takes apart."""
        args, kwargs = tree_unflatten(list(flat), self.spec)
        return args, kwargs

    def of_batch(self, op: str, batch: Any) -> Arguments:
        """A batch as arguments, without entries beyond those that are taken (labels)."""
        args, kwargs = arguments(op, batch)
        count, named = self.spec.child(0).num_children, self.spec.child(1).context or []
        if args:
            return args[:count] if count else args, {}
        return (), {name: x for name, x in kwargs.items() if name in named} if named else kwargs


def arguments(op: str, inputs: Any) -> Arguments:
    """One tensor, a tuple of arguments or a mapping of named ones, as args and kwargs."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list) and inputs:
        return tuple(inputs), {}
    expected = "a tensor, a tuple of arguments or a mapping of named ones, as the model takes them"
    raise ArgumentError.of(op, "there are no inputs", type(inputs).__name__, expected)


def arguments_of(op: str, module: nn.Module, batch: Any) -> Arguments:
    """A batch without entries beyond the arguments that the module takes, by place or by name."""
    args, kwargs = arguments(op, batch)
    parameters = inspect.signature(module.forward).parameters
    taken = list(parameters.values())
    if not any(p.kind is p.VAR_KEYWORD for p in taken):
        kwargs = {name: x for name, x in kwargs.items() if name in parameters}
    if any(p.kind is p.VAR_POSITIONAL for p in taken):
        return args, kwargs
    count = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in taken)
    return args[:count], kwargs


def require_needed(op: str, module: nn.Module, batch: Any) -> None:
    """Refuses a tuple of which an entry after the first goes into an argument with a default."""
    parameters = inspect.signature(module.forward).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given, _ = arguments(op, batch)
    for k, place in enumerate(places[1 : len(given)], 1):
        if place.default is not place.empty:
            what = f"entry {k} of a batch would be {place.name}, which has a default, or is labels"
            names = ", ".join(p.name for p in places[: k + 1])
            expected = f"{k}, without labels, or a mapping that names {names}"
            raise ArgumentError.of(op, what, f"{len(given)} entries", expected)


def _sizes(node: fx.Node) -> list[int | None]:
    """Of a placeholder of a tensor; None where the trace left a size open."""
    traced = node.meta["val"]
    sizes = traced.shape if isinstance(traced, Tensor) else ()
    return [s if isinstance(s, int) else s.node.maybe_as_int() for s in sizes]


def _check_shape(op: str, node: fx.Node, x: Any) -> None:
    """A tensor of the traced shape; sizes that the trace left open may differ."""
    name, traced = node.name, node.meta["val"]
    if not isinstance(traced, Tensor):
        return
    expected = ["any" if size is None else size for size in _sizes(node)]
    if not isinstance(x, Tensor):
        raise ArgumentError.of(op, f"{name} is no tensor", type(x).__name__, expected)
    fits = x.ndim == traced.ndim and all(
        e in ("any", size) for e, size in zip(expected, x.shape, strict=True)
    )
    if not fits:
        what = f"{name} differs from the example in shape (the model fixes the sizes named)"
        raise ArgumentError.of(op, what, list(x.shape), expected)
