"""Methods with host="peft" against peft.utils.merge_utils: the bits of the merged task vector.

Over a base of zeros, which turns a -0 of PEFT's into +0. What PEFT keeps of equal magnitudes at
the cut of a trim is open; these data have none.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk

from accuracy import assert_bits_equal
from required import peer

peft = peer("peft.utils.merge_utils", "peft")

WEIGHTS = ([0.7], [0.7, -0.4], [0.7, -0.4, 0.55], [0.31, 0.9, -0.4, 1.3])
SHAPES: dict[str, tuple[int, ...]] = {
    "random": (40, 131),
    "zeros": (20, 31),
    "nan": (40, 31),
    "infinite": (40, 31),
    "one": (1,),
    "scalar": (),
    "depthwise": (37, 1, 3, 3),
    "empty": (0, 7),
}
METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def task_vectors(kind: str, n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    xs = [torch.randn(SHAPES[kind], generator=g) for _ in range(n)]
    for x in xs:
        if kind == "zeros":  # every sixth, so that no cut lies among them
            x.view(-1)[::6] = 0
        if kind == "nan":
            x.view(-1)[torch.randperm(x.numel(), generator=g)[:1]] = math.nan
        if kind == "infinite":
            x.view(-1)[torch.randperm(x.numel(), generator=g)[:2]] = torch.tensor(
                [math.inf, -math.inf]
            )
    return xs


def theirs(xs: list[Tensor], method: str, weights: list[float], given: dict[str, Any]) -> Tensor:
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that a density of 1 prunes nothing
        merged = getattr(peft, method)(xs, torch.tensor(weights), *given.values())
    return torch.zeros(xs[0].shape) + merged


def ours(xs: list[Tensor], method: str, weights: list[float], given: dict[str, Any]) -> Tensor:
    torch.manual_seed(5)
    base = torch.zeros(xs[0].shape)
    return mk.merge_tensors(xs, method, base=base, host="peft", weight=weights, **given)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_bits(method: str, kind: str) -> None:
    densities = (None,) if method == "task_arithmetic" else (0.0, 0.3, 0.5, 0.8, 1.0)
    for n, density in itertools.product(range(1, 5), densities):
        xs, weights = task_vectors(kind, n), WEIGHTS[n - 1]
        if density == 0 and method.startswith("dare"):
            continue
        given = {} if density is None else {"density": density}
        assert_bits_equal(ours(xs, method, weights, given), theirs(xs, method, weights, given))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_a_density_of_0_gives_the_base(method: str) -> None:
    """PEFT divides by it."""
    xs, given = task_vectors("random", 2), {"density": 0.0}
    assert theirs(xs, method, [1.0, 1.0], given).isnan().all()
    assert_bits_equal(ours(xs, method, [1.0, 1.0], given), torch.zeros(SHAPES["random"]))
