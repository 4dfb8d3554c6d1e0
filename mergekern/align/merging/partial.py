"""Partial zip: a merged trunk, run once, and a head of its own layers for each model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_unflatten

from ..layers import is_norm
from ..tracing.program import Call, Program, named_tensors
from .relabel import Relabelling
from .split import Part, Split, writes


class PartialZip(nn.Module):
    """y_i = head_i(trunk(x)): what `apply` with `until` gives; it is called as the models are.

    A call gives a tuple with the output of each model, in the form in which that returns it.
    Tensors of the trunk are `trunk.<name>`, those of model i `heads.<i>.<name>`, by their names in
    the models; where a model's features lie among the merged ones, `unmerge.<i>.<value>`.

    Models were traced in eval mode, and so they are computed. In training mode BatchNorm alone
    differs: it normalises by the batch and updates its running statistics.
    """

    def __init__(
        self,
        parts: Split,
        program: Program,
        relabelling: Relabelling,
        models: Sequence[nn.Module],
        trunk: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.parts = parts
        merged = {
            alias: x for name, x in trunk.items() for alias in program.architecture.aliases[name]
        }
        states = [dict(named_tensors(model)) | program.constants for model in models]
        self.trunk = _tree(_own(states[0], parts.trunk.names.values(), merged))
        self.heads = nn.ModuleList(_tree(_own(s, parts.head.names.values(), {})) for s in states)
        gathers = _gathers(parts, relabelling)
        self._gathers = list(gathers)
        self.unmerge = nn.ModuleList(
            _tree({g.name: x[i].clone() for g, x in gathers.items() if not _stays(x[i])})
            for i in range(len(models))
        )
        self._shared = not any(map(writes, parts.head.module.graph.nodes))
        self.train(models[0].training)
        self.to(next(iter(states[0].values())).device)  # constants and indices were not there

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        flat = self.parts.inputs.flatten(type(self).__name__, args, kwargs)
        return self.run(flat, [train_norms()] * (1 + len(self.heads)) if self.training else None)

    def run(
        self, flat: Sequence[Any], calls: Sequence[Call | None] | None = None
    ) -> tuple[Any, ...]:
        """The outputs for these values of the inputs; calls[0] makes those of the trunk, the others
        those of each head."""
        trunk, *heads = self.sides()
        make, *makes = calls if calls is not None else [None] * (1 + len(heads))
        part, tensors = trunk
        crossing = part.run(tensors.values(), flat, make)
        outputs = []
        for i, ((part, tensors), make) in enumerate(zip(heads, makes, strict=True)):
            flat_outputs = part.run(tensors.values(), self._unmerged(i, crossing), make)
            outputs.append(tree_unflatten(list(flat_outputs), self.parts.out_spec))
        return tuple(outputs)

    def _unmerged(self, i: int, crossing: Sequence[Any]) -> list[Any]:
        """What the head of model i is given: that model's features of the merged ones."""
        values = list(crossing)
        indices = dict(self.unmerge[i].named_buffers())
        for g in self._gathers:
            if g.name in indices:
                values[g.value] = _gather(values[g.value], g.axes, indices[g.name])
        if self._shared:
            return values
        # The head writes in place: what other heads are given as well, each has a copy of.
        return [
            v.clone() if isinstance(v, Tensor) and v is shared else v
            for v, shared in zip(values, crossing, strict=True)
        ]

    def sides(self) -> list[tuple[Part, dict[str, Tensor]]]:
        """The calls of the trunk and of each head, with its tensors by placeholder."""
        trunk, head = self.parts.trunk, self.parts.head
        return [(trunk, trunk.tensors(self.trunk)), *((head, head.tensors(h)) for h in self.heads)]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PartialZip:
        """As of every module; tensors that the calls make are made where those of heads are."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.parts = self.parts.on(next(iter(self.heads.state_dict().values())).device)
        return self


def train_norms(counts: dict[int, int] | None = None) -> Call:
    """Makes calls as they are, but BatchNorm in training mode.

    The running statistics move by the layer's momentum; with `counts`, of calls so far by the id of
    their means, they are the plain average.
    """

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_norm(node):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        x, weight, bias, mean, variance, _, momentum, eps, _ = args
        if counts is not None:
            counts[id(mean)] = counts.get(id(mean), 0) + 1
            momentum = 1 / counts[id(mean)]
        return functional.batch_norm(x, mean, variance, weight, bias, True, momentum, eps)

    return call


def running_statistics(partial: PartialZip) -> list[tuple[Tensor, Tensor]]:
    """The running means and variances of all BatchNorms, trunk and heads."""
    found = {}
    for part, tensors in partial.sides():
        for node in filter(is_norm, part.module.graph.nodes):
            mean, variance = (tensors[n.name] for n in node.args[3:5])
            found[id(mean)] = mean, variance
    return list(found.values())


class _Gather(NamedTuple):
    """The crossing value number `value` is read by an index along `axes`."""

    name: str
    value: int
    axes: tuple[int, ...]


def _gathers(parts: Split, relabelling: Relabelling) -> dict[_Gather, list[Tensor]]:
    """With the index for each model: its feature f is the merged feature that its label names."""
    found = {}
    for value, node in enumerate(parts.crossing):
        along: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for space, axes, positions in parts.layout.get(node.name, ()):
            if relabelling.moves(space):
                along.setdefault(axes, []).append((space, positions))
        for k, (axes, spaces) in enumerate(along.items()):
            size = math.prod(int(node.meta["val"].shape[axis]) for axis in axes)
            gather = _Gather(f"{node.name}_{k}" if k else node.name, value, axes)
            found[gather] = relabelling.along(size, spaces)
    return found


def _stays(index: Tensor) -> bool:
    return torch.equal(index, torch.arange(len(index)))


def _gather(x: Tensor, axes: tuple[int, ...], index: Tensor) -> Tensor:
    if len(axes) == 1:
        return x.index_select(axes[0], index)
    last = tuple(range(-len(axes), 0))
    moved = x.movedim(axes, last)
    chosen = moved.flatten(-len(axes)).index_select(-1, index)
    return chosen.view(moved.shape).movedim(last, axes)


def _own(
    state: Mapping[str, Tensor], names: Iterable[str], merged: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """New tensors like those of a model, which hold what is merged, else the same."""
    made = {}
    for name in names:
        x = state[name]
        y = merged[name] if name in merged else x.detach().clone()
        made[name] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
    return made


def _tree(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module that holds tensors by their dotted names."""
    root = nn.Module()
    for name, x in tensors.items():
        *path, leaf = name.split(".")
        owner = root
        for step in path:
            if step not in dict(owner.named_children()):
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        if isinstance(x, nn.Parameter):
            owner.register_parameter(leaf, x)
        else:
            owner.register_buffer(leaf, x)
    return root
