"""Calls of layers that REPAIR reads and scales, and of BatchNorm, which makes that unneeded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .spaces import Spaces
from .tracing.program import Program

# Which arguments of a call are weight and bias.
_TENSORS = {"linear": (1, 2), "conv1d": (1, 2), "conv2d": (1, 2), "conv3d": (1, 2), "addmm": (2, 0)}


class Layer(NamedTuple):
    """A call of a layer, the placeholders of its tensors, the axis of its channels in the weight
    and in the output, and where spaces lie among them."""

    node: fx.Node
    weight: str
    bias: str
    channels: int
    axis: int
    spaces: list[tuple[str, Tensor]]


def biased_layers(spaces: Spaces) -> Iterator[Layer]:
    """Convolutions and linear layers that produce movable spaces, and have a weight and a bias that
    no other call uses."""
    program, aliases = spaces.program, spaces.architecture.aliases

    def alone(x: Any) -> bool:
        return isinstance(x, fx.Node) and x.name in program.names and len(x.users) == 1

    for node in program.graph.nodes:
        kind = getattr(node.target, "__name__", "").partition(".")[0]
        if node.op != "call_function" or kind not in _TENSORS:
            continue
        tensors: list[Any] = [node.args[i] for i in _TENSORS[kind] if i < len(node.args)]
        if len(tensors) < 2 or not all(map(alone, tensors)):
            continue
        weight, bias = tensors
        places = [
            (space.name, place)
            for space in spaces.movable.values()
            for place in space.places
            if place.name in aliases[program.names[weight.name]] and place.role == "produces"
        ]
        if places:
            found = [(space, place.positions) for space, place in places]
            axis = -1 - (weight.meta["val"].ndim - 2)  # before the positions of a convolution
            yield Layer(node, weight.name, bias.name, places[0][1].axis, axis, found)


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms with running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def is_norm(node: fx.Node) -> bool:
    """Whether a call is one of a BatchNorm with running statistics."""
    return node.target is torch.ops.aten.batch_norm.default and node.args[3] is not None


def calls_norms(model: nn.Module, program: Program) -> bool:
    """Whether a model has such BatchNorms, and calls them: then what is made of it has them too."""
    return bool(norms_of(model)) and any(map(is_norm, program.graph.nodes))
