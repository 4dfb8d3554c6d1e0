"""match on two real encoders, beside ZipIt's code and the port of Git Re-Basin."""

from __future__ import annotations

import torch
from test_cifar5 import RESET, Accuracy, accuracy, cosines, normalized

import mergekern as mk
from mergekern.align.collect import collect_statistics
from mergekern.align.match import match
from mergekern.align.program import state_of

import rebasin
from cifar import Cifar10, ResNet20, network, reset_statistics, weights


def test_permuted_encoders_average_as_published() -> None:
    """What ZipIt's own code gives: statistics of 5,000 images, one permutation of each space."""
    cifar = Cifar10()
    few, images = (normalized(cifar, c) for c in (cifar.statistics_indices(), cifar.test_indices()))
    codes = weights("cifar5/codes.safetensors")["codes"]
    a, b = (network(weights(f"cifar5/{name}.safetensors"), "fc") for name in "ab")
    spaces = mk.discover_spaces(a, torch.zeros(2, 3, 32, 32))
    stats = collect_statistics([a, b], [(x, None) for x in few.x.split(500)], spaces, within=False)
    found = match(stats, "permute", models=[a, b])
    permutations = {name: labels[1].argsort() for name, labels in found.labels.items()}
    states = [state_of(a), spaces.permuted(permutations, state_of(b))]
    model = ResNet20("fc")
    model.load_state_dict(mk.merge_state_dicts(states, "linear", weight=0.5))
    reset_statistics(model, few)
    got: Accuracy = accuracy(cosines(model.state_dict(), images, codes), images.label)
    got.assert_near((33.9, 67.2, 79.6), RESET)


def test_two_real_encoders_as_by_the_port() -> None:
    """The same permutations in the same order, and the objective that these have."""
    states = [weights(f"cifar5/{name}.safetensors") for name in "ab"]
    models = [network(state, "fc") for state in states]
    spaces = mk.discover_spaces(models[0], torch.zeros(2, 3, 32, 32))
    axes = {name: [None] * x.ndim for name, x in models[0].named_parameters()}
    for s in spaces.movable.values():
        for place in s.places:
            if place.name in axes:
                assert torch.equal(place.positions, torch.arange(s.size)[:, None])
                axes[place.name][place.axis] = s.name
    port = rebasin.port()
    by_space = {s: [(n, axes[n].index(s)) for n in axes if s in axes[n]] for s in spaces.movable}
    ps = port.PermutationSpec(by_space, {n: tuple(a) for n, a in axes.items()})
    params = [{n: x.detach() for n, x in m.named_parameters()} for m in models]
    torch.manual_seed(7)
    theirs = port.weight_matching(ps, *params)
    found = match(spaces, "weights", models=models, seed=7, start="identity")
    for name, index in theirs.items():
        assert found.labels[name][1].argsort().tolist() == index.long().tolist()
    (told,) = found.objectives
    assert told.after > told.before
    assert told.sweeps > 1
