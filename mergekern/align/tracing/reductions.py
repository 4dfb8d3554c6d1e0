"""Rules of norms, of reductions and of pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .contractions import along
from .labels import Layer, Value
from .rules import Interpreter, Results


def layer_norm(
    run: Interpreter,
    x: Value,
    normalised: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    *_: Any,
) -> Value:
    over = set(range(len(x.shape) - len(normalised), len(x.shape)))
    _over(run, x, over, "its LayerNorm takes mean and variance over features")
    return run.elementwise(x, *(v for v in (weight, bias) if v is not None))


def rms_norm(
    run: Interpreter, x: Value, normalised: Sequence[int], weight: Value | None = None, *_: Any
) -> Value:
    return layer_norm(run, x, normalised, weight)


def group_norm(
    run: Interpreter,
    x: Value,
    groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    *_: Any,
) -> Value:
    for layer in x.layers:
        if layer.axes == (1,):
            run.facts.note([layer], "its GroupNorm takes mean and variance over features")
            if groups > 1:
                rows = run.facts.blocks(layer.ids.view(groups, -1))[:, None]
                ids = layer.ids.view(groups, -1)
                run.facts.put_inside(ids, rows)
        elif 1 in layer.axes:
            run.facts.pin(layer.ids, "lies across the groups of a norm")
    return _beside(run, x, weight, bias)


def batch_norm(run: Interpreter, x: Value, *args: Any) -> Value:
    return _beside(run, x, *args[:4])


def _beside(run: Interpreter, x: Value, *vectors: Value | None) -> Value:
    """x and vectors along its channels."""
    laid = [along(v, 1, len(x.shape)) for v in vectors if v is not None]
    return run.elementwise(x, *laid)


def prelu(run: Interpreter, x: Value, weight: Value) -> Value:
    return run.elementwise(x, along(weight, 1, len(x.shape)) if weight.shape != () else weight)


def softmax(run: Interpreter, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    _over(run, x, {dim % len(x.shape)}, "its softmax goes over features")
    return Value(run.shape, x.layers, data=x.data)


def _over(run: Interpreter, x: Value, axes: set[int], note: str) -> list[Layer]:
    """Something of all features along `axes`; what is left of the layers."""
    run.facts.note([layer for layer in x.layers if axes & set(layer.axes)], note)
    return run.facts.reduce(x.layers, axes)


def reduction(run: Interpreter, x: Value, *args: Any, **kwargs: Any) -> Results:
    names = [a.name for a in run.target._schema.arguments[1:]]
    given = dict(zip(names, args, strict=False)) | kwargs
    ndim, dim = len(x.shape), given.get("dim")
    dims = range(ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    axes = {d % ndim for d in dims}
    layers = _over(run, x, axes, "something is taken over its features")
    if not given.get("keepdim", False):
        left = [axis for axis in range(ndim) if axis not in axes]
        layers = [
            Layer(tuple(left.index(a) for a in layer.axes), _without(layer.ids, axes))
            for layer in layers
        ]
    intact = not any(axes & set(layer.axes) for layer in x.layers)
    seen = (x.seen or (run.node.name, 0, x.layers)) if x.data and intact else None
    made = Value(run.shape, layers, data=x.data, seen=seen)
    return [made, made] if isinstance(run.node.meta["val"], list | tuple) else made


def _without(ids: Tensor, axes: set[int]) -> Tensor:
    return ids.reshape([size for axis, size in enumerate(ids.shape) if axis not in axes])


def extreme(run: Interpreter, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    """argmax, argmin: a position is no feature."""
    axes = set(range(len(x.shape))) if dim is None else {dim % len(x.shape)}
    x = run.drop(x, axes, "the position of its largest feature is used")
    return reduction(run, x, *(() if dim is None else (dim, keepdim)))


def cumulative(run: Interpreter, x: Value, dim: int, **_: Any) -> Value:
    x = run.drop(x, {dim % len(x.shape)}, "its features are added up one by one")
    return Value(run.shape, x.layers, data=x.data)


def spatial(run: Interpreter, x: Value, *_: Any, **__: Any) -> Results:
    """Positions are pooled or interpolated; channels stay."""
    dims = _spatial_dims(run)
    ndim = len(x.shape)
    x = run.drop(x, set(range(ndim - dims, ndim)), "lies along axes of a pool")
    made = Value(run.shape, x.layers, data=x.data)
    return [made, made] if isinstance(run.node.meta["val"], list | tuple) else made


def mean_pool(run: Interpreter, x: Value, *args: Any, **kwargs: Any) -> Value:
    made = spatial(run, x, *args, **kwargs)
    made.seen = x.seen or (run.node.name, 0, x.layers) if x.data else None
    return made


def _spatial_dims(run: Interpreter) -> int:
    """The d of pool1d, pool2d, pool3d."""
    return int(next(c for c in reversed(str(run.node.target).partition(".d")[0]) if c.isdigit()))
