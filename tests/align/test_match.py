"""match: labels that are the best there are, in the places of model 0, heads together."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import mergekern as mk
from mergekern.align.matching.match import match
from mergekern.align.spaces import Spaces
from mergekern.align.statistics.collect import collect_statistics
from mergekern.align.statistics.statistics import Statistics
from mergekern.align.tracing.program import state_of

import zipit
from accuracy import assert_bytes_equal
from align.nets import Attention, Convs, Mlp, attention_spaces, convs_spaces, mlp_spaces, seeded
from refusal import refused

OP = "match"
ROWS = 64
KINDS: dict[type[nn.Module], tuple[Callable[..., Spaces], tuple[int, ...]]] = {
    Mlp: (mlp_spaces, (5,)),
    Convs: (convs_spaces, (3, 4, 4)),
    Attention: (attention_spaces, (7, 5)),
}


def batches(kind: type[nn.Module]) -> list[Any]:
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(ROWS, *KINDS[kind][1], generator=g) for _ in range(2)]
    return [{"x": x} for x in xs] if kind is Attention else xs


def seen(
    kind: type[nn.Module], models: list[nn.Module], spaces: Spaces, **options: Any
) -> Statistics:
    return collect_statistics(models, batches(kind), spaces, **options)


def independent(
    kind: type[nn.Module], count: int = 2, *, inside: str | None = None, **options: Any
) -> Statistics:
    spaces = attention_spaces(inside=inside) if kind is Attention else KINDS[kind][0]()
    return seen(kind, [seeded(kind, s) for s in range(count)], spaces, **options)


def reordered(
    kind: type[nn.Module], spaces: Spaces, seed: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """seeded(kind, 0) with its features in a random order, which comes with it."""
    model, order = seeded(kind, 0), spaces.random(seed)
    model.load_state_dict(spaces.permuted(order, state_of(model)))
    return model, order


# ---- permute -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize("inside", [None, "they keep their order"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_reordered_models_are_put_back(
    kind: type[nn.Module], inside: str | None, method: str
) -> None:
    """All correlations of counterparts are 1, so they merge first."""
    spaces = attention_spaces(inside=inside) if kind is Attention else KINDS[kind][0]()
    others = [reordered(kind, spaces, seed) for seed in (1, 2)]
    models = [seeded(kind, 0), *(model for model, _ in others)]
    stats = seen(kind, models, spaces)
    found = match(stats, method, models=models, alpha=1.0)
    assert found.method == method
    assert found.spaces is spaces
    assert list(found.labels) == list(spaces.movable)
    for name, labels in found.labels.items():
        dead = (stats.correlation(name).diagonal() == 0).any()
        assert not dead
        assert_bytes_equal(labels[0], torch.arange(spaces[name].size))
        for mine, (_, order) in zip(labels[1:], others, strict=True):
            assert_bytes_equal(mine, order[name])
        assert found.correlation_of_merged[name] > 1 - 1e-5
        assert found.merged_within[name] == 0


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("kind", [Mlp, Convs], ids=lambda k: k.__name__)
def test_permute_is_the_best_assignment(kind: type[nn.Module], within: bool) -> None:
    stats = independent(kind, 3, within=within)
    found = match(stats, "permute")
    for name, labels in found.labels.items():
        whole = stats.correlation(name)
        for i in (1, 2):
            block = stats.between(whole, i).numpy()
            rows, cols = linear_sum_assignment(block, maximize=True)
            assert labels[i][cols].tolist() == rows.tolist()


@pytest.mark.parametrize("inside", [None, "they keep their order"])
def test_heads_of_a_group_are_matched_by_all_of_its_spaces(inside: str | None) -> None:
    """Against every order of the heads."""
    stats = independent(Attention, 2, inside=inside)
    labels = match(stats, "permute").labels
    heads, size = 3, 4

    def best(name: str, p: int, q: int) -> tuple[float, list[int]]:
        block = stats.between(stats.correlation(name), 1).numpy()
        part = block[p * size : (p + 1) * size, q * size : (q + 1) * size]
        if name == "keys" and inside:
            return part.trace(), list(range(size))
        rows, cols = linear_sum_assignment(part, maximize=True)
        return part[rows, cols].sum(), cols.tolist()

    totals = {
        order: sum(best(n, p, q)[0] for n in ("keys", "values") for p, q in enumerate(order))
        for order in itertools.permutations(range(heads))
    }
    order = max(totals, key=totals.get)  # type: ignore[arg-type]
    for name in ("keys", "values"):
        index = [q * size + j for p, q in enumerate(order) for j in best(name, p, q)[1]]
        assert labels[name][1][index].tolist() == list(range(heads * size))
    alone = [
        max(
            itertools.permutations(range(heads)),
            key=lambda o: sum(best(n, p, q)[0] for p, q in enumerate(o)),
        )
        for n in ("keys", "values")
    ]
    assert len({order, *alone}) > 1, "the spaces agree by themselves: another seed is needed"


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_threads_do_not_matter(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    stats = independent(kind, 3)
    for method in ("permute", "zip"):
        found = []
        for threads in ("1", "3"):
            monkeypatch.setenv("MERGEKERN_THREADS", threads)
            found.append(match(stats, method))
        for name, labels in found[0].labels.items():
            for a, b in zip(labels, found[1].labels[name], strict=True):
                assert_bytes_equal(a, b)
        assert found[0].correlations == found[1].correlations


# ---- zip ---------------------------------------------------------------------------------------


def partition(labels: list[Tensor]) -> set[frozenset[int]]:
    flat = torch.cat(labels).tolist()
    return {frozenset(i for i, g in enumerate(flat) if g == one) for one in set(flat)}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_zip_groups_are_those_of_zip_match(kind: type[nn.Module], count: int) -> None:
    """Of a whole space, or of each head that was matched before."""
    stats = independent(kind, count)
    found = match(stats, "zip", alpha=0.2, beta=0.5)
    heads = match(stats, "permute").labels
    for name, labels in found.labels.items():
        space = stats.spaces[name]
        whole = stats.correlation(name).float()
        size = space.size // space.heads
        expected = set()
        owner = torch.cat(heads[name]) // size if space.heads > 1 else torch.zeros(len(whole))
        for head in range(space.heads):
            members = (owner == head).nonzero()[:, 0]
            part = whole[members][:, members]
            groups = mk.zip_match(part, [size] * count, alpha=0.2, beta=0.5)
            for g in range(size):
                expected.add(frozenset(members[groups == g].tolist()))
        assert partition(labels) == expected


@zipit.needed
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.125), (1e-4, 0.075), (1.0, 1.0)])
@pytest.mark.parametrize("kind", [Mlp, Convs], ids=lambda k: k.__name__)
def test_zip_groups_are_those_of_zipit(kind: type[nn.Module], alpha: float, beta: float) -> None:
    theirs = zipit.match_tensors_zipit()
    stats = independent(kind)
    for host in (None, "zipit"):
        found = match(stats, "zip", alpha=alpha, beta=beta, host=host)
        for name, labels in found.labels.items():
            groups = zipit.labels(theirs, stats.correlation(name).float(), 2, alpha, beta)
            assert partition(labels) == partition(list(groups.chunk(2)))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_merged_features_stand_where_those_of_model_0_do(kind: type[nn.Module], count: int) -> None:
    stats = independent(kind, count)
    found = match(stats, "zip", alpha=0.5, beta=1.0)
    alone = 0
    for name, labels in found.labels.items():
        space = stats.spaces[name]
        size = space.size // space.heads
        assert all((x.dtype, tuple(x.shape)) == (torch.int64, (space.size,)) for x in labels)
        assert torch.cat(labels).unique().tolist() == list(range(space.size))
        first: dict[int, int] = {}
        for f, g in enumerate(labels[0].tolist()):
            first.setdefault(g, f)
            assert g // size == f // size
        assert all(g == f for g, f in first.items())
        alone += space.size - len(first)
        for mine in labels:  # the features of one head go to one head
            assert len(torch.unique(mine.view(space.heads, size) // size, dim=1)[0]) == 1
    assert alone, "no merged feature is without one of model 0: the test shows nothing"


def test_zip_keeps_the_order_where_it_must() -> None:
    stats = independent(Attention, 2, inside="they keep their order")
    found = match(stats, "zip")
    keys, values = (found.labels[name][1].view(3, 4) for name in ("keys", "values"))
    assert (keys.diff() == 1).all()
    assert (keys[:, 0] % 4 == 0).all()
    assert torch.equal(keys[:, 0] // 4, values[:, 0] // 4)
    assert found.labels["keys"][0].tolist() == list(range(12))


# ---- what is reported --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["identity", "permute", "zip"])
def test_correlations_are_of_the_merged_pairs(method: str) -> None:
    stats = independent(Mlp, 3)
    found = match(stats, method, beta=1.0)
    for name, labels in found.labels.items():
        size, c = stats.spaces[name].size, stats.correlation(name).numpy()
        pairs = [
            c[a, i * size + b]
            for i in (1, 2)
            for a in range(size)
            for b in range(size)
            if labels[0][a] == labels[i][b]
        ]
        stay = [c[a, i * size + a] for i in (1, 2) for a in range(size)]
        double = sum(size - len(set(x.tolist())) for x in labels)
        fit = found.correlations[name]
        assert np.isclose(fit.after, np.mean(pairs), rtol=1e-12, atol=0)
        assert np.isclose(fit.before, np.mean(stay), rtol=1e-12, atol=0)
        assert np.isclose(fit.merged_within, double / (3 * size), rtol=1e-12, atol=0)
        assert method == "identity" or fit.after > fit.before


def test_identity_leaves_everything_where_it_is() -> None:
    stats = independent(Attention, 3)
    for name, labels in match(stats, "identity").labels.items():
        for x in labels:
            assert_bytes_equal(x, torch.arange(stats.spaces[name].size))


# ---- refusals ----------------------------------------------------------------------------------


def test_arguments_that_are_refused() -> None:
    stats = independent(Mlp)
    with refused(OP, "method is unknown", "zip, permute, identity, weights"):
        match(stats, "merge")
    for name in ("alpha", "beta"):
        for value in (-0.1, 1.5):
            with refused("zip_match", f"{name} is out of range"):
                match(stats, "zip", **{name: value})
    with refused("zip_match", "host is unknown"):
        match(stats, "zip", host="zip it")
    with refused(OP, "models[1] is not the one that statistics are of"):
        match(stats, models=[seeded(Mlp, 0), seeded(Mlp, 5)])
    with refused(OP, "within"):
        match(independent(Mlp, within=False), "zip")
