"""Which features merge, by how similar they are: labels of the features of all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..ops.zip_match import zip_match
from .heads import assign_groups
from .spaces import Space
from .statistics import Statistics

Labels = Mapping[str, list[Tensor]]  # space -> for each model, the merged feature of each feature


def most_similar(
    op: str,
    stats: Statistics,
    method: str,
    groups: list[list[Space]],
    similarities: Mapping[str, Tensor],
    options: dict[str, Any],
) -> dict[str, list[Tensor]]:
    """Labels of groups of spaces by "permute" or "zip"; `options` of zip_match.

    similarities: of each space a matrix as `Statistics.correlation` has it.
    """
    if method == "permute":
        return _permute(stats, groups, similarities)
    whole = [spaces for spaces in groups if spaces[0].heads > 1 or spaces[0].inside]
    labels = {s.name: [torch.arange(s.size)] * stats.models for spaces in groups for s in spaces}
    labels |= _permute(stats, whole, similarities)
    free = [s for spaces in groups for s in spaces if not s.inside]
    return labels | _zip(op, free, similarities, labels, options)


def _permute(
    stats: Statistics, groups: list[list[Space]], similarities: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    """The place in model 0 of every feature of each model."""
    labels = {s.name: [torch.arange(s.size)] for group in groups for s in group}
    for i in range(1, stats.models):
        scores = [
            [(s, stats.between(similarities[s.name], i)) for s in spaces] for spaces in groups
        ]
        for name, index in assign_groups(scores).items():
            labels[name].append(index.argsort())
    return labels


def _zip(
    op: str,
    spaces: Sequence[Space],
    similarities: Mapping[str, Tensor],
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
        [similarities[s.name].float().cpu() for s in spaces],
        [[s.size] * len(matched[s.name]) for s in spaces],
        groups=several,
        out_dim=widths,
        **options,
    )
    return {
        s.name: _in_places_of_model_0(op, s, labels, h)
        for s, labels, h in zip(spaces, found, heads, strict=True)
    }


def _in_places_of_model_0(op: str, space: Space, labels: Tensor, heads: Tensor) -> list[Tensor]:
    """The labels of each model, numbered by where the first feature of model 0 stands.

    heads: the merged head of each feature; a group with no feature of model 0 stays in its head.
    """
    if (labels < 0).any():
        lost = f"{int((labels < 0).sum())} features of space {space.name}"
        raise ArgumentError.of(op, "host='zipit' loses features", lost, "host=None")
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
