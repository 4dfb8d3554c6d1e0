"""ATen calls by name: of which kind each is (see `rules`)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .labels import Layer, Value, collapsed, contents
from .rules import Interpreter, Results, Rule, aligned, is_constant


def _words(text: str) -> list[str]:
    return text.split()


_MOVES = _words(
    "view reshape _unsafe_view permute transpose t numpy_T mT movedim moveaxis swapaxes expand "
    "expand_as broadcast_to unsqueeze squeeze slice select narrow flatten unflatten contiguous "
    "clone alias detach roll repeat repeat_interleave tile flip split split_with_sizes chunk "
    "unbind unsafe_split unsafe_chunk pixel_shuffle pixel_unshuffle channel_shuffle view_as "
    "reshape_as diagonal unfold"
)
_SAME = _words("to _to_copy type_as dropout feature_dropout alpha_dropout")
_SPATIAL = _words(
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
_MEAN_POOLS = _words(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
)
_REDUCTIONS = _words("mean sum amax amin var std var_mean linalg_vector_norm norm logsumexp")
# Elementwise calls that torch does not tag as such.
_ELEMENTWISE = _words(
    "where masked_fill hardswish hardsigmoid hardtanh relu6 selu celu log_sigmoid softplus rrelu "
    "mish threshold logit nan_to_num clip"
)
_FILLS = _words("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty")


# ---- contractions -----------------------------------------------------------------------------


def _lead(n: int) -> str:
    return string.ascii_lowercase[:n]


def linear(run: Interpreter, x: Value, weight: Value, bias: Value | None = None) -> Value:
    lead = _lead(len(x.shape) - 1)
    y = run.contract(x, weight, lead + "I", "OI"[-len(weight.shape) :], lead + "O", (0, 1))
    return y if bias is None else run.elementwise(y, bias)


def matmul(run: Interpreter, a: Value, b: Value, args: tuple[int, int] = (0, 1)) -> Value:
    left = "M" if len(a.shape) > 1 else ""
    right = "N" if len(b.shape) > 1 else ""
    batch = _lead(max(len(a.shape), len(b.shape), 2) - 2)
    la = batch[len(batch) + 2 - len(a.shape) :] + left + "K" if left else "K"
    lb = batch[len(batch) + 2 - len(b.shape) :] + "K" + right if right else "K"
    return run.contract(a, b, la, lb, batch + left + right, args)


def addmm(run: Interpreter, bias: Value, a: Value, b: Value, **_: Any) -> Value:
    return run.elementwise(matmul(run, a, b, (1, 2)), bias)


def einsum(run: Interpreter, equation: str, operands: Sequence[Value], **_: Any) -> Value:
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(operands) != 2 or not arrow or "." in equation:
        raise run.refused(f"calls einsum({equation!r})")
    (a, b), (la, lb) = operands, names
    return run.contract(a, b, la, lb, out, (1, 1))


def attention(
    run: Interpreter,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if enable_gqa:
        k, v = (_repeated(x, q.shape[-3]) for x in (k, v))
    lead = _lead(len(q.shape) - 2)
    scores = run.contract(q, k, lead + "ND", lead + "MD", lead + "NM", (0, 1))
    if mask is not None and mask.layers:
        layers = run.facts.meet(scores, aligned(mask, len(scores.shape)))
        scores = Value(scores.shape, layers, data=True)
    return run.contract(scores, v, lead + "NM", lead + "MD", lead + "ND", (0, 2))


def _repeated(x: Value, heads: int) -> Value:
    """Each head of keys or values for several heads of queries."""
    times = heads // x.shape[-3]
    shape = (*x.shape[:-3], heads, *x.shape[-2:])
    layers = [
        Layer(axes, ids if ids.shape[-3] == 1 else ids.repeat_interleave(times, -3))
        for axes, ids in x.layers
    ]
    return Value(shape, layers, data=x.data, seen=x.seen)


def convolution(
    run: Interpreter,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    ndim = len(weight.shape)
    if len(x.shape) != ndim:
        raise run.refused("convolves a tensor without a batch axis")
    x = run.drop(x, set(range(2, ndim)), "lies along axes of a convolution")
    kernel = Value(weight.shape[:2], _first_two(weight), data=weight.data)
    if groups == 1:
        space = _lead(ndim - 2)
        y = run.contract(x, kernel, "NC" + space, "OC", "NO" + space, (0, 1))
    else:
        y = _grouped(run, x, kernel, groups)
    y = Value(run.shape, y.layers, data=True)
    return y if bias is None else run.elementwise(y, along(bias, 1, ndim))


def _grouped(run: Interpreter, x: Value, kernel: Value, groups: int) -> Value:
    """Channels of a group move as a block, in their order; a depthwise channel with its filter."""
    facts, out, within = run.facts, kernel.shape[0], kernel.shape[1]
    produced = next(layer.ids for layer in kernel.layers if layer.axes == (0,))
    rows = produced.view(groups, out // groups)
    for layer in kernel.layers:
        if layer.axes == (1,):
            facts.play([layer], "consumes")
            facts.pin(layer.ids, "lies within the groups of a convolution")
    read = [layer for layer in x.layers if layer.axes == (1,)]
    if not read:
        facts.mark(rows, torch.arange(groups)[:, None], "belongs to a group of inputs")
    for layer in read:
        ids = layer.ids.view(groups, within)
        if within == 1 and out == groups:
            facts.tie(ids, rows)
            continue
        run.read(x, 0, [layer])
        if within > 1:
            facts.mark(ids, torch.arange(within), "keeps its place in a group of a convolution")
        facts.put_inside(rows, facts.blocks(ids)[:, None])
    depthwise = within == 1 and out == groups
    role = "rides" if depthwise else "produces"
    facts.play([Layer((0,), produced)], role)
    rest = [layer for layer in x.layers if 1 not in layer.axes]
    made = Layer((1,), produced.view(1, -1, *[1] * (len(x.shape) - 2)))
    return Value(run.shape, [*rest, made], data=True)


def conv_transpose(
    run: Interpreter,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    ndim = len(weight.shape)
    if groups != 1 or len(x.shape) != ndim:
        raise run.refused("makes a transposed convolution in groups or without a batch axis")
    x = run.drop(x, set(range(2, ndim)), "lies along axes of a convolution")
    kernel = Value(weight.shape[:2], _first_two(weight), data=weight.data)
    space = _lead(ndim - 2)
    y = run.contract(x, kernel, "NC" + space, "CO", "NO" + space, (0, 1))
    y = Value(run.shape, y.layers, data=True)
    return y if bias is None else run.elementwise(y, along(bias, 1, ndim))


def _first_two(weight: Value) -> list[Layer]:
    """The layers of a kernel along its channels; its positions are no features."""
    kept = [layer for layer in weight.layers if max(layer.axes) < 2]
    return [Layer(axes, ids.reshape(ids.shape[:2])) for axes, ids in kept]


def along(x: Value, axis: int, ndim: int) -> Value:
    """A vector, laid along an axis."""
    shape = tuple(x.shape[0] if i == axis else 1 for i in range(ndim))
    layers = [Layer((axis,), layer.ids.view(shape)) for layer in x.layers]
    const = None if x.const is None else x.const.view(shape)
    return Value(shape, layers, const, x.data)


def embedding(run: Interpreter, weight: Value, index: Value, *_: Any, **__: Any) -> Value:
    ndim = len(run.shape)
    made = []
    for axes, ids in weight.layers:
        if axes == (1,):
            run.facts.play([Layer(axes, ids)], "produces")
            made.append(Layer((ndim - 1,), ids.view(*[1] * (ndim - 1), -1)))
        else:
            run.facts.pin(ids, "is looked up by number")
    return Value(run.shape, made, data=index.data)


# ---- norms, reductions, pools -------------------------------------------------------------------


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


# ---- several tensors, chosen entries ------------------------------------------------------------


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


RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES, Interpreter.move),
    **dict.fromkeys(_SAME, Interpreter.same),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(_MEAN_POOLS, mean_pool),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), conv_transpose),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), softmax),
    **dict.fromkeys(("argmax", "argmin"), extreme),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(_FILLS, fill),
    "linear": linear,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "embedding": embedding,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "instance_norm": batch_norm,
    "prelu": prelu,
    "cumsum": cumulative,
    "cat": cat,
    "stack": stack,
    "index": index,
    "index_select": index_select,
    "gather": gather,
    "glu": glu,
}
