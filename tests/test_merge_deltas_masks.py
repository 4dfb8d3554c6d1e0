"""merge_deltas: random masks, the same wherever they are drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import Bernoulli, reference

from accuracy import assert_bits_equal
from cases import CHUNK, values
from recipes import specified

OP = "merge_deltas"


# ---- random masks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: Any, key: Any, words: Any) -> None:
    """The vectors of Random123 for philox4x32-10."""
    assert reference.philox(counter, key) == words


def mask_of(rule: Bernoulli, n: int, backend: str, device: str) -> Tensor:
    ones = torch.ones(n, device=device)
    got = mk.merge_deltas(None, [ones], [1.0], keep=[rule], backend=backend).cpu()
    assert bool(((got == 0) | (got == 1)).all())
    return got.bool()


def reference_mask(rule: Bernoulli, begin: int, end: int) -> Tensor:
    return torch.tensor([reference._draw(rule.key, e) < rule.limit for e in range(begin, end)])


@pytest.mark.parametrize("threads", ["1", "3"])
def test_masks_are_those_of_the_reference_wherever_they_lie(
    threads: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_THREADS", threads)
    rule = Bernoulli(0.37, seed=3, name="blocks.0.attn.qkv", model=1)
    mask = mask_of(rule, 2 * CHUNK + 100, backend, device)
    for begin in (0, 500, 1017, CHUNK - 21, 2 * CHUNK - 50, 2 * CHUNK + 50):
        assert torch.equal(mask[begin : begin + 50], reference_mask(rule, begin, begin + 50))


def test_a_mask_does_not_depend_on_length_or_shape(backend: str, device: str) -> None:
    rule = Bernoulli(0.5, seed=1)
    long = mask_of(rule, 4000, backend, device)
    for n in (1, 7, 8, 9, 511, 513, 1025):
        assert torch.equal(mask_of(rule, n, backend, device), long[:n])
    x = torch.ones(40, 100, device=device).T
    got = mk.merge_deltas(None, [x], [1.0], keep=[rule], backend=backend).cpu()
    assert torch.equal(got.bool().reshape(-1), long)


@pytest.mark.parametrize("first", [1, 6, 7, 8, 1017, 2**35 + 3])
def test_a_part_of_a_mask(first: int, backend: str, device: str) -> None:
    """A part may begin anywhere in the eight draws of one Philox block."""
    rule = Bernoulli(0.6, seed=5, name="w").from_index(first)
    got = mask_of(rule, 700, backend, device)
    for begin in (0, 650):
        at = first + begin
        assert torch.equal(got[begin : begin + 50], reference_mask(rule, at, at + 50))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_share_of_kept_elements(density: float, backend: str, device: str) -> None:
    """Within six standard deviations of the binomial (a chance of 2e-9, and it is fixed)."""
    n = 200_000
    rule = Bernoulli(density, seed=11)
    p = rule.limit / 65536
    kept = int(mask_of(rule, n, backend, device).sum())
    assert abs(kept - n * p) <= 6 * math.sqrt(n * p * (1 - p))


def test_masks_are_independent(backend: str, device: str) -> None:
    """Of other models, names and seeds, and of the neighbouring elements."""
    n = 100_000
    first = mask_of(Bernoulli(0.5, 1, "w", 0), n, backend, device)
    others = {
        "model": mask_of(Bernoulli(0.5, 1, "w", 1), n, backend, device),
        "name": mask_of(Bernoulli(0.5, 1, "v", 0), n, backend, device),
        "seed": mask_of(Bernoulli(0.5, 2, "w", 0), n, backend, device),
    }
    others |= {f"shift {s}": first.roll(s) for s in (1, 2, 4, 7, 8, 512, 1024)}
    for what, other in others.items():
        both = int((first & other).sum())
        assert abs(both - n / 4) <= 6 * math.sqrt(n * 3 / 16), what
    assert torch.equal(first, mask_of(Bernoulli(0.5, 1, "w", 0), n, backend, device))


def test_densities_are_nested(backend: str, device: str) -> None:
    """The draw does not depend on the density: what 0.2 keeps, 0.6 keeps."""
    sparse = mask_of(Bernoulli(0.2, 5), 10_000, backend, device)
    dense = mask_of(Bernoulli(0.6, 5), 10_000, backend, device)
    assert bool((sparse <= dense).all())


def test_limits_of_the_density(backend: str, device: str) -> None:
    assert not mask_of(Bernoulli(0.0), 5000, backend, device).any()
    assert mask_of(Bernoulli(1.0), 5000, backend, device).all()
    x = values((5000,), torch.float32).to(device)
    for rescale in (None, "density", "l1"):
        got = mk.merge_deltas(
            x, [x + 1], [1.0], keep=[Bernoulli(0.0)], rescale=rescale, backend=backend
        )
        assert_bits_equal(got, x.cpu())
        got = mk.merge_deltas(
            x, [x + 1], [1.0], keep=[Bernoulli(1.0)], rescale=rescale, backend=backend
        )
        assert_bits_equal(got, specified(x, [x + 1], [1.0]))


def test_keys_do_not_change_between_versions() -> None:
    """A seed in a user's configuration means the same mask for ever."""
    assert Bernoulli(0.5).key == (0x3519BBD3, 0x81051703)
    assert Bernoulli(0.9, 7, "layer.weight", 2).key == (0x8A9EB407, 0x7123315A)


def test_limit_is_the_nearest_and_never_0() -> None:
    assert Bernoulli(1 / 65536).limit == 1
    assert Bernoulli(1e-300).limit == 1
    assert Bernoulli(0.5 + 0.4 / 65536).limit == 32768
    assert Bernoulli(1 - 1e-9).limit == 65536
