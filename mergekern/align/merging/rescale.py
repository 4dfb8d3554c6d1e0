"""REPAIR: layers scaled so that what they make varies as it did in the models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ...errors import ArgumentError
from ..layers import Layer, biased_layers
from ..matching.match import Match
from ..statistics.statistics import Moments, Statistics
from ..tracing.program import module_of, state_of
from .partial import PartialZip
from .relabel import Relabelling, normalized, read_labels


class _Target(NamedTuple):
    """Mean and deviation that each channel is to have; those of none stay as they are."""

    mean: Tensor
    deviation: Tensor
    known: Tensor


def rescale(
    op: str,
    module: nn.Module,
    inputs: Iterable[Sequence[Any]],
    match: Match,
    statistics: Statistics,
    weights: Sequence[float] | None,
) -> None:
    """Scales the layers of `module` whose moments in the models were seen, by one pass."""
    program, outputs, n = match.spaces.program, statistics.outputs, statistics.models
    relabelling = Relabelling(read_labels(op, match, n))
    layers = [x for x in biased_layers(match.spaces) if x.node.name in outputs]
    factors = [1 / n] * n if weights is None else normalized(op, weights, n)
    merged = {
        layer.node.name: _merged(layer, outputs[layer.node.name], relabelling, factors)
        for layer in layers
    }
    if isinstance(module, PartialZip):
        trees = [
            (module.trunk, module.parts.trunk),
            *((h, module.parts.head) for h in module.heads),
        ]
        tensors = [part.tensors(tree) for tree, part in trees]
        nodes = [{node.name for node in part.module.graph.nodes} for _, part in trees]
        own = [{name: _own(each[i]) for name, each in outputs.items()} for i in range(n)]
        sides = [
            _Side(op, [layer for layer in layers if layer.node.name in here], found, targets)
            for here, found, targets in zip(nodes, tensors, [merged, *own], strict=True)
        ]
        for flat in inputs:
            module.run(flat, sides)
    else:
        state = state_of(module)
        sides = [_Side(op, layers, {k: state[v] for k, v in program.names.items()}, merged)]
        for flat in inputs:
            program.run(state, flat, sides[0])
    for x, y in [pair for side in sides for pair in side.repaired()]:
        x.copy_(y)


def _merged(
    layer: Layer, each: Sequence[Moments], relabelling: Relabelling, factors: Sequence[float]
) -> _Target:
    """Averages over the channels of the models that are merged."""
    size = len(each[0].mean)
    known = torch.zeros(size, dtype=torch.bool)
    for _, positions in layer.spaces:
        known[positions.flatten()] = True
    moving = [(space, x) for space, x in layer.spaces if relabelling.moves(space)]
    stay = [torch.arange(size)] * len(each)
    labels = relabelling.along(size, moving) if moving else stay
    total, mean, deviation = torch.zeros(3, size, dtype=torch.float64)
    for own, factor, label in zip(each, factors, labels, strict=True):
        total.index_add_(0, label, torch.full((size,), factor, dtype=torch.float64))
        mean.index_add_(0, label, factor * own.mean.cpu())
        deviation.index_add_(0, label, factor * own.variance.cpu().sqrt())
    known &= total != 0
    return _Target(mean / total, (deviation / total).clamp(min=0), known)


def _own(moments: Moments) -> _Target:
    known = torch.ones(len(moments.mean), dtype=torch.bool)
    return _Target(moments.mean.cpu(), moments.variance.cpu().sqrt(), known)


class _Side:
    """Makes the calls of a part of a program, with each layer's output brought to its target."""

    def __init__(
        self,
        op: str,
        layers: Sequence[Layer],
        tensors: Mapping[str, Tensor],
        targets: Mapping[str, _Target],
    ) -> None:
        self.op, self.tensors, self.targets = op, tensors, targets
        self.layers = {layer.node.name: layer for layer in layers}
        self.seen: dict[str, Moments] = {}

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = node.target(*args, **kwargs)  # type: ignore[operator]
        layer = self.layers.get(node.name)
        if layer is None:
            return y
        channels = y.double().movedim(layer.axis, -1)
        rows = channels.reshape(-1, channels.shape[-1])
        variance, mean = torch.var_mean(rows, 0, correction=0)
        now = Moments(len(rows), mean, variance)
        self.seen[node.name] = (
            _together(self.seen[node.name], now) if node.name in self.seen else now
        )
        scale, shift = self._affine(node.name, now, y.dtype)
        return (channels * scale + shift).movedim(-1, layer.axis).to(y.dtype)

    def _affine(self, name: str, seen: Moments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(scale, shift) that bring channels of these moments to the target."""
        target, (_, mean, variance) = self.targets[name], seen
        device, deviation = mean.device, variance.sqrt()
        varies = deviation > torch.finfo(dtype).eps * mean.abs()
        scale = torch.where(varies, target.deviation.to(device) / deviation, 1)
        shift = target.mean.to(device) - mean * scale
        known = target.known.to(device)
        return torch.where(known, scale, 1), torch.where(known, shift, 0)

    def repaired(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors to change, and what they are to be."""
        found = []
        for name, layer in self.layers.items():
            seen, weight, bias = (
                self.seen[name],
                self.tensors[layer.weight],
                self.tensors[layer.bias],
            )
            if not (seen.mean.isfinite().all() and seen.variance.isfinite().all()):
                what = f"module {module_of(layer.node)!r} returns NaN or infinities"
                raise ArgumentError.of(self.op, what, "not finite", "finite activations")
            scale, shift = self._affine(name, seen, weight.dtype)
            rows = weight.double().movedim(layer.channels, -1) * scale
            found += [(weight, rows.movedim(-1, layer.channels)), (bias, bias * scale + shift)]
        return found


def _together(a: Moments, b: Moments) -> Moments:
    """The moments of the rows of both (Chan)."""
    n, delta = a.rows + b.rows, b.mean - a.mean
    squares = a.variance * a.rows + b.variance * b.rows + delta**2 * (a.rows * b.rows / n)
    return Moments(n, a.mean + delta * (b.rows / n), squares / n)
