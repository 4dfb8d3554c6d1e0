"""repair: statistics of BatchNorm as torch counts them, and features that vary as they did."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekern.align.discover import discover_spaces
from mergekern.align.matching.match import Match
from mergekern.align.matching.match import match as match_spaces
from mergekern.align.merging.apply import apply
from mergekern.align.merging.repair import repair
from mergekern.align.statistics.collect import collect_statistics

from accuracy import assert_bytes_equal, assert_within
from align.networks import CASES, Case, normal, planted, random_labels, unrelated
from refusal import refused


def batches(case: Case, count: int = 3) -> list[Any]:
    found = [case.inputs(seed).double() for seed in range(10, 10 + count)]
    found[-1] = found[-1][:4]  # the last one of a DataLoader
    return found


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert_bytes_equal(got[name], x)


# ---- BatchNorm -------------------------------------------------------------------------------


class Dropped(nn.Module):
    """BatchNorm of either kind, one without statistics, one used twice; dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=0.3)
        self.twice = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.batch = nn.BatchNorm2d(6, track_running_stats=False)
        self.head, self.last = nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm(self.conv(x))))
        x = self.twice(self.batch(x) + torch.relu(self.twice(x)))
        return self.last(self.head(x.mean((2, 3))))


DROPPED = Case(Dropped, normal(7, 3, 4, 4))


@torch.no_grad()
def counted(model: nn.Module, xs: list[Tensor]) -> nn.Module:
    """A copy whose BatchNorms went through the batches in training mode, with plain averages."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    for x in xs:
        model(x)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", [DROPPED, CASES["residual"]])
def test_statistics_are_those_that_torch_counts(case: Case, training: bool) -> None:
    model, xs = case.model(0).double(), batches(case)
    model.train(training)
    for key, x in model.state_dict().items():
        if "tracked" in key:
            x.fill_(5)
    expected = counted(model, xs).state_dict()
    momenta = [getattr(m, "momentum", 0) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    repair(model, xs)
    assert_same_state(model.state_dict(), expected)
    assert [getattr(m, "momentum", 0) for m in model.modules()] == momenta
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("until", ["conv", "stem", "conv1"])
def test_statistics_of_trunk_and_heads(until: str) -> None:
    case = DROPPED if until == "conv" else CASES["residual"]
    models, match, _ = planted(case, 2)
    partial = apply(models, match, until=until)
    before = [state_of(m) for m in models]
    xs = batches(case)
    repair(partial, [(x, "label") for x in xs])
    expected = [counted(m, xs).state_dict() for m in models]
    seen = 0
    for name, x in partial.named_buffers():
        side, _, own = name.partition(".")
        if "running" in name:
            i, own = (0, own) if side == "trunk" else (int(own[0]), own[2:])
            y = expected[i][own]
            # Means and variances of what sums in another order make.
            assert_within(x, y, 2**-26 * y.abs().max())
            seen += 1
    assert seen == sum("running" in name for name in partial.state_dict()) > 4
    for model, state in zip(models, before, strict=True):
        assert_same_state(model.state_dict(), state)


@pytest.mark.parametrize("partial", [False, True])
def test_a_pass_that_does_not_end_changes_nothing(partial: bool) -> None:
    models, match, _ = planted(CASES["residual"], 2)
    merged = apply(models, match, until="conv1" if partial else None).train()
    before = state_of(merged)
    momenta = [getattr(m, "momentum", 0) for m in merged.modules()]

    def broken() -> Iterator[Tensor]:
        yield from batches(CASES["residual"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(merged, broken)
    assert_same_state(merged.state_dict(), before)
    assert all(m.training for m in merged.modules())
    assert [getattr(m, "momentum", 0) for m in merged.modules()] == momenta
    with refused("repair", "no batches"):
        repair(merged, [])
    assert_same_state(merged.state_dict(), before)


# ---- REPAIR ----------------------------------------------------------------------------------


def layers(model: nn.Module, xs: list[Tensor]) -> dict[str, Tensor]:
    """All outputs of the linear layers, as rows of float64."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows = found.setdefault(name, [])
            hooks.append(module.register_forward_hook(lambda m, x, y, rows=rows: rows.append(y)))
    with torch.no_grad():
        for x in xs:
            model(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(each).double() for name, each in found.items()}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.std(0, correction=0)


def zipped(n: int, xs: list[Tensor], dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    models, spaces, _ = unrelated(CASES["mlp"], n)
    labels = {s: random_labels(spaces[s].size, n, k) for k, s in enumerate(spaces.movable)}
    match = Match(spaces, labels, "zip")
    return models, match, collect_statistics(models, xs, spaces)


def targets(
    models: list[nn.Module], match: Match, xs: list[Tensor], layer: str, w: list[float]
) -> tuple[Tensor, Tensor]:
    """Averages of means and of deviations over the features that become one, one by one."""
    each = [moments(layers(model, xs)[layer]) for model in models]
    size = match.spaces[layer].size
    found = []
    for g in range(size):
        members = [
            (w[i], each[i][0][f], each[i][1][f])
            for i, labels in enumerate(match.labels[layer])
            for f in range(size)
            if labels[f] == g
        ]
        total = sum(weight for weight, _, _ in members)
        found.append([sum(m[0] * m[k] for m in members) / total for k in (1, 2)])
    mean, deviation = torch.tensor(found).double().T
    return mean, deviation


@pytest.mark.parametrize("weights", [None, [2.0, 1.0, 1.0]])
@pytest.mark.parametrize("n", [2, 3])
def test_features_vary_as_those_they_are_made_of(n: int, weights: list[float] | None) -> None:
    xs = [normal(64, 5)(1).double()]
    models, match, stats = zipped(n, xs)
    given = None if weights is None else weights[:n]
    merged = apply(models, match, weights=given)
    raw, raw_state = layers(merged, xs), state_of(merged)
    repair(merged, xs, match=match, statistics=stats, weights=given)
    for layer in ("a", "b"):
        mean, deviation = moments(layers(merged, xs)[layer])
        wanted = targets(models, match, xs, layer, given or [1.0] * n)
        # Rounding alone, of sums that are some hundred units at most: far below 2**-26.
        bound = 2**-26 * (wanted[0].abs() + wanted[1])
        assert_within(mean, wanted[0], bound)
        assert_within(deviation, wanted[1], bound)
        assert ((moments(raw[layer])[1] - wanted[1]).abs() > 1e6 * bound).any()
    for name in ("c.weight", "c.bias"):
        assert_bytes_equal(merged.state_dict()[name], raw_state[name])


def test_several_batches_are_one() -> None:
    """The first layer sees the data itself: its moments are those of all rows."""
    xs = [normal(size, 5)(size).double() * size for size in (9, 4, 17)]
    models, match, stats = zipped(2, xs)
    merged = apply(models, match)
    repair(merged, iter([[x, 3] for x in xs]), match=match, statistics=stats)
    mean, deviation = moments(layers(merged, xs)["a"])
    wanted = targets(models, match, xs, "a", [1.0, 1.0])
    bound = 2**-26 * (wanted[0].abs() + wanted[1])
    assert_within(mean, wanted[0], bound)
    assert_within(deviation, wanted[1], bound)
    # The second saw batches normalised one by one, and is near.
    _, deviation = moments(layers(merged, xs)["b"])
    _, wanted_b = targets(models, match, xs, "b", [1.0, 1.0])
    assert_within(deviation, wanted_b, 0.5 * wanted_b)


def test_layers_without_bias_stay() -> None:
    xs = [normal(64, 5)(1)]
    models = [nn.Sequential(*(nn.Linear(*s, bias=False) for s in ((5, 4), (4, 2)))) for _ in "ab"]
    stats = collect_statistics(models, xs, discover_spaces(models[0], xs[0]))
    match = match_spaces(stats, "zip")
    merged = apply(models, match)
    before = state_of(merged)
    repair(merged, xs, match=match, statistics=stats)
    assert not stats.outputs
    for name, x in merged.state_dict().items():
        assert_bytes_equal(x, before[name])


def test_models_that_are_one_need_no_repair() -> None:
    xs = [normal(64, 5)(1).double()]
    models, match, _ = planted(CASES["mlp"], 3)
    stats = collect_statistics(models, xs, match.spaces)
    merged = apply(models, match)
    before = state_of(merged)
    repair(merged, xs, match=match, statistics=stats)
    for name, x in merged.state_dict().items():
        # s / v and t - m s / v, of moments that differ by the rounding of reordered sums.
        assert_within(x, before[name], 2**-26 * before[name].abs().max())


@pytest.mark.parametrize("until", ["a", "b"])
def test_heads_vary_as_their_models(until: str) -> None:
    xs = [normal(64, 5)(1).double()]
    models, match, stats = zipped(2, xs)
    partial = apply(models, match, until=until)
    repair(partial, xs, match=match, statistics=stats)

    def linear(tree: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.linear(x, tree.weight, tree.bias).detach()

    y = linear(partial.trunk.a, xs[0])
    check = [("a", y, targets(models, match, xs, "a", [1.0, 1.0]))]
    if until == "b":
        y = linear(partial.trunk.b, y.relu())
        check.append(("b", y, targets(models, match, xs, "b", [1.0, 1.0])))
    else:
        for i, model in enumerate(models):
            own = linear(partial.heads[i].b, y.relu()[:, match.labels["a"][i]])
            check.append((f"head {i}", own, moments(layers(model, xs)["b"])))
    for name, rows, wanted in check:
        print(name)
        for got, expected in zip(moments(rows), wanted, strict=True):
            assert_within(got, expected, 2**-26 * (wanted[0].abs() + wanted[1]))


def test_what_does_not_vary_is_shifted_only() -> None:
    xs = [normal(64, 5)(1).double()]
    models, spaces, _ = unrelated(CASES["mlp"], 2)
    with torch.no_grad():
        for i, model in enumerate(models):
            model.a.weight[2] = 0
            model.a.bias[2] = i
    labels = {name: [torch.arange(s.size)] * 2 for name, s in spaces.movable.items()}
    match = Match(spaces, labels, "identity")
    merged = apply(models, match)
    repair(merged, xs, match=match, statistics=collect_statistics(models, xs, spaces))
    assert_bytes_equal(merged.a.weight[2].detach(), torch.zeros(5).double())
    assert_bytes_equal(merged.a.bias[2].detach(), torch.tensor(0.5).double())
    assert all(x.isfinite().all() for x in merged.state_dict().values())


class Layers(nn.Module):
    """One without bias, one that is called twice, one with its weight tied to another."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(5, 8, bias=False)
        self.twice, self.tied, self.same = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.same.weight
        self.last, self.out = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.plain(x))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = torch.tanh(self.same(torch.tanh(self.tied(x))))
        return self.out(torch.tanh(self.last(x)))


def test_layers_that_cannot_be_scaled_stay() -> None:
    case = Case(Layers, normal(64, 5))
    models, spaces, x = unrelated(case, 2)
    match = Match(spaces, {n: [torch.arange(s.size)] * 2 for n, s in spaces.movable.items()}, "")
    merged = apply(models, match)
    before = state_of(merged)
    repair(merged, [x], match=match, statistics=collect_statistics(models, [x], spaces))
    changed = {k for k, y in merged.state_dict().items() if not torch.equal(y, before[k])}
    assert changed == {"last.weight", "last.bias"}


def test_features_of_no_weight_stay() -> None:
    """A merged feature of models that do not count has nothing to vary as."""
    xs = [normal(64, 5)(1).double()]
    models, match, stats = zipped(2, xs)
    labels = torch.cat(match.labels["a"][:1])
    unused = [g for g in range(8) if g not in labels]
    assert unused
    merged = apply(models, match, weights=[1, 0])
    repair(merged, xs, match=match, statistics=stats, weights=[1, 0])
    assert all(x.isfinite().all() for x in merged.state_dict().values())
    for g in unused:
        assert_bytes_equal(merged.a.bias[g].detach(), torch.zeros(()).double())


def test_convolutions() -> None:
    """Channels come first there; moments are those of all positions."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))

    models, spaces, x = unrelated(Case(network, normal(7, 3, 5, 5)), 2)
    (name,) = spaces.movable
    match = Match(spaces, {name: random_labels(4, 2, 1)}, "zip")
    merged = apply(models, match)
    repair(merged, [x], match=match, statistics=collect_statistics(models, [x], spaces))
    with torch.no_grad():
        got, *each = (m[0](x).movedim(1, -1).flatten(0, -2) for m in (merged, *models))
    labels = torch.cat(match.labels[name])
    for part, own in zip(moments(got), zip(*map(moments, each), strict=True), strict=True):
        for g in range(4):
            wanted = torch.cat(own)[labels == g].mean()
            assert_within(part[g], wanted, 2**-26 * wanted.abs())


def test_refusals() -> None:
    xs = [normal(64, 5)(1).double()]
    models, match, stats = zipped(2, xs)
    merged = apply(models, match)
    before = state_of(merged)
    with refused("repair", "without BatchNorm", "match and statistics"):
        repair(merged, xs)
    with refused("repair", "no batches"):
        repair(merged, [], match=match, statistics=stats)
    with refused("repair", "'a'", "not finite"):
        repair(merged, [xs[0] * float("inf")], match=match, statistics=stats)
    with refused("repair", "module is none", "str"):
        repair("model", xs)
    partial = apply(models, match, until="a")
    with torch.no_grad():
        partial.heads[1].b.bias[0] = float("nan")  # behind a trunk that is finite
    state = state_of(partial)
    with refused("repair", "'b'", "not finite"):
        repair(partial, xs, match=match, statistics=stats)
    assert_same_state(partial.state_dict(), state)
    assert_same_state(merged.state_dict(), before)
