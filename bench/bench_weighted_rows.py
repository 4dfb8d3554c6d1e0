"""weighted_rows against one copy's bandwidth and plain torch: weights per row and per column."""

from __future__ import annotations

import pytest
import torch

import mergekern as mk
from mergekern.ops.weighted_rows import cost

from inputs import CHECKED, half_unit, models, relative_error

COLUMNS = 4096


@pytest.mark.parametrize("axis", [0, -1], ids=["rows", "columns"])
@pytest.mark.parametrize("n", [2, 3])
def bench_weighted_rows(row, dtype: torch.dtype, nbytes: int, n: int, axis: int) -> None:
    xs = [x.view(-1, COLUMNS) for x in models(n, nbytes, dtype)[1]]
    k = xs[0].shape[axis]
    weights = torch.linspace(0.1, 0.9, k * n, dtype=torch.float64).view(k, n)
    factors = [w[:, None] if axis == 0 else w for w in weights.unbind(1)]
    out = torch.zeros_like(xs[0])

    def call() -> torch.Tensor:
        return mk.weighted_rows(xs, weights, axis=axis, out=out)

    rows = CHECKED // COLUMNS
    terms = torch.stack([(x.double() * f)[:rows] for x, f in zip(xs, factors)])
    exact = terms.sum(0)
    unit = 2.0**-24 if dtype.itemsize == 2 else 2.0**-52  # float64 sums here and in `exact`
    bound = (n + 1) * unit * terms.abs().sum(0) + half_unit(exact, dtype)
    narrow = [f.to(dtype) for f in factors]
    row(
        call,
        cost=cost(n, xs[0].numel(), dtype.itemsize, k=k),
        error=relative_error(call()[:rows], exact, bound),
        torch=lambda: sum(f * x for x, f in zip(xs, narrow)),
    )
