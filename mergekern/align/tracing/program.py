"""What a model computes, as a list of ATen calls: traced once, run with any model's tensors.

torch.export, not torch.fx's symbolic trace: it follows any Python that the model runs (fx stops at
`if x.shape...`), gives ATen calls with shapes instead of modules to be interpreted by name, says
which parameter goes where, and in which module. The same list serves to discover spaces, to read
activations anywhere in the model (also where no module begins or ends) and to split a model into a
shared trunk and heads.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from ...errors import ArgumentError
from .inputs import Arguments, Inputs, arguments

Call = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Architecture:
    """What models of one kind have in common, by the names of their tensors.

    persistent: those of the state dict. aliases: all names of a tensor, for each of them. read:
    those that evaluation reads, as far as is known.
    """

    shapes: Mapping[str, tuple[int, ...]]
    persistent: frozenset[str]
    buffers: Mapping[str, Tensor]
    aliases: Mapping[str, list[str]]
    read: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Architecture:
        shapes = {name: tuple(x.shape) for name, x in state_of(model).items()}
        buffers = dict(model.named_buffers(remove_duplicate=False))
        persistent = frozenset(model.state_dict())
        return cls(shapes, persistent, buffers, _aliases(model), frozenset(shapes))


class Program:
    """A traced model. `names` maps the graph's placeholders to the names of the model's tensors.

    The first axis of every input may have any size, unless the model itself fixes it.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, op: str) -> None:
        args, kwargs = _two_rows(arguments(op, example_inputs))
        with evaluating(model):
            exported = _export(model, args, kwargs, op)
        signature = exported.graph_signature
        self.module, self.graph = exported.graph_module, exported.graph_module.graph
        _read_outputs(self.graph)
        self.names: dict[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
        }
        self.constants: dict[str, Any] = {
            placeholder: exported.constants[name]
            for placeholder, name in signature.inputs_to_lifted_tensor_constants.items()
        }
        known = {*self.names, *self.constants}
        nodes = [n for n in self.placeholders() if n.name not in known]
        self.inputs = Inputs(exported.call_spec.in_spec, nodes)
        self.out_spec: TreeSpec = exported.call_spec.out_spec
        self.example: Arguments = args, kwargs
        kind = Architecture.of(model)
        used = [self.names[n.name] for n in self.placeholders() if n.users and n.name in self.names]
        read = frozenset(alias for name in used for alias in kind.aliases[name])
        self.architecture = dataclasses.replace(kind, read=read)

    def flat_inputs(self, op: str, inputs: Any) -> list[Any]:
        """The values of the graph's inputs, in order."""
        return self.inputs.flatten(op, *arguments(op, inputs))

    def run(
        self, state: Mapping[str, Tensor], flat: Sequence[Any], call: Call | None = None
    ) -> Any:
        """The model's output with the tensors `state`; `call`, if given, makes its calls."""
        given = iter(flat)
        values = [
            self.constants[n.name]
            if n.name in self.constants
            else state[self.names[n.name]]
            if n.name in self.names
            else next(given)
            for n in self.placeholders()
        ]
        flat_outputs = Runner(self.module, call).run(*values)
        return tree_unflatten(list(flat_outputs), self.out_spec)

    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def outputs(self) -> list[Any]:
        """What the model returns: nodes, and values that are none."""
        return list(next(n for n in self.graph.nodes if n.op == "output").args[0])


class Runner(fx.Interpreter):
    """Runs a graph; `call`, if given, makes its calls."""

    def __init__(self, module: fx.GraphModule, call: Call | None) -> None:
        super().__init__(module)
        self.extra_traceback = False  # it would add lines to the text of an error
        self._call = call

    def run_node(self, n: fx.Node) -> Any:
        if self._call is None or n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return self._call(n, args, kwargs)


def module_of(node: fx.Node) -> str:
    """The name of the innermost module that made this call; "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def _read_outputs(graph: fx.Graph) -> None:
    """Makes every output the result of a call of its own, which reads it like any other value."""
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        read = []
        for value in output.args[0]:
            if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor):
                alias = graph.call_function(torch.ops.aten.alias.default, (value,))
                alias.meta = {"val": value.meta["val"]}
                value = alias
            read.append(value)
    output.args = (tuple(read),)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones under each of their names."""
    return {name: x.detach() for name, x in named_tensors(model)}


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients; each module's mode is put back."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def unfused() -> Iterator[None]:
    """TransformerEncoderLayer calls its parts: its fast path hides a whole layer in one call."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _two_rows(given: Arguments) -> Arguments:
    """A batch of one is doubled: a trace of one row fixes the batch to one."""
    tensors = [x for x in tree_flatten(given)[0] if isinstance(x, Tensor)]
    if not tensors or any(x.ndim == 0 or len(x) != 1 for x in tensors):
        return given
    return tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) else x, given)


def _export(model: nn.Module, args: Any, kwargs: Any, op: str) -> torch.export.ExportedProgram:
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        first = tree_map(
            lambda x: {0: Dim.AUTO} if isinstance(x, Tensor) and x.ndim else None, dict(bound)
        )
        with unfused():
            return torch.export.export(model, args, kwargs, dynamic_shapes=first, strict=False)
    except Exception as error:
        where = _module_in(error.__traceback__, model)
        got = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        expected = "a model that runs on the example inputs and that torch.export can trace, or "
        expected += "declare_spaces(...)"
        raise ArgumentError.of(op, f"{where} cannot be traced", got, expected) from error


def _module_in(traceback: TracebackType | None, model: nn.Module) -> str:
    """The innermost module whose forward an error came out of."""
    names = {id(m): name for name, m in model.named_modules()}
    found = ""
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        found = names.get(id(owner), found) if isinstance(owner, nn.Module) else found
        traceback = traceback.tb_next
    return f"module {found}" if found else "the model"


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Name -> all names of the same tensor (tied weights)."""
    names: dict[int, list[str]] = {}
    for name, x in named_tensors(model):
        names.setdefault(id(x), []).append(name)
    return {name: group for group in names.values() for name in group}
