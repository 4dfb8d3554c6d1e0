"""Real networks whose features were put into another order, aligned to what they were.

All heads and features are reordered at random, in every space that moves. By their activations and
by their weights alone every order is found, and the merged weights are the original's to the bit.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import mergekern as mk

from accuracy import assert_bytes_equal
from cifar import Cifar10, Images, network, outputs, weights

# As the networks were published: mean and standard deviation of their training images.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@functools.cache
def images() -> Tensor:
    cifar = Cifar10()
    return cifar.images(cifar.statistics_indices()[:500], MEAN, STD).x


@functools.cache
def planted(name: str) -> tuple[nn.Module, nn.Module, mk.Spaces, dict[str, Tensor]]:
    model = network(weights(f"resnet_cifar10/{name}.safetensors"), "linear")
    spaces = mk.discover_spaces(model, images()[:2])
    orders = spaces.random(seed=5)
    other = copy.deepcopy(model)
    other.load_state_dict(spaces.permuted(orders, model.state_dict()))
    return model, other, spaces, orders


@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_spaces_of_a_padded_shortcut(name: str) -> None:
    """16 channels go through all stages; those that stages 2 and 3 add are spaces of their own."""
    model, other, spaces, _ = planted(name)
    sizes = sorted(s.size for s in spaces.movable.values() if len(s.places) > 6)
    assert sizes == [16, 16, 32]
    assert spaces.verify(model, images()[:20]).exact
    scale = outputs(model, some()).abs().max()
    gap = (outputs(model, some()) - outputs(other, some())).abs().max()
    assert gap <= 2.0**-18 * scale  # reordered sums of float32, through 20 or 32 layers


@functools.cache
def some() -> Images:
    cifar = Cifar10()
    return cifar.images(cifar.test_indices()[:50], MEAN, STD)


@functools.cache
def statistics(name: str) -> mk.Statistics:
    model, other, spaces, _ = planted(name)
    return mk.collect_statistics([model, other], images().split(250), spaces)


@pytest.mark.parametrize("blend", [1.0, 0.5])
@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_orders_are_found_by_activations(name: str, blend: float) -> None:
    """Channels that are 0 for all images are alike: only their weights tell them apart."""
    model, other, _, orders = planted(name)
    stats = statistics(name)
    found = mk.match(stats, "permute", models=[model, other], blend=blend)
    for space, order in orders.items():
        moved = found.labels[space][1]
        wrong = torch.nonzero(moved != order)[:, 0]
        if blend == 1:
            assert len(wrong) <= stats.dead(space)[1]
            assert (stats.correlation(space).diagonal()[len(order) :][wrong] == 0).all()
        else:
            assert not len(wrong), space
    if blend < 1:
        _same_weights(model, mk.apply([model, other], found))


@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_orders_are_found_by_weights(name: str) -> None:
    model, other, spaces, orders = planted(name)
    found = mk.match(spaces, "weights", models=[model, other])
    for space, order in orders.items():
        assert found.labels[space][1].tolist() == order.tolist(), space
    _same_weights(model, mk.apply([model, other], found))


def _same_weights(model: nn.Module, merged: nn.Module) -> None:
    for key, x in model.state_dict().items():
        assert_bytes_equal(merged.state_dict()[key], x)
