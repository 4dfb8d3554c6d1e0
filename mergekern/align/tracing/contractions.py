"""Rules of calls that sum over features: linear layers, attention, convolutions, embeddings."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch

from .labels import Layer, Value
from .rules import Interpreter, aligned


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
    return _convolved(run, x, weight, bias, "OC", groups)


def _convolved(
    run: Interpreter, x: Value, weight: Value, bias: Value | None, names: str, groups: int
) -> Value:
    """`names`: the axes of the kernel, outputs O and inputs C. Positions are no features."""
    ndim = len(weight.shape)
    if len(x.shape) != ndim:
        raise run.refused("convolves a tensor without a batch axis")
    x = run.drop(x, set(range(2, ndim)), "lies along axes of a convolution")
    kernel = Value(weight.shape[:2], _first_two(weight), data=weight.data)
    if groups == 1:
        space = _lead(ndim - 2)
        y = run.contract(x, kernel, "NC" + space, names, "NO" + space, (0, 1))
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
    if groups != 1:
        raise run.refused("makes a transposed convolution in groups")
    return _convolved(run, x, weight, bias, "CO", groups)


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
