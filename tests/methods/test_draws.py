"""Which methods draw from torch's generator: they merge in one go, by one process."""

from __future__ import annotations

import pytest
import torch

from mergekern.methods import REGISTRY

from methods.test_slices import ARGUMENTS, Merge, count_of, models

HOSTS = [(name, host) for name, method in REGISTRY.items() for host in (None, *method.parity)]


@pytest.mark.parametrize(("name", "host"), HOSTS)
def test_a_method_says_whether_it_draws(name: str, host: str | None) -> None:
    drawn = False
    for given in ARGUMENTS[name]:
        # More elements than arcee_fusion looks at all of, for mergekit.
        xs, base = models(count_of(name), (1001, 1000), torch.float32, "plain")
        before = torch.random.get_rng_state()
        Merge(name, given, xs, base, backend="auto", host=host).merged()
        drawn |= not torch.equal(before, torch.random.get_rng_state())
    assert drawn == (host in REGISTRY[name].draws)
