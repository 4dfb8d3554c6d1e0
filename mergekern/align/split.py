"""A program in two: a trunk that makes a space of features, and the head behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import TreeSpec

from ..errors import ArgumentError
from .program import Call, Program, Runner
from .relabel import Carried, carried, some_of
from .spaces import Spaces


@dataclass(frozen=True, eq=False)
class Part:
    """Some calls of a program. names: its tensors, which `module` takes before the values."""

    names: tuple[str, ...]
    module: fx.GraphModule

    def run(self, tensors: Iterable[Tensor], values: Iterable[Any], call: Call | None) -> Any:
        """The values at its end; `call`, if given, makes its calls."""
        run: Callable[..., Any] = self.module if call is None else Runner(self.module, call).run
        return run(*tensors, *values)

    def on(self, device: torch.device) -> Part:
        """The same, making tensors of its own on that device."""
        if all(n.kwargs.get("device", device) == device for n in self.module.graph.nodes):
            return self
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.module.graph, {}))
        for node in graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": device}
        return replace(self, module=fx.GraphModule(self.module, graph))


@dataclass(frozen=True, eq=False)
class Split:
    """crossing: the calls and inputs that the head is given; layout: the spaces they carry."""

    trunk: Part
    head: Part
    crossing: tuple[fx.Node, ...]
    layout: Mapping[str, Sequence[Carried]]
    in_spec: TreeSpec
    out_spec: TreeSpec

    def on(self, device: torch.device) -> Split:
        return replace(self, trunk=self.trunk.on(device), head=self.head.on(device))

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return self  # it holds no tensors and never changes


def split(op: str, spaces: Spaces, until: str) -> Split:
    """The trunk makes the space `until`: all calls up to the last that adds to it, and behind it
    those that take nothing but what is there already and no weights (activations, pooling).

    Raises: ArgumentError for what is no space that moves, and where no layer is left for a head.
    """
    if until not in spaces.movable:
        got = f"{until!r}, which is fixed" if until in spaces else repr(until)
        raise ArgumentError.of(op, "until is no space that moves", got, some_of(spaces))
    program, layout = spaces.program, carried(spaces)
    state = {n for n in program.placeholders() if n.name in program.names}
    trunk, head = _sides(spaces, until, state, layout)
    if not any(state & {*n.all_input_nodes} for n in head):
        what = f"no layer lies behind {until!r}"
        raise ArgumentError.of(op, what, f"until={until!r}", f"a space before, {some_of(spaces)}")
    outputs = program.outputs()
    inputs = [
        n for n in program.placeholders() if n not in state and n.name not in program.constants
    ]
    read = [n for call in head for n in call.all_input_nodes]
    read += [y for y in outputs if isinstance(y, fx.Node)]
    crossing = tuple(n for n in dict.fromkeys(read) if n in trunk or n in inputs)
    return Split(
        _part(program, inputs, trunk, crossing),
        _part(program, crossing, head, outputs),
        crossing,
        layout,
        program.in_spec,
        program.out_spec,
    )


Nodes = dict[fx.Node, None]  # a set that keeps its order


def _sides(
    spaces: Spaces, until: str, state: set[fx.Node], layout: Mapping[str, Sequence[Carried]]
) -> tuple[Nodes, Nodes]:
    """The calls of the trunk and those of the head."""
    calls = [n for n in spaces.program.graph.nodes if n.op == "call_function"]
    adding = _adding(spaces, until, state, layout)
    last = max(i for i, call in enumerate(calls) if adding(call))
    trunk, head = dict.fromkeys(calls[: last + 1]), Nodes()
    written = False
    for call in calls[last + 1 :]:
        # A call that writes in place keeps its order among those that may read what it writes.
        movable = not written and not (head and writes(call))
        ready = all(n in trunk or n.op != "call_function" for n in call.all_input_nodes)
        if movable and ready and not state & {*call.all_input_nodes}:
            trunk[call] = None
        else:
            head[call] = None
            written |= writes(call)
    return trunk, head


def _adding(
    spaces: Spaces, until: str, state: set[fx.Node], layout: Mapping[str, Sequence[Carried]]
) -> Callable[[fx.Node], bool]:
    """Whether a call adds to a space: it takes a tensor that makes its features.

    Where the same tensor reads features too (tied weights), the call's value must carry the space.
    """
    program = spaces.program
    makes, reads = set(), set()
    for place in spaces[until].places:
        names = program.aliases[place.name]
        makes |= set(names) if place.role != "consumes" else set()
        reads |= set(names) if place.role in ("consumes", "both") else set()

    def adds(call: fx.Node) -> bool:
        taken = {program.names[n.name] for n in call.all_input_nodes if n in state} & makes
        carries = any(c.space == until for c in layout.get(call.name, ()))
        return bool(taken - reads) or (bool(taken) and carries)

    return adds


def writes(call: fx.Node) -> bool:
    """Whether it changes one of its arguments."""
    return isinstance(call.target, torch._ops.OpOverload) and call.target._schema.is_mutable


def _part(
    program: Program, values: Iterable[fx.Node], calls: Nodes, outputs: Iterable[Any]
) -> Part:
    """A graph of these calls that takes the tensors they use, and these values."""
    outputs, values = list(outputs), list(values)
    used = {n for call in calls for n in call.all_input_nodes}
    used |= {y for y in outputs if isinstance(y, fx.Node)}
    known = program.names | {name: name for name in program.constants}
    tensors = [n for n in program.placeholders() if n in used and n.name in known]
    graph, copies = fx.Graph(), {}
    for n in tensors + values:
        copies[n] = graph.placeholder(n.name)
        copies[n].meta = dict(n.meta)
    for call in calls:
        for n in call.all_input_nodes:
            if n.op == "get_attr" and n not in copies:  # the graph of a call that has its own
                copies[n] = graph.node_copy(n)
        copies[call] = graph.node_copy(call, copies.__getitem__)
    graph.output(map_arg(tuple(outputs), copies.__getitem__))
    names = tuple(known[n.name] for n in tensors)
    return Part(names, fx.GraphModule(program.module, graph))
