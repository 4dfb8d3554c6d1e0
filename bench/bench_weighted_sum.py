"""weighted_sum against one copy's bandwidth, plain torch and mergekit's linear."""

from __future__ import annotations

import pytest
import torch

import mergekern as mk
from mergekern.ops.weighted_sum import cost

from inputs import CHECKED, half_unit, models, relative_error
from peers import mergekit


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def bench_weighted_sum(row, dtype: torch.dtype, nbytes: int, n: int) -> None:
    _, xs = models(n, nbytes, dtype)
    weights = [0.3, 0.7, 0.1, 0.2, 0.5, 0.4, 0.6, 0.8][:n]
    out = torch.zeros_like(xs[0])

    def call() -> torch.Tensor:
        return mk.weighted_sum(xs, weights, out=out)

    terms = torch.stack([x[:CHECKED].double() * w for x, w in zip(xs, weights)])
    exact = terms.sum(0)
    unit = 2.0**-24 if dtype.itemsize == 2 else 2.0**-52  # float64 sums here and in `exact`
    bound = (n + 1) * unit * terms.abs().sum(0) + half_unit(exact, dtype)
    row(
        call,
        cost=cost(n, xs[0].numel(), dtype.itemsize),
        error=relative_error(call()[:CHECKED], exact, bound),
        torch=lambda: sum(w * x for x, w in zip(xs, weights)),
        peers=mergekit("linear", xs, weight=weights, normalize=False),
    )


def bench_weighted_sum_fresh(row, nbytes: int) -> None:
    """With a new result each time: the price of first touching its pages."""
    _, xs = models(2, nbytes, torch.bfloat16)
    row(
        lambda: mk.weighted_sum(xs, [0.5, 0.5]),
        cost=cost(2, xs[0].numel(), 2),
        error=0.0,
        torch=lambda: 0.5 * xs[0] + 0.5 * xs[1],
        peers=mergekit("linear", xs, weight=[0.5, 0.5], normalize=False),
    )
