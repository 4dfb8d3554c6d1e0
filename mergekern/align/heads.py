"""Matching of features that move in heads, and of heads that move in groups of spaces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.assign import assign
from .spaces import Space

Scores = Sequence[tuple[Space, Tensor]]  # the spaces of one group, score [size, size] of each


def assign_groups(groups: Sequence[Scores]) -> dict[str, Tensor]:
    """The best of the matchings that take each head, in all spaces of its group, to one head.

    As `mergekern.assign_heads`, with the sum over the spaces of a group of what two heads score at
    best as the score of these two. A space whose features keep their order in a head counts with
    that order. All problems of features are solved side by side.

    Result: space -> index int64 [size] on the CPU, with score[i, index[i]] matched.
    """
    blocks = {space.name: _blocks(space, score) for scores in groups for space, score in scores}
    free = [s.name for scores in groups for s, _ in scores if s.inside is None]
    solved = assign([pair for name in free for pair in blocks[name].flatten(0, 1)]) if free else []
    assert isinstance(solved, list)
    found = iter(solved)
    result = {}
    for scores in groups:
        inner = {}
        for space, _ in scores:
            heads, _, size, _ = blocks[space.name].shape
            if space.inside is None:
                features = torch.stack([next(found) for _ in range(heads**2)])
                inner[space.name] = features.view(heads, heads, size)
            else:
                inner[space.name] = torch.arange(size).expand(heads, heads, size)
        best = [blocks[name].gather(3, i[..., None]).double() for name, i in inner.items()]
        partner = assign(torch.stack([x.sum((2, 3)) for x in best]).sum(0))
        assert isinstance(partner, Tensor)
        for name, features in inner.items():
            chosen = features[torch.arange(len(partner)), partner]
            result[name] = (partner[:, None] * features.shape[2] + chosen).flatten()
    return result


def _blocks(space: Space, score: Tensor) -> Tensor:
    """[heads, heads, size of a head, size of a head], on the CPU, where assignments are solved."""
    size = space.size // space.heads
    return score.cpu().reshape(space.heads, size, space.heads, size).transpose(1, 2)
