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
    """The sets of features F with f(x; P theta) = f(x; theta) for every permutation P of F.

    The model is traced by torch.export and run over labels in the place of numbers: every index of
    every axis of every parameter is a label; elementwise calls make labels one feature, sums over
    an axis end it, reshapes move labels as they move numbers. Features that nothing tells apart
    form a space: a layer's channels, a residual stream with all that reads and writes it, the MLP
    between, heads of attention (queries and keys are one space, values another, and the heads of
    both move together), pairs of a gated MLP or of a rotary embedding. Fused projections, position
    and class tokens, LayerScale, depthwise and grouped convolutions, GroupNorm, squeeze and
    excitation, flattened maps before a classifier, tied weights and shared biases follow from the
    calls themselves; no architecture is known by name.
    A permutation of a space is exact. Merging two of its features (a zip) is exact where layers
    are linear between, as for any ReLU network approximately else; `Space.approximate` says where
    a norm or a product over the features makes it worse.

    Shapes: example_inputs is a tensor, a tuple of arguments or a mapping of named ones, on the
    model's device, as the model takes them; the first axis is the batch. outputs: "fixed", or
    "free" where outputs may come in another order too (an encoder whose residual stream is its
    output), or the names of those outputs that may not.
    Result: `Spaces`; `verify` proves them. Spaces that may not move are listed with the reason.
    Cost: a trace and some seconds of Python for a ViT-B; no forward pass.
    Raises: ArgumentError with the name of the module that cannot be traced; `declare_spaces` takes
    spaces by hand.
    Source: what the hand-written graphs of ZipIt (Stoica et al., 2305.03053) and the specifications
    of Git Re-Basin (Ainsworth et al., 2209.04836) state for one architecture each.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> print(discover_spaces(model, torch.randn(4, 3)))
    0: 8 features of 3 tensors
    input of 0: 3 features of 1 tensors; fixed: meets an input or positions, which are no features
    2: 2 features of 2 tensors; fixed: is an output of the model
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError.of(_OP, "model is none", type(model).__name__, "a torch.nn.Module")
    program = Program(model, example_inputs, _OP)
    run = Interpreter(program, RULES, _OP)
    run.run()
    fixed = _fixed(program, outputs)
    for i, node in enumerate(program.outputs()):
        for value in run.values(node):
            if i not in fixed:
                run.node = node
                run.read(value, 0, value.layers)
                continue
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
