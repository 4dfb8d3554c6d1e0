"""Several models run side by side, call by call, with a look at what goes in and what comes out."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map

from ..errors import ArgumentError
from .program import Program, module_of
from .spaces import Probe

Before = Callable[[Sequence[tuple[Any, ...]]], None]  # the arguments of each model's call
After = Callable[[Sequence[Any]], None]  # the results of each model's call

_VIEWS = ("view", "reshape", "flatten", "_unsafe_view")


class _Each:
    """One value of each model, which the program passes on as if it were a value."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values


def run_together(
    program: Program,
    states: Sequence[Mapping[str, Tensor]],
    flat: Sequence[Any],
    before: Mapping[str, Sequence[Before]],
    after: Mapping[str, Sequence[After]],
) -> list[Any]:
    """The outputs of all models for one batch; `before` and `after` see the calls they name.

    Each call is made by every model before the next one is, so what is seen needs not be kept:
    only values on their way to a later call are held.
    """
    count = len(states)

    def of(i: int, arguments: Any) -> Any:
        return map_aggregate(arguments, lambda v: v.values[i] if isinstance(v, _Each) else v)

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Each:
        each = [(of(i, args), of(i, kwargs)) for i in range(count)]
        for look in before.get(node.name, ()):
            look([given for given, _ in each])
        assert callable(node.target)
        results = [node.target(*given, **named) for given, named in each]
        for glance in after.get(node.name, ()):
            glance(results)
        return _Each(results)

    together: Any = {name: _Each([state[name] for state in states]) for name in states[0]}
    with torch.no_grad():
        output = program.run(together, flat, call)
    return [tree_map(lambda v, i=i: of(i, v), output) for i in range(count)]


def features(x: Tensor, probe: Probe) -> Tensor:
    """What a probe reads in its argument, as [..., size]: all that is not a feature is a row."""
    last = tuple(range(-len(probe.axes), 0))
    rows = x.movedim(probe.axes, last).flatten(-len(probe.axes))
    plain = torch.arange(rows.shape[-1])[:, None]
    if torch.equal(probe.positions, plain):
        return rows
    return rows[..., probe.positions.to(x.device)].transpose(-1, -2)


def row_mask(op: str, mask: Tensor, x: Tensor, node: fx.Node) -> Tensor | None:
    """A mask [batch, tokens] spread over the rows of x [..., features], a value of `node`.

    None where x has no tokens any more: rows of samples count all.
    Raises: ArgumentError where the order of the rows is not known, or is not that of the mask.
    """
    first, flattened = _outermost(node)
    rows = x.shape[:-1]
    if first == "batch" and not flattened and len(rows) == 1:
        return None
    marks = mask if first == "batch" else mask.T
    if not first or marks.numel() not in itertools.accumulate(rows, operator.mul):
        where = f"the rows of module {module_of(node)!r}"
        expected = f"[batch, tokens, ...] for a mask of {list(mask.shape)}"
        raise ArgumentError.of(op, f"mask does not fit {where}", list(x.shape), expected)
    return marks.reshape(-1, 1).expand(-1, rows.numel() // marks.numel()).reshape(-1)


def _outermost(node: fx.Node) -> tuple[str, bool]:
    """What the rows of a value run over first, batch or tokens; "" if that cannot be told.

    Only the batch has a size that the trace left open, so an axis of just that size is the batch. A
    value whose rows were flattened has the order of what was flattened; the second result says so.
    """
    shape = node.meta["val"].shape
    open_axes = [a for a, s in enumerate(shape) if isinstance(s, torch.SymInt)]
    if len(open_axes) == 1 and shape[open_axes[0]].node.expr.is_symbol:
        return {0: "batch", 1: "tokens"}.get(open_axes[0], ""), False
    source = node.args[0] if node.args else None
    name = getattr(node.target, "__name__", "").partition(".")[0]
    if isinstance(source, fx.Node) and name in _VIEWS:
        return _outermost(source)[0], True
    return "", False
