"""zip_models: the parts in a row, and nothing else."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekern.align import zip_models as module
from mergekern.align.discover import discover_spaces
from mergekern.align.matching.match import match
from mergekern.align.merging.apply import apply
from mergekern.align.merging.partial import PartialZip
from mergekern.align.merging.repair import repair
from mergekern.align.statistics.collect import collect_statistics
from mergekern.align.zip_models import zip_models

from accuracy import assert_bytes_equal
from align.networks import CASES, assert_same_output, cast, planted, run, unrelated
from refusal import refused


def batches(name: str, count: int = 8) -> list[Any]:
    return [cast(CASES[name].inputs(seed), torch.float64) for seed in range(10, 10 + count)]


def assert_same_state(got: nn.Module, expected: dict[str, Tensor]) -> None:
    assert got.state_dict().keys() == expected.keys()
    for name, x in got.state_dict().items():
        assert_bytes_equal(x, expected[name])


@pytest.mark.parametrize("until", [None, "first"])
@pytest.mark.parametrize("method", ["zip", "permute", "identity"])
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_it_is_its_parts(name: str, method: str, until: str | None) -> None:
    models, spaces, _ = unrelated(CASES[name], 2)
    before = [copy.deepcopy(m.state_dict()) for m in models]
    xs = batches(name)
    until = until and next(iter(spaces.movable))
    parameters = {"alpha": 0.1, "beta": 0.5} if method == "zip" else {}
    weights = [0.25, 0.75]
    found = zip_models(
        models, xs, method=method, until=until, spaces=spaces, weights=weights, **parameters
    )
    stats = collect_statistics(models, xs, spaces)
    matched = match(stats, method, **parameters)
    expected = apply(models, matched, until=until, weights=weights)
    repair(expected, xs, match=matched, statistics=stats, weights=weights)
    assert_same_state(found, expected.state_dict())
    for model, state in zip(models, before, strict=True):
        assert_same_state(model, state)


def test_outputs_that_are_free_are_merged_too() -> None:
    """An encoder whose output may come in another order: that of the first model."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6)).double()
    spaces = discover_spaces(model, torch.zeros(2, 5).double(), outputs="free")
    other = copy.deepcopy(model)
    other.load_state_dict(spaces.permuted(spaces.random(3), model.state_dict()))
    xs = [torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]
    found = zip_models([model, other], xs, method="permute", outputs="free", repair="none")
    assert_same_state(found, model.state_dict())
    fixed = zip_models([model, other], xs, method="permute", repair="none")
    assert not torch.equal(fixed[2].weight, model[2].weight)


@pytest.mark.parametrize("method", ["permute", "weights"])
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_reorderings_of_a_model_are_found(name: str, method: str) -> None:
    """With labels in the batches, an example that is found in them, and heads of each model."""
    models, _, inputs = planted(CASES[name], 3)
    pairs = [[x, torch.zeros(len(x))] for x in batches(name)]
    merged = zip_models(models, lambda: iter(pairs), method=method, repair="none")
    assert_same_state(merged, models[0].state_dict())
    until = {"mlp": "a", "residual": "conv1"}[name]
    partial = zip_models(models, pairs, method=method, until=until, repair="none")
    assert isinstance(partial, PartialZip)
    for model, output in zip(models, run(partial, inputs), strict=True):
        assert_same_output(output, run(model, inputs))


def test_named_inputs_and_heads() -> None:
    """Attention by keyword; padding does not count, nor do entries that the model does not take."""
    models, _, inputs = planted(CASES["attention"], 2)
    given = [x | {"labels": torch.zeros(5)} for x in batches("attention", 40)]
    partial = zip_models(
        models,
        given,
        method="permute",
        until="fc1",
        example_inputs=inputs,
        mask="mask",
        repair="none",
    )
    for model, output in zip(models, run(partial, inputs), strict=True):
        assert_same_output(output, run(model, inputs))


def test_weights_read_no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "collect_statistics", functools.partial(pytest.fail, "collected"))
    models, spaces, _ = unrelated(CASES["residual"], 2)
    zip_models(models, batches("residual"), method="weights", spaces=spaces)


def test_refusals() -> None:
    models, spaces, _ = unrelated(CASES["mlp"], 2)
    xs = batches("mlp")
    with refused("zip_models", "repair is unknown", "'maybe'", "auto, none"):
        zip_models(models, xs, repair="maybe")
    with refused("zip_models", "parameter is unknown", "'gamma'", "alpha, "):
        zip_models(models, xs, spaces=spaces, gamma=1)
    with refused("zip_models", "read once only", "generator"):
        zip_models(models, (x for x in xs), spaces=spaces)
    with refused("zip_models", "no batches"):
        zip_models(models, [])
    with refused("zip_models", "method is unknown"):
        zip_models(models, xs, spaces=spaces, method="guess")
    with refused("zip_models", "until is no space that moves"):
        zip_models(models, xs, spaces=spaces, until="nowhere")
