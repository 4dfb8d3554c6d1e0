"""gram: the dot products that SLERP needs."""

from __future__ import annotations

import torch

import mergekern as mk
from mergekern.ops.gram import cost

from inputs import models


def bench_gram(row, dtype: torch.dtype, nbytes: int) -> None:
    _, xs = models(2, nbytes, dtype)
    got = mk.gram(xs)
    exact = torch.tensor(
        [[float((x.double() * y.double()).sum()) for y in xs] for x in xs], dtype=torch.float64
    )
    norms = exact.diagonal().sqrt()
    bound = xs[0].numel() * 2.0**-53 * norms[:, None] * norms[None, :]
    row(
        lambda: mk.gram(xs),
        cost=cost(2, xs[0].numel(), dtype.itemsize),
        error=float(((got - exact).abs() / bound).max()),
        torch=lambda: [torch.dot(x.float(), y.float()) for x in xs for y in xs],
    )
