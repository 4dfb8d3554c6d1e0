"""Spaces of features: which axes of which tensors move together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ArgumentError
from ..ops.permute import permute_all
from .program import Program, evaluating, state_of

Permutations = Mapping[str, Tensor]
# Call -> (space, axes, positions) of its result: with `axes` last and flattened, feature f of the
# space has the entries positions[f].
Layout = dict[str, list[tuple[str, tuple[int, ...], Tensor]]]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a space lies in a tensor: feature f has the entries positions[f] along `axis`.

    role: "produces" (outputs of a layer), "consumes" (inputs of one), "rides" (norms, biases,
    scales, position embeddings), "both" where tied weights or weights that others are made of do.
    """

    name: str
    axis: int
    positions: Tensor  # int64 [size, k]
    role: str


@dataclass(frozen=True, eq=False)
class Probe:
    """Where activations are read: argument `arg` of the call `node`.

    With `axes` last and flattened, feature f has the entries positions[f]; all other axes, and
    the k entries, are samples.
    """

    node: str
    arg: int
    axes: tuple[int, ...]
    positions: Tensor  # int64 [size, k]
    module: str


@dataclass(frozen=True, eq=False)
class Space:
    """Features that may be reordered without changing what the model computes.

    Head h holds the features h * size / heads and following. Heads of all spaces of one `group`
    move together; within a head features move freely, unless `inside` says why not.
    fixed: why nothing of it may move; None if it may.
    approximate: why a zip of it (merging features, other than reordering) is not exact; None if
    it is.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    probes: tuple[Probe, ...] = ()
    heads: int = 1
    group: str | None = None
    inside: str | None = None
    fixed: str | None = None
    approximate: str | None = None


class Verification(NamedTuple):
    """max |permuted - original| over max |original| of each output, and what rounding allows."""

    error: float
    bound: float

    @property
    def exact(self) -> bool:
        return self.error <= self.bound


class Spaces(Mapping[str, Space]):
    """The spaces of one architecture by name, in the order in which a model runs through them.

    `movable` has those that may be reordered; the others say in `fixed` why not. str() lists all.
    """

    def __init__(
        self, spaces: Sequence[Space], program: Program | None, layout: Layout | None = None
    ) -> None:
        self._spaces = {space.name: space for space in spaces}
        self._program = program
        self.layout = layout or {}

    @property
    def program(self) -> Program:
        """The traced model."""
        if self._program is None:
            got, expected = "spaces declared without them", "declare_spaces(..., example_inputs=)"
            raise ArgumentError.of("spaces", "example inputs are missing", got, expected)
        return self._program

    def __getitem__(self, name: str) -> Space:
        return self._spaces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spaces)

    def __len__(self) -> int:
        return len(self._spaces)

    @property
    def movable(self) -> dict[str, Space]:
        """Those that are not fixed."""
        return {name: space for name, space in self._spaces.items() if space.fixed is None}

    def groups(self) -> dict[str, list[Space]]:
        """Movable spaces whose heads move together, by the name of the group (else their own)."""
        found: dict[str, list[Space]] = {}
        for name, space in self.movable.items():
            found.setdefault(space.group or name, []).append(space)
        return found

    def __str__(self) -> str:
        lines = []
        for s in self._spaces.values():
            heads = f" in {s.heads} heads ({s.group})" if s.group else ""
            notes = [f"fixed: {s.fixed}"] if s.fixed else []
            notes += [f"only whole heads move: {s.inside}"] if s.inside else []
            notes += [f"a zip is approximate: {s.approximate}"] if s.approximate else []
            tensors = len({p.name for p in s.places})
            lines.append(
                "; ".join([f"{s.name}: {s.size} features{heads} of {tensors} tensors", *notes])
            )
        return "\n".join(lines)

    def indices(
        self, permutations: Permutations, state: Mapping[str, Tensor]
    ) -> dict[str, dict[int, Tensor]]:
        """For `permute_all`: a space's feature f becomes what permutations[space][f] was."""
        found: dict[str, dict[int, Tensor]] = {}
        for name, index in permutations.items():
            for place in self[name].places:
                axes = found.setdefault(place.name, {})
                if place.axis not in axes:
                    axes[place.axis] = torch.arange(state[place.name].shape[place.axis])
                axes[place.axis][place.positions.flatten()] = place.positions[index].flatten()
        return found

    def permuted(
        self, permutations: Permutations, state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The same model with its features in another order.

        Raises: ArgumentError for what is no permutation, or of another size.
        """
        return permute_all(state, self.indices(permutations, state), require="permutation")

    def random(self, seed: int = 0) -> dict[str, Tensor]:
        """A random permutation of every movable space; heads move as wholes, groups together."""
        generator = torch.Generator().manual_seed(seed)
        chosen = {}
        for spaces in self.groups().values():
            heads = torch.randperm(spaces[0].heads, generator=generator)
            for s in spaces:
                inner = torch.arange(s.size // s.heads).expand(s.heads, -1)
                if s.inside is None:
                    rows = [torch.randperm(len(row), generator=generator) for row in inner]
                    inner = torch.stack(rows)
                chosen[s.name] = (heads[:, None] * inner.shape[1] + inner).flatten()
        return chosen

    def verify(self, model: nn.Module, inputs: Any, *, seed: int = 0) -> Verification:
        """max |f(P x; P theta) - f(x; theta)| / max |f|: every movable space permuted at random.

        Result: the largest error over the outputs (features of outputs that move are compared with
        themselves), and the bound sqrt(eps) of their dtype: reordered sums differ by a few units
        of rounding, a wrong space by about 1. `exact` says whether error <= bound.
        Cost: two forward passes and a copy of the model's tensors.
        Raises: ArgumentError for inputs that are not built as the example inputs.
        """
        flat = self.program.flat_inputs("verify", inputs)
        state = state_of(model)
        with evaluating(model):
            before = tree_leaves(self.program.run(state, flat))
            permutations = self.random(seed)
            after = tree_leaves(self.program.run(self.permuted(permutations, state), flat))
        errors, bound = [], 0.0
        for node, x, y in zip(self.program.outputs(), before, after, strict=True):
            if isinstance(x, Tensor) and x.is_floating_point():
                errors.append(distance(self._reordered(x, node.name, permutations), y))
                bound = max(bound, torch.finfo(x.dtype).eps ** 0.5)
        if not errors:
            raise ArgumentError.of("verify", "there is no output", "none", "a floating tensor")
        return Verification(max(errors), bound)

    def _reordered(self, x: Tensor, node: str, permutations: Permutations) -> Tensor:
        """The result of a call, its features in the order that `permutations` gives them."""
        for name, axes, positions in self.layout.get(node, ()):
            if name in permutations:
                last = tuple(range(-len(axes), 0))
                y = x.movedim(axes, last)
                flat = y.flatten(-len(axes)).clone()
                flat[..., positions.flatten()] = flat[..., positions[permutations[name]].flatten()]
                x = flat.view(y.shape).movedim(last, axes)
        return x


def distance(before: Tensor, after: Tensor) -> float:
    """max |after - before| / max |before|."""
    scale = float(before.abs().amax()) if before.numel() else 0.0
    gap = float((after - before).abs().amax()) if before.numel() else 0.0
    return gap / scale if scale else gap
