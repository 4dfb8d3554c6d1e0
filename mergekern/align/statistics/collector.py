"""Collector: what the probes and layers of several models show, added up batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ...errors import ArgumentError
from ...ops.covariance import Covariance
from ..layers import biased_layers, calls_norms
from ..spaces import Probe, Space, Spaces, distance
from ..tracing.program import Program, evaluating, module_of
from .capture import After, Before, features, row_mask, run_together

Mask = str | Callable[[Any], Tensor]

_OP = "collect_statistics"
_COMPARED = 2  # rows of the first batch that each model computes by itself as well


class Collector:
    """What all batches have in common."""

    def __init__(
        self,
        models: list[nn.Module],
        states: list[dict[str, Tensor]],
        program: Program,
        within: bool,
        mask: Mask | None,
        options: dict[str, Any],
    ) -> None:
        self.models, self.states, self.program = models, states, program
        self.within, self.mask, self.options = within, mask, options
        self.nodes = {n.name: n for n in program.graph.nodes}
        self.marks: Tensor | None = None
        self.compared = False

    def readings(
        self, spaces: Sequence[Space], found: Mapping[str, Covariance], every: bool
    ) -> dict[str, list[Before]]:
        """By node, what adds the activations that the probes there read."""
        readings: dict[str, list[Before]] = {}
        for space in spaces:
            for probe in self._chosen(space, every):
                read = partial(self._read, probe, found[space.name])
                readings.setdefault(probe.node, []).append(read)
        return readings

    def _chosen(self, space: Space, every: bool) -> list[Probe]:
        """The probes that are read: the last call's, of heads all (queries and keys).

        A value that goes into several calls is read once.
        """
        chosen: dict[tuple[Any, ...], Probe] = {}
        for probe in space.probes:
            last = probe.node == space.probes[-1].node
            if every or last or space.heads > 1 or space.group is not None:
                value = self.nodes[probe.node].args[probe.arg]
                chosen.setdefault(
                    (value, probe.axes, tuple(probe.positions.flatten().tolist())), probe
                )
        return list(chosen.values())

    def glances(self, spaces: Spaces, found: dict[str, list[Covariance]]) -> dict[str, list[After]]:
        """By node, what adds the outputs that REPAIR needs: none where BatchNorm is reset."""
        glances: dict[str, list[After]] = {}
        if calls_norms(self.models[0], self.program):
            return glances
        for layer in biased_layers(spaces):
            name, channels = layer.node.name, layer.node.meta["val"].shape[layer.axis]
            # The products with one channel are not used; variances of all are kept beside them.
            found[name] = [Covariance(channels, 1, **self.options) for _ in self.models]
            glances[name] = [partial(self._glance, name, layer.axis, found[name])]
        return glances

    def _read(self, probe: Probe, found: Covariance, each: Sequence[tuple[Any, ...]]) -> None:
        xs = [features(args[probe.arg], probe) for args in each]
        node = self.nodes[probe.node].args[probe.arg]
        assert isinstance(node, fx.Node)
        sides = [xs] if self.within else [xs[:1], xs[1:]]
        self._add(found, sides, dict(enumerate(xs)), node, probe.module)

    def _glance(
        self, name: str, axis: int, found: list[Covariance], each: Sequence[Tensor]
    ) -> None:
        node = self.nodes[name]
        for i, y in enumerate(each):
            x = y.movedim(axis, -1)
            self._add(found[i], [[x], [x[..., :1]]], {i: x}, node, module_of(node))

    def _add(
        self,
        found: Covariance,
        sides: list[list[Tensor]],
        models: dict[int, Tensor],
        node: fx.Node,
        module: str,
    ) -> None:
        mask = None if self.marks is None else row_mask(_OP, self.marks, sides[0][0], node)
        try:
            found.update(*sides, mask=mask)
        except ArgumentError as error:
            for i, x in models.items():
                bad = ~x.isfinite().all(-1).reshape(-1)
                count = int((bad if mask is None else bad & mask).sum())
                if count:
                    what = f"models[{i}] has NaN or infinite activations at module {module!r}"
                    expected = "finite values, or nan='zero'"
                    raise ArgumentError.of(_OP, what, f"{count} such rows", expected) from error
            raise

    def add(
        self, batch: Any, before: Mapping[str, list[Before]], after: Mapping[str, list[After]]
    ) -> None:
        """One batch through all models."""
        args, kwargs = self.program.inputs.of_batch(_OP, batch)
        flat = self.program.inputs.flatten(_OP, args, kwargs)
        for x in flat:
            if isinstance(x, Tensor) and x.device != torch.device(self.options["device"]):
                expected = f"{self.options['device']}, where the models are"
                raise ArgumentError.of(_OP, "a batch is on another device", x.device, expected)
        self.marks = self._marks(batch)
        if not self.compared:
            self._compare(self.program.inputs.first_rows(flat, _COMPARED))
            self.compared = True
        run_together(self.program, self.states, flat, before, after)

    def _marks(self, batch: Any) -> Tensor | None:
        if self.mask is None:
            return None
        if callable(self.mask):
            marks = self.mask(batch)
        elif isinstance(batch, Mapping) and self.mask in batch:
            marks = batch[self.mask] != 0
        else:
            expected = "the name of an input, or a callable from a batch to bool [batch, tokens]"
            raise ArgumentError.of(_OP, "mask names no input", repr(self.mask), expected)
        if not isinstance(marks, Tensor) or marks.dtype != torch.bool or marks.ndim != 2:
            shown = isinstance(marks, Tensor)
            got = f"{marks.dtype} {list(marks.shape)}" if shown else type(marks).__name__
            raise ArgumentError.of(_OP, "mask is none of tokens", got, "bool [batch, tokens]")
        return marks

    def _compare(self, flat: list[Any]) -> None:
        """What each model returns by itself with what the traced one returns with its tensors."""
        args, kwargs = self.program.inputs.call(flat)
        for i, (model, state) in enumerate(zip(self.models, self.states, strict=True)):
            with evaluating(model):
                own = [y.nan_to_num() for y in _floating(model(*args, **kwargs))]
                output = self.program.run(state, flat)
            traced = [y.nan_to_num() for y in _floating(output)]
            what = f"models[{i}] computes something else than the model of the spaces"
            if [y.shape for y in own] != [y.shape for y in traced]:
                shapes = [[list(y.shape) for y in ys] for ys in (own, traced)]
                raise ArgumentError.of(_OP, what, f"outputs {shapes[0]}", shapes[1])
            for a, b in zip(own, traced, strict=True):
                error, bound = distance(a, b), torch.finfo(a.dtype).eps ** 0.5
                if not error <= bound:
                    expected = f"{bound:.1e} of the largest output at most"
                    raise ArgumentError.of(_OP, what, f"outputs {error:.1e} apart", expected)


def _floating(output: Any) -> list[Tensor]:
    return [y for y in tree_leaves(output) if isinstance(y, Tensor) and y.is_floating_point()]
