"""Rules of calls that join tensors, pad them, or choose entries of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .labels import Layer, Value, collapsed, contents
from .rules import Interpreter, is_constant


def cat(run: Interpreter, values: Sequence[Value], dim: int = 0) -> Value:
    ndim = len(run.shape)
    return _joined(run, [v for v in values if len(v.shape) == ndim], dim % ndim)


def stack(run: Interpreter, values: Sequence[Value], dim: int = 0) -> Value:
    axis = dim % len(run.shape)
    wider = []
    for v in values:
        layers = [
            Layer(tuple(a + (a >= axis) for a in axes), ids.unsqueeze(axis))
            for axes, ids in v.layers
        ]
        const = None if v.const is None else v.const.unsqueeze(axis)
        wider.append(Value((*v.shape[:axis], 1, *v.shape[axis:]), layers, const, v.data))
    return _joined(run, wider, axis)


def _joined(run: Interpreter, values: list[Value], axis: int) -> Value:
    """Features across the parts are the same; along them they follow each other."""
    data = any(v.data for v in values)
    facts = run.facts
    if any(axis in x.axes for v in values for x in v.layers):
        values = [_labelled(run, v, axis) for v in values]
    whole = [v for v in values if any(axis in x.axes for x in v.layers)]
    if len(whole) < len(values):
        reason = "stands beside values that are no features"
        values = [run.drop(v, {axis}, reason) for v in values]
    if data:
        for v in values:
            if v.parameter:
                facts.play(v.layers, "rides")
    sized = [v for v in values if v.shape[axis] > 0]
    across, *others = sorted((_without_axis(v, axis) for v in sized), key=is_constant)
    for other in others:
        layers = facts.meet(across, other)
        across = Value(across.shape, layers, data=across.data or other.data)
    made = list(across.layers)
    if len(whole) == len(values):
        ids = [next(x.ids for x in v.layers if axis in x.axes) for v in values]
        sizes = [max(x.shape[i] for x in ids) for i in range(ids[0].ndim)]
        parts = [x.expand(_at(sizes, axis, x.shape[axis])) for x in ids]
        layer = collapsed(torch.cat(parts, axis))
        made += [layer] if layer else []
    return Value(run.shape, made, data=data)


def _at(sizes: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return tuple(size if i == axis else s for i, s in enumerate(sizes))


def _labelled(run: Interpreter, v: Value, axis: int) -> Value:
    """A constant among features: entries that are equal are features like each other."""
    if v.const is None:
        return v
    shape = tuple(size if i == axis else 1 for i, size in enumerate(v.shape))
    ids = run.facts.fresh(*shape)
    run.facts.mark(ids, contents(v.const, [axis]), "is a constant among features")
    return Value(v.shape, [Layer((axis,), ids)], v.const, v.data)


def _without_axis(v: Value, axis: int) -> Value:
    """What lies across an axis: constants as they are, others with size 1 along it."""
    layers = [x for x in v.layers if axis not in x.axes]
    shape = v.shape if v.const is not None else _at(v.shape, axis, 1)
    return Value(shape, layers, v.const, v.data)


def pad(run: Interpreter, x: Value, sizes: Sequence[int], *_: Any, **__: Any) -> Value:
    """Features of zeros are features like others."""
    layers = []
    for layer in x.layers:
        ids = layer.ids
        for back, (before, after) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
            axis = len(x.shape) - 1 - back
            if axis not in layer.axes or not (before or after):
                continue
            if before < 0 or after < 0:
                raise run.refused("cuts features off by padding")
            parts = [run.facts.fresh(*_at(ids.shape, axis, n)) for n in (before, after)]
            ids = torch.cat([parts[0], ids, parts[1]], axis)
        layers.append(Layer(layer.axes, ids))
    return Value(run.shape, layers, data=x.data)


def index(run: Interpreter, x: Value, indices: Sequence[Value | None]) -> Value:
    """x[i, j, ...]: known positions move labels; unknown ones must not touch features."""
    known = all(i is None or i.const is not None for i in indices)
    axes = {axis for axis, i in enumerate(indices) if i is not None}
    if not known:
        x = run.drop(x, axes, "its position depends on the input")
    chosen = [_positions(i) for i in indices]
    return _chosen(run, x, lambda ids: run.target(ids, chosen))


def index_select(run: Interpreter, x: Value, dim: int, chosen: Value) -> Value:
    if chosen.const is None:
        x = run.drop(x, {dim % len(x.shape)}, "its position depends on the input")
    return _chosen(run, x, lambda ids: ids.index_select(dim, _positions(chosen)))


def gather(run: Interpreter, x: Value, dim: int, chosen: Value, **_: Any) -> Value:
    if chosen.const is None:
        x = run.drop(x, {dim % len(x.shape)}, "its position depends on the input")
    return _chosen(run, x, lambda ids: ids.gather(dim, _positions(chosen)))


def _positions(i: Value | None) -> Tensor | None:
    if i is None:
        return None
    return torch.zeros(i.shape, dtype=torch.long) if i.const is None else i.const


def _chosen(run: Interpreter, x: Value, move: Any) -> Value:
    layers = []
    for layer in x.layers:
        left = move(layer.ids.expand(x.shape))
        run.tell_apart(layer, left, 0)
        made = collapsed(left)
        layers += [made] if made else []
    seen = (x.seen or (run.node.name, 0, x.layers)) if x.data else None
    return Value(run.shape, layers, data=x.data, seen=seen)


def fill(run: Interpreter, x: Value, *args: Any, **kwargs: Any) -> Value:
    """A constant of the shape or type of x."""
    like = torch.empty(1).expand(x.shape)
    made = run.target(like, *args, **kwargs)
    return Value(tuple(made.shape), const=made)


def elementwise(run: Interpreter, *given: Any, **_: Any) -> Value:
    return run.elementwise(*(v for v in given if isinstance(v, Value)))


def glu(run: Interpreter, x: Value, dim: int = -1) -> Value:
    axis = dim % len(x.shape)
    layers = []
    for layer in x.layers:
        if axis in layer.axes:
            first, second = layer.ids.chunk(2, axis)
            run.facts.tie(first, second)
            layers.append(Layer(layer.axes, first))
        else:
            layers.append(layer)
    return Value(run.shape, layers, data=x.data)
