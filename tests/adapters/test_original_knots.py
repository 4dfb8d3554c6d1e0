"""host="knots" against KnOTS' code on the same adapters: a mask that differed in a place would show
a thousand times above the rounding of its float32."""

from __future__ import annotations

import pytest
import torch

import mergekern as mk
from mergekern.adapters.adapter import Adapter

from accuracy import assert_within
from adapters import knots
from adapters.random_adapters import adapter, dense, factors

VIT_B = {"q": (768, 768)}


def compare(adapters: list[Adapter], topk: float, scale: float) -> None:
    matrices = [{n: dense(f).float() for n, f in a.modules.items()} for a in adapters]
    expected = knots.merged(matrices, topk, scale)
    got = mk.merge_adapters(adapters, "knots_ties", density=topk / 100, lambda_=scale, host="knots")
    for name, x in expected.items():
        limit = torch.full_like(x, 2e-5 * float(x.abs().max())).double()
        assert_within(dense(got.modules[name]), x.double(), limit)


@knots.needed
@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("topk", [5, 20, 99])
def test_small(topk: float, count: int) -> None:
    compare([adapter(i, 2 + i) for i in range(count)], topk, 0.6)


@knots.needed
def test_a_layer_of_vit_b() -> None:
    """Eight adapters of rank 16, as released, as small as trained ones: of larger ones the rounding
    of the dense float32 matrices passes the cut, and the original counts it among the parts."""
    adapters = [
        Adapter(
            {
                name: factors(rows, (columns,), 16, 10 * task + i, scale=1e-3)
                for i, (name, (rows, columns)) in enumerate(VIT_B.items())
            }
        )
        for task in range(8)
    ]
    compare(adapters, 20, 0.6)
