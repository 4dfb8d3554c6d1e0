"""declare_spaces: spaces given by hand, as Git Re-Basin gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from .program import Program, module_of, state_of
from .rules import name_of
from .spaces import Place, Probe, Space, Spaces

_OP = "declare_spaces"
_ROLES = ("produces", "consumes", "rides")
# Where the input of a call lies that takes a weight, and which of its axes has the features.
_READS = {"linear": (0, -1), "matmul": (0, -1), "mm": (0, -1), "bmm": (0, -1), "addmm": (1, -1)}
_READS |= {"conv1d": (0, 1), "conv2d": (0, 1), "conv3d": (0, 1)}


def declare_spaces(
    axes: Mapping[str, Sequence[str | tuple[str, str] | None]],
    model: nn.Module,
    example_inputs: Any = None,
    *,
    heads: Mapping[str, int] | None = None,
    groups: Mapping[str, str] | None = None,
) -> Spaces:
    """{tensor: (space of axis 0, of axis 1, ...)}: what cannot be discovered, given by hand.

    axes: for each tensor of `model` that has features, a space's name (or None) for each axis. A
    vector rides; otherwise axis 0 produces features and axis 1 consumes them, unless a pair
    (space, role) says "produces", "consumes" or "rides". heads: how many blocks the features of a
    space lie in. groups: spaces of one name have their heads moved together.
    example_inputs: needed to collect statistics, to verify, and for partial zips; without them,
    weight matching works.
    Result: `Spaces`, all of them movable. Nothing proves them: run `verify`.
    Raises: ArgumentError for tensors that are not there, axes that do not fit, sizes that differ.
    Source: `permutation_spec_from_axes_to_perm` of Git Re-Basin (Ainsworth et al., 2209.04836).

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> axes = {"0.weight": ("hidden", None), "0.bias": ("hidden",), "2.weight": (None, "hidden")}
    >>> spaces = declare_spaces(axes, model, torch.randn(4, 3))
    >>> print(spaces)
    hidden: 8 features of 3 tensors
    >>> spaces.verify(model, torch.randn(4, 3)).exact
    True
    """
    state = state_of(model)
    places: dict[str, list[Place]] = {}
    for name, given in axes.items():
        if name not in state:
            raise ArgumentError.of(_OP, "axes of no tensor", repr(name), "a name of the model")
        shape = list(state[name].shape)
        if isinstance(given, str) or len(given) != len(shape):
            what = f"axes of {name} do not fit"
            raise ArgumentError.of(_OP, what, given, f"one for each axis of {shape}")
        for axis, entry in enumerate(given):
            if entry is not None:
                space, role = _entry(name, axis, len(shape), entry)
                positions = torch.arange(shape[axis])[:, None]
                places.setdefault(space, []).append(Place(name, axis, positions, role))
    program = None if example_inputs is None else Program(model, example_inputs, _OP)
    made = []
    for space, found in places.items():
        blocks = _blocks(space, found, (heads or {}).get(space, 1))
        group = (groups or {}).get(space, space if blocks > 1 else None)
        probes = () if program is None else tuple(_probes(program, found))
        made.append(Space(space, len(found[0].positions), tuple(found), probes, blocks, group))
    return Spaces(made, program)


def _entry(name: str, axis: int, ndim: int, entry: Any) -> tuple[str, str]:
    """The space of an axis and its role there."""
    if isinstance(entry, str):
        return entry, "rides" if ndim == 1 or axis > 1 else ("produces", "consumes")[axis]
    if isinstance(entry, tuple) and len(entry) == 2 and entry[1] in _ROLES:
        return str(entry[0]), entry[1]
    expected = f"a space, or (space, role) with a role of {', '.join(_ROLES)}"
    raise ArgumentError.of(_OP, f"axis {axis} of {name} is no space", repr(entry), expected)


def _blocks(space: str, places: list[Place], heads: int) -> int:
    sizes = [len(p.positions) for p in places]
    if len({*sizes}) > 1:
        raise ArgumentError.of(_OP, f"sizes of space {space} differ", sizes, "one size")
    size = len(places[0].positions)
    if heads < 1 or size % heads:
        raise ArgumentError.of(_OP, f"heads of {space} do not fit", heads, f"a divisor of {size}")
    return heads


def _probes(program: Program, places: list[Place]) -> list[Probe]:
    """The inputs of the calls that consume these places."""
    consumed = {p.name: p for p in places if p.role == "consumes"}
    found: dict[tuple[str, int], Probe] = {}
    for node in program.graph.nodes:
        read = _READS.get(name_of(node)) if node.op == "call_function" else None
        if read is None:
            continue
        arg, axis = read
        for operand in node.all_input_nodes:
            place = consumed.get(program.names.get(operand.name, ""))
            if place is not None:
                value = node.args[arg]
                ndim = value.meta["val"].ndim
                probe = Probe(node.name, arg, (axis % ndim,), place.positions, module_of(node))
                found.setdefault((value.name, 0), probe)
    return [*found.values()]
