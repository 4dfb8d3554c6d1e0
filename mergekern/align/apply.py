"""apply: one model of several, by what a match says of their features."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import check
from ..errors import ArgumentError
from ..methods.compat import require_fit
from ..ops.permute import permute_all
from ..ops.zip_weights import zip_weights_all
from .match import Match
from .models import states_of
from .partial import PartialZip
from .program import Program
from .relabel import Relabelling, is_permutation, normalized, read_labels
from .spaces import Place, Spaces
from .split import split

_OP = "apply"
State = Mapping[str, Tensor]


def apply(
    models: Sequence[nn.Module],
    match: Match,
    *,
    until: str | None = None,
    weights: Sequence[float] | None = None,
    backend: str = "auto",
) -> nn.Module:
    """W = sum_i w_i M_i W_i U_i: every tensor of the models, merged in one space of features.

    M_i averages the features that a merged feature is made of, U_i gives each of them its input.
    w_i is 1 / N, or weights[i] / sum(weights); features that permute are weighted averages then,
    and a merged feature of n features of some models counts each by N w_i / n.

    With `until`, the name of a space, a partial zip: what produces that space and all before it is
    merged and run once (the trunk); behind it each model keeps its own layers (the heads), which
    read their model's features out of the merged ones. The result is a `PartialZip`, whose output
    is a tuple with the output of each model.

    Shapes: models of one architecture, that of match.spaces, on one device.
    Result: a new model (a copy of models[0], or a PartialZip); `models` stay as they are. Tensors
    keep their dtype and are rounded once, as `zip_weights` says. Where models are permutations of
    each other and the labels undo that, the merged weights are those of models[0] to the last bit.
    Tied weights are merged once and stay tied. Integers must agree, but those that the model does
    not read in evaluation (the counters of BatchNorm) are those of models[0]; so are buffers that
    no state dict holds and in which no feature lies. BatchNorm's statistics are averaged: `repair`
    measures them anew.
    Cost: reads every tensor of every model and writes the result once.
    Raises: ArgumentError for models that differ in names, shapes, dtypes or integers, labels that
    do not fit, weights that sum to 0, an `until` that is no space that moves or has no layer behind
    it, and for a zip of tensors that can only be permuted (tied ones that make and read features).
    Source: `MergeHandler`, `get_merged_state_dict`, `add_hooks` of ZipIt! (Stoica et al.,
    2305.03053).

    >>> import torch
    >>> from mergekern.align.match import Match
    >>> from mergekern.align.program import Program
    >>> from mergekern.align.spaces import Place, Space, Spaces
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1)) for _ in "ab")
    >>> f = torch.arange(2)[:, None]
    >>> places = Place("0.weight", 0, f, "produces"), Place("0.bias", 0, f, "rides")
    >>> hidden = Space("hidden", 2, (*places, Place("1.weight", 1, f, "consumes")))
    >>> spaces = Spaces([hidden], Program(a, torch.zeros(2, 1), "example"))
    >>> swap = torch.tensor([1, 0])
    >>> b.load_state_dict(spaces.permuted({"hidden": swap}, a.state_dict()))
    <All keys matched successfully>
    >>> match = Match(spaces, {"hidden": [torch.arange(2), swap]}, "permute", {})
    >>> torch.equal(apply([a, b], match)[0].weight, a[0].weight)
    True
    """
    spaces = match.spaces
    states = _states(models, spaces.program)
    merging = _Merging(spaces, states, read_labels(_OP, match, len(states)), weights, backend)
    if until is None:
        return _with_tensors(models[0], merging.merged(spaces.program.aliases))
    parts = split(_OP, spaces, until)
    trunk = merging.merged(parts.trunk.names.values())
    return PartialZip(parts, spaces.program, merging.relabelling, models, trunk)


def _states(models: Sequence[nn.Module], program: Program) -> list[dict[str, Tensor]]:
    """The tensors of each model, which fit together and are those of the traced one."""
    if not models or not all(isinstance(m, nn.Module) for m in models):
        got = ", ".join(type(m).__name__ for m in models) or "none"
        raise ArgumentError.of(_OP, "there are no models to merge", got, "modules, at least one")
    states = states_of(_OP, models, program)
    read = {
        alias
        for n in program.placeholders()
        if n.users and n.name in program.names
        for alias in program.aliases[program.names[n.name]]
    }
    fitting = {}
    for i, state in enumerate(states):
        held = {k: x for k, x in state.items() if k in program.persistent}
        for name in held:
            if _merges(held[name]):
                check.same(_OP, f"{name} of models[{i}]", held[name], "models[0]", states[0][name])
            elif name not in read:
                held[name] = states[0][name]
        fitting[f"models[{i}]"] = held
    require_fit(_OP, fitting)
    return states


def _merges(x: Tensor) -> bool:
    return x.dtype in check.FLOATS


class _Merging:
    """Tensors of several models by name, and where features lie in them."""

    def __init__(
        self,
        spaces: Spaces,
        states: list[dict[str, Tensor]],
        labels: dict[str, list[Tensor]],
        weights: Sequence[float] | None,
        backend: str,
    ) -> None:
        self.states, self.backend = states, backend
        self.aliases, self.persistent = spaces.program.aliases, spaces.program.persistent
        self.weights = None if weights is None else normalized(_OP, weights, len(states))
        self.relabelling = Relabelling(labels)
        self.places: dict[str, list[tuple[str, Place]]] = {}
        for space in spaces.values():
            for place in space.places:
                if self.relabelling.moves(space.name):
                    first = self.aliases[place.name][0]
                    self.places.setdefault(first, []).append((space.name, place))

    def merged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of these tensors that are merged, each under the first of its names."""
        firsts = dict.fromkeys(self.aliases[name][0] for name in names if name in self.aliases)
        xs = {
            k: [s[k] for s in self.states]
            for k in firsts
            if _merges(self.states[0][k]) and (k in self.persistent or k in self.places)
        }
        labels = {}
        for name in xs:
            axes = self._axes(name)
            kinds = sorted(rows for _, rows in axes.values())
            if len(axes) > 1 and (kinds != [False, True] or set(axes) != {0, 1}):
                xs[name] = self._permuted(name, xs[name], axes)
            elif axes:
                labels[name] = _arguments(axes)
        return zip_weights_all(xs, labels, weights=self.weights, backend=self.backend)

    def _axes(self, name: str) -> dict[int, tuple[list[Tensor], bool]]:
        """Axis -> labels of each model along it, and whether they are of outputs.

        Reordered features may be called either.
        """
        found = {}
        places = self.places.get(name, [])
        for axis in sorted({place.axis for _, place in places}):
            here = [(space, place) for space, place in places if place.axis == axis]
            size = self.states[0][name].shape[axis]
            vectors = self.relabelling.along(size, [(s, p.positions) for s, p in here])
            roles = {place.role for _, place in here}
            reads = roles == {"consumes"}
            if roles & {"consumes", "both"} and not reads and not is_permutation(vectors):
                self._refuse(name, f"features that are both made and read, on axis {axis}")
            found[axis] = vectors, not reads
        return found

    def _permuted(
        self, name: str, xs: list[Tensor], axes: Mapping[int, tuple[list[Tensor], bool]]
    ) -> list[Tensor]:
        """The tensors in the merged order, where one call of zip_weights cannot have all axes."""
        if not all(is_permutation(vectors) for vectors, _ in axes.values()):
            self._refuse(name, f"features on axes {', '.join(map(str, axes))}")
        index = [{a: v[i].argsort() for a, (v, _) in axes.items()} for i in range(len(xs))]
        return [
            permute_all({name: x}, {name: index[i]}, backend=self.backend)[name]
            for i, x in enumerate(xs)
        ]

    def _refuse(self, name: str, got: str) -> None:
        expected = "labels that only reorder, as of method='permute'"
        raise ArgumentError.of(_OP, f"{name} cannot be zipped", got, expected)


def _arguments(axes: Mapping[int, tuple[list[Tensor], bool]]) -> dict[str, Any]:
    """Keyword arguments of zip_weights."""
    given: dict[str, Any] = {}
    at = {True: 0, False: 0}
    for axis, (vectors, rows) in axes.items():
        given["rows" if rows else "cols"] = vectors
        at[rows] = axis
    return given | {"axes": (at[True], at[False])}


def _with_tensors(model: nn.Module, tensors: State) -> nn.Module:
    """A copy of the model with these tensors in place of its own, which are not copied."""
    known: dict[int, Any] = {}
    for name in tensors:
        x: Tensor = _attribute(model, name)
        y = tensors[name] if x.is_contiguous() else torch.empty_like(x).copy_(tensors[name])
        known[id(x)] = type(x)(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
    return copy.deepcopy(model, known)


def _attribute(model: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)
