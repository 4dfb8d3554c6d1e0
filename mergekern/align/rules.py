"""Runs a traced model over labels: what kinds of calls demand of the features of their operands.

A call is elementwise (features meet), a contraction (features meet and are summed up), or it moves
entries about, and then it is run on the labels themselves. `calls` says which ATen call is of which
kind. Calls of other kinds that get features are refused with the name of their module.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ArgumentError
from .labels import Facts, Layer, Value, collapsed, distinct
from .program import Program, module_of

Results = Any  # a Value, a list of them, or a plain value
Rule = Callable[..., Results]


class Interpreter:
    """Runs `program` over labels; `facts` is what it learns, `layout` the layers of each result."""

    def __init__(self, program: Program, rules: Mapping[str, Rule], op: str) -> None:
        self.program, self.op = program, op
        self.facts = Facts()
        self.layout: dict[str, list[Layer]] = {}
        self.node: fx.Node = program.placeholders()[0]
        self._rules = rules
        self._env: dict[fx.Node, Results] = {}
        self._tensors: dict[str, Value] = {}

    def run(self) -> None:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._env[node] = self._placeholder(node)
        self._run(self.program.graph)

    def _run(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "get_attr":
                self._env[node] = getattr(graph.owning_module, node.target)
            elif node.op == "call_function":
                self.node = node
                result = self._env[node] = self._call(node)
                if isinstance(result, Value) and result.data:
                    self.layout[node.name] = result.layers

    # ---- one call ----------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node) -> Results:
        given = node.meta["val"]
        if not isinstance(given, Tensor):
            return _hint(given)
        if node.name in self.program.constants:
            return Value(tuple(given.shape), const=self.program.constants[node.name])
        name = self.program.names.get(node.name)
        if name is None:
            return Value(_shape(given), data=True)
        if name not in self.program.persistent or not given.is_floating_point():
            return Value(_shape(given), const=self.program.buffers[name])
        first = self.program.aliases[name][0]
        if first not in self._tensors:
            self._tensors[first] = self.facts.parameter(first, _shape(given))
        return self._tensors[first]

    def _call(self, node: fx.Node) -> Results:
        args, kwargs = self._resolved(node.args), self._resolved(node.kwargs)
        if node.target is operator.getitem:
            return args[0][args[1]]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._wrapped(args)
        given = node.meta.get("val")
        if given is None or isinstance(given, _NUMBERS):
            return _hint(given)
        values = self.values((args, kwargs))
        if all(v.const is not None for v in values):
            return self._constant(node, args, kwargs)
        if not any(v.layers for v in values):
            data = any(v.data for v in values)
            return _map_tensors(given, lambda x: Value(_shape(x), data=data))
        name = name_of(node)
        rule = self._rules.get(name) or self._rules.get(name.rstrip("_"))
        if rule is not None:
            result = rule(self, *args, **kwargs)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
            result = self.elementwise(*values)
        else:
            raise self.refused(f"calls aten.{name} on features")
        if name.endswith("_") and isinstance(node.args[0], fx.Node):
            self._env[node.args[0]] = result  # done in place
        return result

    def _wrapped(self, args: tuple[Any, ...]) -> Results:
        """A part of the graph under other settings, as autocast: its operands follow it."""
        where = next((i for i, a in enumerate(args) if isinstance(a, fx.GraphModule)), None)
        if where is None:
            raise self.refused(f"calls {self.node.target}")
        graph = args[where].graph
        inner = [n for n in graph.nodes if n.op == "placeholder"]
        self._env.update(zip(inner, args[where + 1 :], strict=True))
        self._run(graph)
        return self._resolved(next(n for n in graph.nodes if n.op == "output").args[0])

    def _resolved(self, given: Any) -> Any:
        return fx.node.map_arg(given, lambda n: self._env[n])

    def values(self, given: Any) -> list[Value]:
        """What is known of the tensors among nodes."""
        found: list[Value] = []

        def look(x: Any) -> None:
            if isinstance(x, Value):
                found.append(x)

        fx.node.map_aggregate(self._resolved(given), look)
        return found

    def _constant(self, node: fx.Node, args: Any, kwargs: Any) -> Results:
        def number(x: Any) -> Any:
            return x.const if isinstance(x, Value) else x

        plain = fx.node.map_aggregate(args, number), fx.node.map_aggregate(kwargs, number)
        made = self.target(*plain[0], **plain[1])
        return _map_tensors(made, lambda x: Value(tuple(x.shape), const=x))

    def refused(self, what: str) -> ArgumentError:
        where = module_of(self.node)
        name = f"module {where}" if where else "the model"
        expected = "layers whose features can be followed, or declare_spaces(...)"
        return ArgumentError.of(self.op, f"{name} cannot be traced", f"one that {what}", expected)

    @property
    def target(self) -> Any:
        """The function that is called."""
        return self.node.target

    # ---- kinds of calls ----------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the (first) result of the call under way."""
        given = self.node.meta["val"]
        return _shape(given[0] if isinstance(given, list | tuple) else given)

    def same(self, x: Value, *_: Any, **__: Any) -> Value:
        """x in another type, or as it is."""
        return Value(self.shape, x.layers, data=x.data, seen=x.seen)

    def move(self, x: Value, *args: Any, **kwargs: Any) -> Results:
        """Entries of x in other places: done with its labels."""
        given = self.node.meta["val"]
        several = isinstance(given, list | tuple)
        sizes = [_shape(v) for v in given] if several else [_shape(given)]
        values = [Value(size, data=x.data, seen=None if several else x.seen) for size in sizes]
        if x.data and not several and math.prod(sizes[0]) < math.prod(x.shape):
            values[0].seen = x.seen or (self.node.name, 0, x.layers)
        target = torch.reshape if name_of(self.node) in _VIEWS else self.target
        for layer in x.layers:
            ids = layer.ids.expand(x.shape).contiguous()
            moved = target(ids, *map(_dummy, args), **kwargs)
            for part, (value, left) in enumerate(
                zip(values, moved if several else [moved], strict=True)
            ):
                self.tell_apart(layer, left, part)
                made = collapsed(left)
                value.layers += [made] if made else []
        return values if several else values[0]

    def tell_apart(self, layer: Layer, left: Tensor, part: int) -> None:
        """Features that are left out, or go into another part, are not like the others."""
        kept = distinct(left)
        if len(kept) < len(distinct(layer.ids)):
            key = torch.tensor(part)
            self.facts.mark(kept, key, "is treated apart from its neighbours")

    def drop(self, x: Value, axes: set[int], reason: str) -> Value:
        """x without features along axes on which the call is at home."""
        kept = []
        for layer in x.layers:
            if axes & set(layer.axes):
                self.facts.pin(layer.ids, reason)
            else:
                kept.append(layer)
        return Value(x.shape, kept, x.const, x.data, x.seen)

    def elementwise(self, *values: Value) -> Value:
        """Operands that broadcast."""
        ndim, data = len(self.shape), any(v.data for v in values)
        if data:
            for value in values:
                if value.parameter:
                    self.facts.play(value.layers, "rides")
        elif len(values) > 1:  # a weight made of others: what each does later is not followed
            for value in values:
                self.facts.play(value.layers, "both")
        whole, *others = (aligned(v, ndim) for v in sorted(values, key=is_constant))
        for other in others:
            layers = self.facts.meet(whole, other)
            sizes = tuple(map(max, whole.shape, other.shape))
            whole = Value(sizes, layers, data=whole.data or other.data)
        return Value(self.shape, whole.layers, data=data)

    def contract(
        self, a: Value, b: Value, la: str, lb: str, out: str, args: tuple[int, int]
    ) -> Value:
        """einsum("la,lb->out"): a and b are these arguments of the call."""
        letters = "".join(dict.fromkeys(out + la + lb))
        first, second = _lettered(a, la, letters), _lettered(b, lb, letters)
        summed = set(range(len(out), len(letters)))
        for value, other, names, arg in ((a, b, la, args[0]), (b, a, lb, args[1])):
            inner = [x for x in value.layers if any(names[i] not in out for i in x.axes)]
            outer = [x for x in value.layers if not any(x is y for y in inner)]
            if value.parameter and other.data:
                self.facts.play(inner, "consumes")
                self.facts.play(outer, "produces")
            elif value.parameter:  # a product of weights, B A x
                self.facts.play(inner, "consumes" if value is a else "produces")
                self.facts.play(outer, "both")
            else:
                self.read(value, arg, inner)
                if other.data:
                    self.facts.note(inner, "its features are multiplied with each other")
        layers = self.facts.reduce(self.facts.meet(first, second), summed)
        made = [Layer(x.axes, x.ids.reshape(x.ids.shape[: len(out)])) for x in layers]
        sizes = tuple(map(max, first.shape, second.shape))[: len(out)]
        return Value(sizes, made, data=a.data or b.data)

    def read(self, x: Value, arg: int, layers: list[Layer]) -> None:
        """The call reads these features of x."""
        if not layers:
            return
        node, arg, layers = x.seen or (self.node.name, arg, layers)
        module = module_of(self.node)
        self.facts.probes += [(node, arg, module, layer) for layer in layers]


_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
_VIEWS = ("view", "_unsafe_view", "reshape")


def name_of(node: fx.Node) -> str:
    """aten.linear.default -> linear."""
    schema = getattr(node.target, "_schema", None)
    return str(node.target) if schema is None else schema.name.partition("::")[2]


def _hint(given: Any) -> Any:
    """The number that a symbolic one has in the example."""
    if isinstance(given, torch.SymInt | torch.SymFloat | torch.SymBool):
        return given.node.hint
    return given


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(_hint(size) for size in x.shape)


def _map_tensors(given: Any, make: Callable[[Tensor], Value]) -> Results:
    if isinstance(given, list | tuple):
        return [_map_tensors(x, make) for x in given]
    return make(given) if isinstance(given, Tensor) else _hint(given)


def _dummy(given: Any) -> Any:
    """A tensor of the shape of a value, for calls that take a shape from a tensor."""
    return torch.empty(1).expand(given.shape) if isinstance(given, Value) else given


def is_constant(value: Value) -> bool:
    return value.const is not None


def aligned(value: Value, ndim: int) -> Value:
    """With axes of size 1 in front, as broadcasting sees it."""
    new = ndim - len(value.shape)
    layers = [Layer(tuple(a + new for a in axes), ids[(None,) * new]) for axes, ids in value.layers]
    const = None if value.const is None else value.const[(None,) * new]
    return Value((1,) * new + value.shape, layers, const, value.data)


def _lettered(value: Value, names: str, letters: str) -> Value:
    """With one axis for each of `letters`, of size 1 where `names` does not have it."""
    order = [names.index(x) for x in letters if x in names]
    where = [letters.index(names[i]) for i in order]

    def arranged(x: Tensor) -> Tensor:
        sizes = [1] * len(letters)
        for axis, i in zip(where, order, strict=True):
            sizes[axis] = x.shape[i]
        return x.permute(order).reshape(sizes)

    layers = [
        Layer(tuple(sorted(letters.index(names[a]) for a in axes)), arranged(ids))
        for axes, ids in value.layers
    ]
    const = None if value.const is None else arranged(value.const)
    shape = tuple(arranged(torch.empty(1).expand(value.shape)).shape)
    return Value(shape, layers, const, value.data)
