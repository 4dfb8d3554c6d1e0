"""Matching of weights: every step the best one, and no step that loses."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import mergekern as mk
from mergekern.align.matching import weights as implementation
from mergekern.align.matching.match import Match, match
from mergekern.align.matching.weights import STARTS
from mergekern.align.spaces import Space, Spaces
from mergekern.align.tracing.program import state_of

from accuracy import assert_bytes_equal
from align.nets import Attention, Convs, Mlp, attention_spaces, convs_spaces, mlp_spaces, seeded
from refusal import refused

OP = "match"
KINDS: dict[type[nn.Module], Callable[..., Spaces]] = {
    Mlp: mlp_spaces,
    Convs: convs_spaces,
    Attention: attention_spaces,
}


class Square(nn.Module):
    """A residual stream that one layer reads and writes: its weights move on both axes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.head = nn.Linear(3, 7), nn.Linear(7, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.fc(x))


class Tied(nn.Module):
    """Tokens are embedded and told by one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.tell = nn.Embedding(9, 5), nn.Linear(5, 5), nn.Linear(5, 9, False)
        self.tell.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tell(torch.relu(self.fc(self.embed(x))) + self.embed(x))


# ---- the objective, by its definition ----------------------------------------------------------


def objective(spaces: Spaces, a: nn.Module, b: nn.Module, labels: dict[str, Tensor]) -> float:
    """Over the parameters that a movable space touches, each once, in float64."""
    moved = spaces.permuted({k: x.argsort() for k, x in labels.items()}, state_of(b))
    touched = {p.name for s in spaces.movable.values() for p in s.places}
    aliases = {n for t in touched for n in spaces.architecture.aliases[t]}
    return math.fsum(
        float((x.detach().double() * moved[name].double()).sum())
        for name, x in a.named_parameters()
        if name in aliases
    )


def of(found: Match, i: int = 1) -> dict[str, Tensor]:
    return {name: labels[i] for name, labels in found.labels.items()}


def scale(a: nn.Module, b: nn.Module) -> float:
    """What an objective can be at most, and what its rounding is measured by."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return math.fsum(
        float(x.detach().double().norm() * y.detach().double().norm()) for x, y in pairs
    )


def neighbours_of(spaces: Spaces, chosen: list[Space], labels: dict[str, Tensor]) -> list[dict]:
    """Other labels of the spaces of a group: all orders of heads, the best ones within, at random
    places also others."""
    g = torch.Generator().manual_seed(0)
    found = []
    for heads in itertools.permutations(range(chosen[0].heads)):
        for _ in range(20):
            changed = dict(labels)
            for s in chosen:
                size = s.size // s.heads
                inner = [
                    torch.randperm(size, generator=g) if s.inside is None else torch.arange(size)
                    for _ in heads
                ]
                changed[s.name] = torch.cat([h * size + i for h, i in zip(heads, inner)])
            found.append(changed)
    for s in chosen:  # exchanges of two features of one head
        size = s.size // s.heads
        for h, (i, j) in itertools.product(range(s.heads), itertools.combinations(range(size), 2)):
            mine = labels[s.name].clone()
            p, q = h * size + i, h * size + j
            mine[p], mine[q] = labels[s.name][q], labels[s.name][p]
            found.append({**labels, s.name: mine})
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_no_change_of_one_space_gains(kind: type[nn.Module], seed: int) -> None:
    spaces = KINDS[kind]()
    a, b = (seeded(kind, s) for s in (2 * seed, 2 * seed + 1))
    found = match(spaces, "weights", models=[a, b], seed=seed)
    mine = of(found)
    got = objective(spaces, a, b, mine)
    allowed = 1e-12 * scale(a, b)
    (told,) = found.objectives
    identity = {name: torch.arange(s.size) for name, s in spaces.movable.items()}
    assert abs(told.after - got) <= allowed
    assert abs(told.before - objective(spaces, a, b, identity)) <= allowed
    assert told.after > told.before
    # Scores are float32 products of at most 256 terms.
    slack = 2 * 12 * 256 * 2.0**-24 * scale(a, b)
    for group in spaces.groups().values():
        for other in neighbours_of(spaces, group, mine):
            assert objective(spaces, a, b, other) <= got + slack


def test_one_space_alone_is_the_best_assignment() -> None:
    a, b = (seeded(Mlp, s) for s in (0, 1))
    spaces = mlp_spaces()
    one = Spaces([spaces["one"]], spaces.program)
    labels = match(one, "weights", models=[a, b]).labels["one"][1]
    sides = [
        torch.cat([m.fc1.weight, m.fc1.bias[:, None], m.fc2.weight.T], 1).detach().double().numpy()
        for m in (a, b)
    ]
    rows, cols = linear_sum_assignment(sides[0] @ sides[1].T, maximize=True)
    assert labels[cols].tolist() == rows.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_reordered_models_are_put_back(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """Where the descent finds the optimum, which is known here: the model itself."""
    spaces = KINDS[kind]()
    models = [seeded(kind, 0).to(dtype) for _ in range(3)]
    orders = [spaces.random(seed) for seed in (1, 2)]
    for model, order in zip(models[1:], orders, strict=True):
        model.load_state_dict(spaces.permuted(order, state_of(model)))
    best = []
    for seed in range(8):
        found = match(spaces, "weights", models=models, seed=seed)
        best.append([o.after for o in found.objectives])
        if np.isclose(best[-1], max(max(row) for row in best), rtol=1e-6, atol=0).all():
            kept = found
    for name, labels in kept.labels.items():
        assert_bytes_equal(labels[0], torch.arange(spaces[name].size))
        for mine, order in zip(labels[1:], orders, strict=True):
            assert_bytes_equal(mine, order[name])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", [Square, Tied], ids=lambda k: k.__name__)
def test_a_space_on_both_axes_never_loses(kind: type[nn.Module], seed: int) -> None:
    """A step there takes the other axis as it was, so it may lose; then it is not made."""
    example = torch.zeros(2, 3) if kind is Square else torch.zeros(2, 4, dtype=torch.int64)
    a, b = (seeded(kind, 10 * seed + s) for s in (0, 1))
    spaces = mk.discover_spaces(a, example)
    assert spaces.movable
    found = match(spaces, "weights", models=[a, b], seed=seed)
    (told,) = found.objectives
    assert told.after >= told.before
    assert abs(told.after - objective(spaces, a, b, of(found))) <= 1e-12 * scale(a, b)


def test_some_steps_would_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is needed: without it the objective of `Square` falls for one of these seeds."""
    monkeypatch.setattr(implementation, "_GAIN", -math.inf)
    lost = 0
    spaces = mk.discover_spaces(seeded(Square, 0), torch.zeros(2, 3))
    for seed in range(12):
        a, b = (seeded(Square, 2 * seed + s) for s in (0, 1))
        pair = implementation._Pair(spaces, a, b)
        for _ in range(6):
            before = pair.objective()
            pair.step(spaces.groups())
            lost += pair.objective() < before - 1e-9
    assert lost


# ---- waves and skips ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_side_by_side_is_as_one_after_the_other(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces, models = KINDS[kind](), [seeded(kind, s) for s in range(3)]
    for seed in range(3):
        together = match(spaces, "weights", models=models, seed=seed)
        with monkeypatch.context() as patch:
            patch.setattr(implementation, "_WAVE", 0)
            alone = match(spaces, "weights", models=models, seed=seed)
        assert together.objectives == alone.objectives
        for name, labels in together.labels.items():
            for x, y in zip(labels, alone.labels[name], strict=True):
                assert_bytes_equal(x, y)


def test_what_bears_on_nothing_that_moved_is_not_scored_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored: list[str] = []
    score = implementation._Pair._score

    def spy(pair: implementation._Pair, space: Space, known: set[str] | None = None) -> Tensor:
        scored.append(space.name)
        return score(pair, space, known)

    monkeypatch.setattr(implementation._Pair, "_score", spy)
    models, spaces = [seeded(Mlp, s) for s in (0, 1)], mlp_spaces()
    alone = Spaces([spaces["one"]], spaces.program)
    (told,) = match(alone, "weights", models=models, start="identity").objectives
    assert (scored, told.sweeps) == (["one"], 1)
    scored.clear()
    (told,) = match(spaces, "weights", models=models, start="identity").objectives
    assert len(scored) < told.sweeps * len(spaces)


def test_the_seed_is_the_order() -> None:
    spaces, models = attention_spaces(), [seeded(Attention, s) for s in range(2)]
    found = [match(spaces, "weights", models=models, seed=s).objectives for s in (0, 0, *range(9))]
    assert found[0] == found[1]
    assert len(set(found)) > 1


class Stream(nn.Module):
    """A residual stream that many layers read and write, and few inputs anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 64, bias=False), nn.Linear(64, 2, bias=False)
        self.up = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(12))
        self.down = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(12))
        for x in self.parameters():
            nn.init.normal_(x, 0, 0.05)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(x)


def test_an_anchored_start_finds_orders_that_the_identity_misses() -> None:
    """Every layer is reordered, so features have little in common with themselves at first."""
    model = seeded(Stream, 0)
    spaces = mk.discover_spaces(model, torch.randn(2, 4))
    orders = spaces.random(1)
    other = copy.deepcopy(model)
    other.load_state_dict(spaces.permuted(orders, model.state_dict()))
    found = {s: match(spaces, "weights", models=[model, other], start=s) for s in STARTS}
    for name, order in orders.items():
        for start in ("best", "anchored"):
            assert found[start].labels[name][1].tolist() == order.tolist()
    after = {start: m.objectives[0].after for start, m in found.items()}
    assert 4 * after["identity"] < after["anchored"] == after["best"]


def test_the_best_start_is_the_better_of_both() -> None:
    spaces, better = attention_spaces(), set()
    for seed in range(8):
        models = [seeded(Attention, s) for s in (seed, seed + 50)]
        after = {
            s: match(spaces, "weights", models=models, start=s).objectives[0].after for s in STARTS
        }
        assert after["best"] == max(after["identity"], after["anchored"])
        better.add(after["identity"] > after["anchored"])
    assert better == {True, False}


# ---- refusals ----------------------------------------------------------------------------------


def test_arguments_that_are_refused() -> None:
    spaces, model = mlp_spaces(), seeded(Mlp, 0)
    with refused(OP, "no weights to match", "got none"):
        match(spaces, "weights")
    with refused(OP, "no weights to match", "got 1"):
        match(spaces, "weights", models=[model])
    with refused(OP, "models[1] is of another architecture"):
        match(spaces, "weights", models=[model, seeded(Convs, 0)])
    for method in ("zip", "permute", "identity"):
        with refused(OP, f"{method} needs statistics"):
            match(spaces, method, models=[model, model])
