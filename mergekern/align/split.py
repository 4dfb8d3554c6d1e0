"""A program in two: a trunk that makes a space of features, and the head behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import TreeSpec

from ..errors import ArgumentError
from .inputs import Inputs
from .program import Call, Program, Runner, module_of
from .relabel import Carried, carried, some_of
from .spaces import Spaces


@dataclass(frozen=True, eq=False)
class Part:
    """Some calls of a program. names: of the tensors that `module` takes before the values, by
    those of its placeholders."""

    names: Mapping[str, str]
    module: fx.GraphModule

    def tensors(self, tree: nn.Module) -> dict[str, Tensor]:
        """By placeholder, what a module holds under these names."""
        return {n: attrgetter(name)(tree) for n, name in self.names.items()}

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
    inputs: Inputs
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
    program = spaces.program
    cut = _Cut(op, spaces)
    trunk, head = cut.sides(until)
    if not any(cut.state & {*n.all_input_nodes} for n in head):
        what = f"no layer lies behind {until!r}"
        raise ArgumentError.of(op, what, f"until={until!r}", f"a space before, {some_of(spaces)}")
    outputs = program.outputs()
    read = [n for call in head for n in call.all_input_nodes]
    read += [y for y in outputs if isinstance(y, fx.Node)]
    made = trunk.keys() - head.keys() | {*program.inputs.nodes}
    crossing = tuple(n for n in dict.fromkeys(read) if n in made)
    for value in crossing:
        if value in cut.data and value.name not in cut.layout:
            what = f"until={until!r} cuts a value whose features the spaces do not tell"
            got = f"{value.name} of module {module_of(value)!r}"
            expected = "a cut where layers read what crosses it, or spaces of discover_spaces"
            raise ArgumentError.of(op, what, got, expected)
    return Split(
        _part(program, program.inputs.nodes, trunk, crossing),
        _part(program, crossing, head, outputs),
        crossing,
        cut.layout,
        program.inputs,
        program.out_spec,
    )


Nodes = dict[fx.Node, None]  # a set that keeps its order


class _Cut:
    """Which calls of a program are the trunk's and which the head's."""

    def __init__(self, op: str, spaces: Spaces) -> None:
        self.op, self.spaces, self.program = op, spaces, spaces.program
        self.layout = carried(spaces)
        self.calls = [n for n in self.program.graph.nodes if n.op == "call_function"]
        self.state = {n for n in self.program.placeholders() if n.name in self.program.names}
        self.data, self.weights = self._sources()

    def sides(self, until: str) -> tuple[Nodes, Nodes]:
        adding = [i for i, call in enumerate(self.calls) if self._adds(call, until)]
        if not adding:
            what = f"{until!r} lies within weights, and no activations have it"
            raise ArgumentError.of(self.op, what, f"until={until!r}", some_of(self.spaces))
        split = adding[-1] + 1
        trunk, head = dict.fromkeys(self.calls[:split]), Nodes()
        written = False
        for call in self.calls[split:]:
            # A call that writes in place keeps its order among those that may read what it writes.
            movable = not written and not (head and writes(call))
            ready = all(n in trunk or n.op != "call_function" for n in call.all_input_nodes)
            if movable and ready and not self.state & {*call.all_input_nodes}:
                trunk[call] = None
            else:
                head[call] = None
                written |= writes(call)
        # What a head makes of weights alone it makes of its own.
        for call in reversed([call for call in self.calls if call in self.weights]):
            if call in trunk and any(n in head or n.op == "output" for n in call.users):
                head[call] = None
                if not any(n in trunk for n in call.users):
                    del trunk[call]
        return trunk, {call: None for call in self.calls if call in head}

    def _adds(self, call: fx.Node, space: str) -> bool:
        """Whether a call adds to a space: it takes a tensor that makes its features.

        Where such a tensor reads features too (tied weights), its value must carry the space.
        """
        taken = {name for n in call.all_input_nodes for name in self.weights.get(n, ())}
        roles = {
            place.role
            for place in self.spaces[space].places
            if not taken.isdisjoint(self.program.aliases[place.name])
        }
        if roles & {"consumes", "both"}:
            return any(c.space == space for c in self.layout.get(call.name, ()))
        return bool(roles)

    def _sources(self) -> tuple[set[fx.Node], dict[fx.Node, set[str]]]:
        """What comes of the numbers of inputs, and what comes of tensors of the state and of
        nothing else but sizes, with the names of these tensors."""
        inputs, state = set(self.program.inputs.nodes), {}
        for n in self.state:
            state[n] = {self.program.names[n.name]}
        for call in self.calls:
            given = call.all_input_nodes
            if not inputs.isdisjoint(given):
                if not isinstance(call.meta.get("val"), int | torch.SymInt):
                    inputs.add(call)
            elif any(n in state for n in given):
                state[call] = {name for n in given for name in state.get(n, ())}
        return inputs.difference(self.program.inputs.nodes), state


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
    names = {n.name: known[n.name] for n in tensors}
    return Part(names, fx.GraphModule(program.module, graph))
