"""Similarity of weights, by one-hot matrices in float64; labels that its blend does not change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mergekern.align.matching.blend import WeightSimilarity
from mergekern.align.matching.match import match
from mergekern.align.spaces import Place, Space, Spaces
from mergekern.align.statistics.collect import collect_statistics
from mergekern.align.statistics.statistics import Statistics
from mergekern.align.tracing.program import state_of

from accuracy import assert_bytes_equal, assert_within
from align.nets import Attention, Convs, Mlp, attention_spaces, convs_spaces, mlp_spaces, seeded
from refusal import refused

KINDS: dict[type[nn.Module], tuple[Callable[..., Spaces], tuple[int, ...]]] = {
    Mlp: (mlp_spaces, (5,)),
    Convs: (convs_spaces, (3, 4, 4)),
    Attention: (attention_spaces, (7, 5)),
}


def seen(kind: type[nn.Module], models: list[nn.Module], within: bool = True) -> Statistics:
    spaces, shape = KINDS[kind]
    x = torch.randn(128, *shape, generator=torch.Generator().manual_seed(0))
    return collect_statistics(
        models, [{"x": x} if kind is Attention else x], spaces(), within=within
    )


def merge_matrix(place: Place, labels: Tensor, length: int) -> Tensor:
    """[length, length]: entry of the result from entries before, by the rule of the docstring."""
    matrix = torch.zeros(length, length, dtype=torch.float64)
    touched = set(place.positions.flatten().tolist())
    for j in range(length):
        if j not in touched:
            matrix[j, j] = 1
    for f, g in enumerate(labels.tolist()):
        together = int((labels == g).sum())
        for start, end in zip(place.positions[f].tolist(), place.positions[g].tolist()):
            matrix[end, start] = 1 if place.role == "consumes" else 1 / together
    return matrix


def cosines(spaces: Spaces, models: list[nn.Module], space: Space, labels: dict) -> Tensor:
    rows = []
    for i, model in enumerate(models):
        parts = []
        parameters = {n: p.detach().double() for n, p in model.named_parameters()}
        for own in space.places:
            if own.name not in parameters:
                continue
            x = parameters[own.name]
            for other in spaces.movable.values():
                for place in other.places:
                    if place.name == own.name and place.axis != own.axis:
                        m = merge_matrix(place, labels[other.name][i], x.shape[place.axis])
                        x = torch.tensordot(m, x.movedim(place.axis, 0), 1).movedim(0, place.axis)
            parts.append(x.movedim(own.axis, 0)[own.positions].reshape(space.size, -1))
        rows.append(torch.cat(parts, 1))
    x = torch.nn.functional.normalize(torch.cat(rows), dim=1)
    return x @ x.T


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_cosines_are_those_of_merged_parameters(kind: type[nn.Module], count: int) -> None:
    models = [seeded(kind, s) for s in range(count)]
    stats = seen(kind, models)
    labels = match(stats, "zip", beta=1.0).labels
    assert any(len(torch.unique(x)) < len(x) for each in labels.values() for x in each)
    terms = 3 * 64  # of a dot product at most, and some sums and shares before it
    for within in (True, False):
        weights = WeightSimilarity(stats.spaces, models, within)
        for space in stats.spaces.movable.values():
            expected = cosines(stats.spaces, models, space, labels)
            expected = expected if within else expected[: space.size, space.size :]
            assert_within(weights.of(space, labels), expected, torch.tensor(terms * 2.0**-22))


@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize("blend", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_labels_are_those_of_the_blend_they_lead_to(
    kind: type[nn.Module], blend: float, method: str
) -> None:
    """Matched once more, each group with the others as they came out, nothing changes."""
    models = [seeded(kind, s) for s in range(2)]
    stats = seen(kind, models)
    found = match(stats, method, models=models, blend=blend)
    plain = match(stats, method)
    assert any(
        not torch.equal(x, y)
        for name in plain.labels
        for x, y in zip(found.labels[name], plain.labels[name], strict=True)
    )
    again = match(stats, method, models=models, blend=blend)
    from mergekern.align.matching.most_similar import most_similar

    options = {"alpha": 0.3, "beta": 0.125, "host": None, "backend": "auto"}
    for group in stats.spaces.groups().values():
        blended = {
            s.name: blend * stats.correlation(s.name)
            + (1 - blend) * cosines(stats.spaces, models, s, dict(found.labels))
            for s in group
        }
        labels = most_similar("match", stats, method, [group], blended, options)
        for s in group:
            for x, y, z in zip(
                labels[s.name], found.labels[s.name], again.labels[s.name], strict=True
            ):
                assert_bytes_equal(x, y)
                assert_bytes_equal(y, z)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_reordered_models_are_put_back(kind: type[nn.Module], within: bool) -> None:
    spaces, models = KINDS[kind][0](), [seeded(kind, 0) for _ in range(3)]
    orders = [spaces.random(seed) for seed in (1, 2)]
    for model, order in zip(models[1:], orders, strict=True):
        model.load_state_dict(spaces.permuted(order, state_of(model)))
    stats = seen(kind, models, within)
    for blend in (0.0, 0.5):
        labels = match(stats, "permute", models=models, blend=blend).labels
        for name, (_, *others) in labels.items():
            for mine, order in zip(others, orders, strict=True):
                assert_bytes_equal(mine, order[name])


def test_features_without_weights_are_similar_to_none() -> None:
    models = [seeded(Mlp, s) for s in range(2)]
    with torch.no_grad():
        models[0].fc1.weight[3] = models[0].fc1.bias[3] = 0
        models[0].fc2.weight[:, 3] = 0
    stats = seen(Mlp, models)
    labels = match(stats, "identity").labels
    got = WeightSimilarity(stats.spaces, models, True).of(stats.spaces["one"], labels)
    assert (got[3] == 0).all()
    assert (got[:, 3] == 0).all()
    assert got.isfinite().all()


def test_arguments_that_are_refused() -> None:
    models = [seeded(Mlp, s) for s in range(2)]
    stats = seen(Mlp, models)
    for value in (-0.1, 1.1):
        with refused("match", "blend is out of range"):
            match(stats, "zip", models=models, blend=value)
    with refused("match", "no weights to blend with"):
        match(stats, "zip", blend=0.5)
