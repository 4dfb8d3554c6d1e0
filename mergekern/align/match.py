"""match: which feature of each model becomes which feature of the merged one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import check
from ..errors import ArgumentError
from .blend import WeightSimilarity
from .merging import Labels, most_similar
from .models import states_of
from .spaces import Space, Spaces
from .statistics import Statistics
from .weights import STARTS, Objective, match_weights

METHODS = ("zip", "permute", "identity", "weights")
BLEND_ROUNDS = 10

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
    blend: float = 1.0,
    eps: float = 0.0,
    host: str | None = None,
    seed: int = 0,
    start: str = "best",
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
    models: if given, must be those of the statistics; method="weights" and blend < 1 need them.
    blend: for permute and zip, the share of the correlation in what makes features similar; the
    rest is the cosine of their parameters, the features of other spaces merged as they are at that
    point. Spaces are matched again, one group after another, until no label changes, 10 times at
    most.
    alpha, beta, host: of `zip_match`, for method="zip". eps: clamp of `correlation`. seed: of the
    order in which method="weights" goes through the spaces. start: where it starts from, "identity"
    as Git Re-Basin, "anchored" with features matched from the inputs on by what is known so far, or
    the "best" of both.
    Result: exact for the correlations at hand; zip takes them in float32.
    Cost: an assignment or a zip of each space, side by side in threads. Memory: the correlations of
    as many spaces as there are threads, 8 (N size)**2 bytes each and as much again.
    Raises: ArgumentError for an unknown method, alpha or beta outside 0 to 1, statistics of other
    models, statistics without the correlations that a method needs.
    Source: ZipIt (2305.03053); Git Re-Basin (2209.04836); heads and blend as MuDSC (2403.01753).

    >>> import torch
    >>> from mergekern.align.discover import discover_spaces
    >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    >>> models = [make(), make()]
    >>> spaces = discover_spaces(models[0], torch.zeros(2, 4))
    >>> order = {name: torch.tensor([2, 0, 1]) for name in spaces.movable}
    >>> _ = models[1].load_state_dict(spaces.permuted(order, models[0].state_dict()))
    >>> match(spaces, "weights", models=models).labels["0"]
    [tensor([0, 1, 2]), tensor([2, 0, 1])]
    """
    check.choice(_OP, "method", method, METHODS)
    check.choice(_OP, "start", start, STARTS)
    spaces = stats if isinstance(stats, Spaces) else stats.spaces
    if isinstance(stats, Spaces) and method != "weights":
        expected = "statistics of collect_statistics, or method='weights'"
        raise ArgumentError.of(_OP, f"{method} needs statistics", "spaces alone", expected)
    if isinstance(stats, Statistics) and models is not None:
        stats.require(_OP, models)
    if isinstance(stats, Statistics) and method == "zip" and not stats.within:
        expected = "statistics collected with within=True"
        raise ArgumentError.of(_OP, "zip needs correlations within models", "none", expected)
    if not 0 <= check.number(_OP, "blend", blend) <= 1:
        raise ArgumentError.of(_OP, "blend is out of range", blend, "0 to 1")
    options = {"alpha": alpha, "beta": beta, "host": host, "backend": backend}
    objectives: list[Objective] = []
    labels: dict[str, list[Tensor]] = {}
    fits: dict[str, Fit] = {}
    if method == "weights":
        labels, objectives = _weights(spaces, models, seed, start)
    if isinstance(stats, Statistics):
        if method in ("zip", "permute") and blend < 1:
            labels = _blended(stats, method, models, blend, eps, options)
        labels, fits = _by_statistics(stats, method, labels, eps, options)
    return Match(spaces, labels, method, fits, tuple(objectives))


def _weights(
    spaces: Spaces, models: Sequence[nn.Module] | None, seed: int, start: str
) -> tuple[dict[str, list[Tensor]], list[Objective]]:
    if models is None or len(models) < 2:
        got = "none" if models is None else len(models)
        raise ArgumentError.of(_OP, "there are no weights to match", got, "models, 2 or more")
    states_of(_OP, models, spaces.program)
    found = [match_weights(spaces, models[0], other, seed, start) for other in models[1:]]
    labels = {
        name: [torch.arange(space.size), *(order[name].argsort() for order, _ in found)]
        for name, space in spaces.movable.items()
    }
    return labels, [objective for _, objective in found]


def _blended(
    stats: Statistics,
    method: str,
    models: Sequence[nn.Module] | None,
    blend: float,
    eps: float,
    options: dict[str, Any],
) -> dict[str, list[Tensor]]:
    """Labels by activations and weights, round after round until they stay."""
    if models is None:
        expected = "models, or blend=1"
        raise ArgumentError.of(_OP, "there are no weights to blend with", "none", expected)
    weights = WeightSimilarity(stats.spaces, models, stats.within)
    labels, _ = _by_statistics(stats, method, {}, eps, options)
    for _ in range(BLEND_ROUNDS):
        before = labels
        for spaces in stats.spaces.groups().values():
            blended = {
                s.name: stats.correlation(s.name, eps).cpu() * blend
                + weights.of(s, labels).cpu() * (1 - blend)
                for s in spaces
            }
            labels = labels | most_similar(_OP, stats, method, [spaces], blended, options)
        if all(map(torch.equal, _flat(before), _flat(labels))):
            break
    return labels


def _flat(labels: Labels) -> list[Tensor]:
    return [x for each in labels.values() for x in each]


def _by_statistics(
    stats: Statistics, method: str, known: Labels, eps: float, options: dict[str, Any]
) -> tuple[dict[str, list[Tensor]], dict[str, Fit]]:
    """Labels, those that are known or else by correlation, and how well they fit."""
    movable = stats.spaces.movable
    labels = {name: [torch.arange(s.size)] * stats.models for name, s in movable.items()}
    labels |= known
    fits: dict[str, Fit] = {}
    for groups in _side_by_side(stats.spaces):
        found = {s.name: stats.correlation(s.name, eps) for spaces in groups for s in spaces}
        if method in ("permute", "zip") and not known:
            labels |= most_similar(_OP, stats, method, groups, found, options)
        fits |= {name: _fit(stats, name, found[name], labels[name]) for name in found}
    return labels, {name: fits[name] for name in labels}


def _side_by_side(spaces: Spaces) -> Iterator[list[list[Space]]]:
    """Groups of spaces, the largest first, as many at a time as there are threads."""
    groups = sorted(spaces.groups().values(), key=lambda g: -max(s.size for s in g))
    step = check.threads()
    for start in range(0, len(groups), step):
        yield groups[start : start + step]


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
