"""Two real encoders zipped, wholly and in part, beside what ZipIt's own code gives."""

from __future__ import annotations

import functools

import pytest
import torch
from test_cifar5 import RESET, assert_near

import mergekern as mk

from accuracy import assert_bytes_equal
from cifar import (
    Cifar10,
    Images,
    ResNet20,
    accuracy,
    cosines,
    network,
    reset_statistics,
    weights,
)

# Of the README's rows, which `python -m bench.table_zip` measures, and the space that ends the
# trunk: stages end where the next one's begins.
PAPER = {"alpha": 1e-4, "beta": 0.075}
PUBLISHED: dict[str, tuple[str, dict[str, float], str | None, tuple[float, float, float]]] = {
    "permute": ("permute", {}, None, (33.9, 67.2, 79.6)),
    "zip 20/20": ("zip", {"alpha": 0.3, "beta": 0.125}, None, (35.4, 70.4, 79.3)),
    "zip 13/20": ("zip", PAPER, "layer2.0.conv2", (59.1, 82.2, 84.3)),
}


@functools.cache
def encoders() -> list[ResNet20]:
    return [network(weights(f"cifar5/{name}.safetensors"), "fc") for name in "ab"]


@functools.cache
def images(split: str) -> Images:
    cifar = Cifar10()
    chosen = cifar.test_indices() if split == "test" else cifar.statistics_indices()
    return cifar.normalized(chosen)


@functools.cache
def statistics() -> mk.Statistics:
    spaces = mk.discover_spaces(encoders()[0], torch.zeros(2, 3, 32, 32))
    return mk.collect_statistics(encoders(), images("statistics").x.split(500), spaces)


@pytest.mark.parametrize("row", PUBLISHED)
def test_merges_score_as_published(row: str) -> None:
    method, parameters, until, published = PUBLISHED[row]
    found = mk.match(statistics(), method, **parameters)
    model = mk.apply(encoders(), found, until=until)
    mk.repair(model, images("statistics").x.split(500), match=found)
    test, codes = images("test"), weights("cifar5/codes.safetensors")["codes"]
    with torch.inference_mode():
        cosine = torch.cat([cosines(model(x), codes) for x in test.x.split(100)])
    assert_near(accuracy(cosine, test.label), published, RESET)


def test_the_average_is_that_of_state_dicts() -> None:
    """Weights and statistics to the bit, by ways that share no code."""
    few = Images(images("statistics").x[:1000], images("statistics").label[:1000])
    spaces = mk.discover_spaces(encoders()[0], torch.zeros(2, 3, 32, 32))
    labels = {name: [torch.arange(s.size)] * 2 for name, s in spaces.movable.items()}
    model = mk.apply(encoders(), mk.Match(spaces, labels, "identity"))
    states = [encoder.state_dict() for encoder in encoders()]
    expected = network(mk.merge_state_dicts(states, "linear", weight=0.5), "fc")
    for key, x in expected.state_dict().items():
        assert_bytes_equal(model.state_dict()[key], x)
    mk.repair(model, [(x, None) for x in few.x.split(500)])
    reset_statistics(expected, few)
    for key, x in expected.state_dict().items():
        assert_bytes_equal(model.state_dict()[key], x)
