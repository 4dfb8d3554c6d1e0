"""permute: rows, columns and both of a square-ish weight."""

from __future__ import annotations

import pytest
import torch

import mergekern as mk
from mergekern.ops.permute import cost


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
    )
