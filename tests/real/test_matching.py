"""match on two real encoders, beside the port of Git Re-Basin."""

from __future__ import annotations

import torch

import mergekern as mk
from mergekern.align.matching.match import match

import rebasin
from cifar import network, weights


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
