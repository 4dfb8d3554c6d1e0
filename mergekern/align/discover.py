"""discover_spaces: the spaces of features of any model, from the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from .. import check
from ..errors import ArgumentError
from .calls import RULES
from .program import Program
from .resolve import Resolver
from .rules import Interpreter
from .spaces import Spaces

_OP = "discover_spaces"


def discover_spaces(
    model: nn.Module, example_inputs: Any, *, outputs: str | Sequence[str] = "fixed"
) -> Spaces:
    """The sets of features F with f(P x; P theta) = f(x; theta) for every permutation P of F."""
    if not isinstance(model, nn.Module):
        raise ArgumentError.of(_OP, "model is none", type(model).__name__, "a torch.nn.Module")
    program = Program(model, example_inputs, _OP)
    run = Interpreter(program, RULES, _OP)
    run.run()
    for value in run.values([program.outputs()[i] for i in _fixed(program, outputs)]):
        for layer in value.layers:
            run.facts.pin(layer.ids, "is an output of the model")
    spaces, layout = Resolver(program, run.facts).spaces(run.layout)
    return Spaces(spaces, program, layout)


def _fixed(program: Program, outputs: str | Sequence[str]) -> list[int]:
    """Which of the outputs, in order, may not change."""
    n = len(program.outputs())
    if isinstance(outputs, str):
        check.choice(_OP, "outputs", outputs, ("fixed", "free"))
        return list(range(n)) if outputs == "fixed" else []
    whole = tree_unflatten(list(range(n)), program.out_spec)
    found = []
    for name in outputs:
        if not isinstance(whole, Mapping) or name not in whole:
            known = list(whole) if isinstance(whole, Mapping) else "outputs without names"
            raise ArgumentError.of(_OP, "outputs names none of the model's", repr(name), known)
        found += tree_leaves(whole[name])
    return found
