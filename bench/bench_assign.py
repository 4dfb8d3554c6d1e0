"""assign: scipy's solver alone, and side by side."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import mergekern as mk
from mergekern.ops._cost import Cost

pytestmark = pytest.mark.alignment


def scores(n: int, count: int, timed: bool, noise: float = 0.7) -> list[Tensor]:
    """Correlations of features that have a noisy counterpart each."""
    n = n if timed else 8
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        f = torch.randn(n, 64, generator=g)
        f_ = f[torch.randperm(n, generator=g)] + noise * torch.randn(n, 64, generator=g)
        found.append(torch.nn.functional.normalize(f) @ torch.nn.functional.normalize(f_).T)
    return found


def theirs(xs: list[Tensor]) -> list[Tensor]:
    return [torch.from_numpy(linear_sum_assignment(x.numpy(), maximize=True)[1]) for x in xs]


def read(xs: list[Tensor]) -> Cost:
    """One read: how often scipy looks at the scores depends on them."""
    return Cost(sum(x.nbytes for x in xs), 0)


@pytest.mark.parametrize(
    ("n", "count", "noise"),
    [(1024, 1, 0.7), (768, 12, 0.7), (3072, 2, 20.0)],
    ids=["one", "layers", "noise"],
)
def bench_assign(row, timed: bool, n: int, count: int, noise: float) -> None:
    xs = scores(n, count, timed, noise)
    same = all(map(torch.equal, mk.assign(xs), theirs(xs)))
    row(
        lambda: mk.assign(xs),
        cost=read(xs),
        error=0.0 if same else float("inf"),
        peers={"scipy": (lambda: theirs(xs), 1.0)},
    )


def bench_assign_heads(row, timed: bool) -> None:
    """12 layers of 12 heads of 64 features."""
    xs = scores(768, 12, timed)
    heads = 12 if timed else 4
    whole = torch.eye(len(xs[0]))
    row(
        lambda: mk.assign_heads(xs, heads),
        cost=read(xs),
        error=0.0
        if torch.equal(mk.assign_heads(whole, heads), torch.arange(len(whole)))
        else float("inf"),
    )
