"""permute: rows, columns and both of a square-ish weight, and all tensors of a ViT-B."""

from __future__ import annotations

import pytest
import torch

import mergekern as mk
from mergekern.ops.permute import cost

import vit

pytestmark = pytest.mark.alignment


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=["rows", "columns", "both"])
def bench_permute(row, dtype: torch.dtype, nbytes: int, axes: tuple[int, ...]) -> None:
    width = 4096 if nbytes > 1 << 24 else 64
    g = torch.Generator().manual_seed(0)
    x = torch.randn(nbytes // dtype.itemsize, generator=g).to(dtype).view(-1, width)
    index = {a: torch.randperm(x.shape[a], generator=g) for a in axes}
    out = torch.zeros_like(x)

    def by_torch() -> torch.Tensor:
        y = x
        for a, i in index.items():
            y = y.index_select(a, i)
        return y

    mk.permute(x, index, out=out)
    row(
        lambda: mk.permute(x, index, out=out),
        cost=cost(x.numel(), dtype.itemsize),
        error=0.0 if torch.equal(out, by_torch()) else float("inf"),
        torch=by_torch,
        allowed=1 / 0.75,
    )


@pytest.mark.parametrize("given", [True, False], ids=["out", "new"])
def bench_permute_all(row, dtype: torch.dtype, timed: bool, given: bool) -> None:
    of, sizes = vit.weights(small=not timed)
    order = vit.permutations(sizes)
    xs = vit.tensors(of, dtype, 0)
    indices = {name: vit.index_of(w, order) for name, w in of.items()}
    out = {name: torch.zeros_like(x) for name, x in xs.items()} if given else None

    def by_torch() -> dict[str, torch.Tensor]:
        moved = dict(xs)
        for name, index in indices.items():
            for axis, i in index.items():
                moved[name] = moved[name].index_select(axis, i)
        return moved

    def call() -> dict[str, torch.Tensor]:
        return mk.permute_all(xs, indices, out=out)

    got, expected = call(), by_torch()
    row(
        call,
        cost=cost(sum(x.numel() for x in xs.values()), dtype.itemsize),
        error=0.0 if all(torch.equal(got[k], expected[k]) for k in xs) else float("inf"),
        torch=by_torch,
        allowed=1 / 0.6,
    )
