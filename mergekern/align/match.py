"""match: which feature of each model becomes which feature of the merged one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import check
from ..errors import ArgumentError
from ..ops.zip_match import zip_match
from .heads import assign_groups
from .models import states_of
from .spaces import Space, Spaces
from .statistics import Statistics
from .weights import Objective, match_weights

METHODS = ("zip", "permute", "identity", "weights")

_OP = "match"


class Fit(NamedTuple):
    """How well a space was matched.

    before, after: the mean correlation of features of model 0 with those of the others that stand
    in the same place, and with those that are merged with them. merged_within: the share of
    features that are merged into another of their own model.
    """

    before: float
    after: float
    merged_within: float


@dataclass(frozen=True, eq=False)
class Match:
    """Which feature of the result each feature goes to.

    labels: movable space -> for each model int64 [size], 0 to size - 1, every one used by some
    model. Features of the result stand where those of model 0 do.
    correlations: movable space -> how well it was matched, where there are statistics.
    objectives: of method="weights", for each model but the first.
    """

    spaces: Spaces
    labels: Mapping[str, list[Tensor]]
    method: str
    correlations: Mapping[str, Fit] = field(default_factory=dict)
    objectives: tuple[Objective, ...] = ()

    @property
    def correlation_of_merged(self) -> dict[str, float]:
        """The mean correlation of features of two models that are merged, of each space."""
        return {name: fit.after for name, fit in self.correlations.items()}

    @property
    def merged_within(self) -> dict[str, float]:
        """The share of features merged with another of their own model, of each space."""
        return {name: fit.merged_within for name, fit in self.correlations.items()}


def match(
    stats: Statistics | Spaces,
    method: str = "zip",
    *,
    models: Sequence[nn.Module] | None = None,
    alpha: float = 0.3,
    beta: float = 0.125,
    eps: float = 0.0,
    host: str | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> Match:
    """labels[space][i][f] = the merged feature that feature f of model i becomes.

    identity: f itself. permute: the assignment of each model's features to model 0's with the
    largest sum of correlations. zip: groups by `zip_match` of all models' features, within one
    model too. Heads stay together: they are matched first, by the best assignments of their
    features, the same for all spaces of a group; then permute and zip work within matched heads.
    Where features keep their order in a head, only heads are matched.

    Shapes: labels int64 [size]; the width of the model never changes. Merged features are numbered
    so that each stands in the place of its first feature of model 0; those with none take the
    places that are left.
    models: if given, must be those of the statistics; method="weights" needs them.
    alpha, beta, host: of `zip_match`, for method="zip". eps: clamp of `correlation`. seed: of the
    order in which method="weights" goes through the spaces.
    Result: exact for the correlations at hand; zip takes them in float32.
    Cost: an assignment or a zip of each space, side by side in threads. Memory: the correlations of
    as many spaces as there are threads, 8 (N size)**2 bytes each and as much again.
    Raises: ArgumentError for an unknown method, alpha or beta outside 0 to 1, statistics of other
    models, statistics without the correlations that a method needs.
    Source: ZipIt (2305.03053); Git Re-Basin (2209.04836); heads as MuDSC (2403.01753).
    """
    check.choice(_OP, "method", method, METHODS)
    spaces = stats if isinstance(stats, Spaces) else stats.spaces
    if isinstance(stats, Spaces) and method != "weights":
        expected = "statistics of collect_statistics, or method='weights'"
        raise ArgumentError.of(_OP, f"{method} needs statistics", "spaces alone", expected)
    if isinstance(stats, Statistics) and models is not None:
        stats.require(_OP, models)
    objectives: list[Objective] = []
    known: dict[str, list[Tensor]] = {}
    if method == "weights":
        known, objectives = _weights(spaces, models, seed)
    labels = known
    fits: dict[str, Fit] = {}
    if isinstance(stats, Statistics):
        options = {"alpha": alpha, "beta": beta, "host": host, "backend": backend}
        labels, fits = _by_statistics(stats, method, known, eps, options)
    return Match(spaces, labels, method, fits, tuple(objectives))


def _weights(
    spaces: Spaces, models: Sequence[nn.Module] | None, seed: int
) -> tuple[dict[str, list[Tensor]], list[Objective]]:
    if models is None or len(models) < 2:
        got = "none" if models is None else len(models)
        raise ArgumentError.of(_OP, "there are no weights to match", got, "models, 2 or more")
    states_of(_OP, models, spaces.program)
    found = [match_weights(spaces, models[0], other, seed) for other in models[1:]]
    labels = {
        name: [torch.arange(space.size), *(order[name].argsort() for order, _ in found)]
        for name, space in spaces.movable.items()
    }
    return labels, [objective for _, objective in found]


def _by_statistics(
    stats: Statistics,
    method: str,
    known: Mapping[str, list[Tensor]],
    eps: float,
    options: dict[str, Any],
) -> tuple[dict[str, list[Tensor]], dict[str, Fit]]:
    """Labels, but for those that are known, and how well they fit, of all movable spaces."""
    if method == "zip" and not stats.within:
        expected = "statistics collected with within=True"
        raise ArgumentError.of(_OP, "zip needs correlations within models", "none", expected)
    same = {s.name: [torch.arange(s.size)] * stats.models for s in stats.spaces.movable.values()}
    labels: dict[str, list[Tensor]] = {**same, **known}
    fits: dict[str, Fit] = {}
    for groups in _side_by_side(stats.spaces):
        found = {s.name: stats.correlation(s.name, eps) for spaces in groups for s in spaces}
        if method in ("permute", "zip"):
            whole = [g for g in groups if method == "permute" or g[0].heads > 1 or g[0].inside]
            labels |= _permute(stats, whole, found)
        if method == "zip":
            labels |= _zip([s for g in groups for s in g if not s.inside], found, labels, options)
        fits |= {name: _fit(stats, name, found[name], labels[name]) for name in found}
    return labels, {name: fits[name] for name in labels}


def _side_by_side(spaces: Spaces) -> Iterator[list[list[Space]]]:
    """Groups of spaces, the largest first, as many at a time as there are threads."""
    groups = sorted(spaces.groups().values(), key=lambda g: -max(s.size for s in g))
    step = check.threads()
    for start in range(0, len(groups), step):
        yield groups[start : start + step]


def _permute(
    stats: Statistics, groups: list[list[Space]], correlations: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    """The place in model 0 of every feature of each model."""
    labels = {s.name: [torch.arange(s.size)] for group in groups for s in group}
    for i in range(1, stats.models):
        scores = [
            [(s, stats.between(correlations[s.name], i)) for s in spaces] for spaces in groups
        ]
        for name, index in assign_groups(scores).items():
            labels[name].append(index.cpu().argsort())
    return labels


def _zip(
    spaces: Sequence[Space],
    correlations: Mapping[str, Tensor],
    matched: Mapping[str, list[Tensor]],
    options: dict[str, Any],
) -> dict[str, list[Tensor]]:
    """Labels by zip_match, within the heads that `matched` brings together."""
    if not spaces:
        return {}
    heads = [torch.cat(matched[s.name]) // (s.size // s.heads) for s in spaces]
    several = [h if s.heads > 1 else None for s, h in zip(spaces, heads)]
    widths = [[s.size // s.heads] * s.heads if s.heads > 1 else None for s in spaces]
    found = zip_match(
        [correlations[s.name].float() for s in spaces],
        [[s.size] * len(matched[s.name]) for s in spaces],
        groups=several,
        out_dim=widths,
        **options,
    )
    return {
        s.name: _in_places_of_model_0(s, labels.cpu(), h)
        for s, labels, h in zip(spaces, found, heads, strict=True)
    }


def _in_places_of_model_0(space: Space, labels: Tensor, heads: Tensor) -> list[Tensor]:
    """The labels of each model, numbered by where the first feature of model 0 stands.

    heads: the merged head of each feature; a group with no feature of model 0 stays in its head.
    """
    if (labels < 0).any():
        lost = f"{int((labels < 0).sum())} features of space {space.name}"
        raise ArgumentError.of(_OP, "host='zipit' loses features", lost, "host=None")
    size = space.size
    first = torch.full((size,), size)
    first.scatter_reduce_(0, labels[:size], torch.arange(size), "amin")
    alone = first == size
    head = torch.empty(size, dtype=torch.int64)
    head[labels] = heads
    taken = torch.zeros(size, dtype=torch.bool)
    taken[first[~alone]] = True
    left = alone.nonzero()[:, 0]
    first[left[head[left].argsort(stable=True)]] = (~taken).nonzero()[:, 0]
    return list(torch.split(first[labels], size))


def _fit(stats: Statistics, name: str, correlation: Tensor, labels: list[Tensor]) -> Fit:
    """The correlations of merged pairs of model 0 and each other model."""
    size = stats.spaces[name].size
    blocks = [stats.between(correlation, i) for i in range(1, len(labels))]
    before = torch.stack([b.diagonal().mean() for b in blocks]).mean()
    merged = [labels[0][:, None] == other for other in labels[1:]]
    pairs = torch.cat([b[m.to(b.device)] for b, m in zip(blocks, merged, strict=True)])
    distinct = sum(len(torch.unique(each)) for each in labels)
    within = 1 - distinct / (size * len(labels))
    return Fit(float(before), float(pairs.mean()), within)
