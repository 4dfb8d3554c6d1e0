"""permute in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def permute(outs: list[Tensor], xs: list[Tensor], indices: list[dict[int, Tensor]]) -> None:
    for out, x, index in zip(outs, xs, indices, strict=True):
        _permute(out, x, index)


def _permute(out: Tensor, x: Tensor, index: dict[int, Tensor]) -> None:
    grid = []
    for d, size in enumerate(x.shape):
        i = index[d] if d in index else torch.arange(size, device=x.device)
        grid.append(i.view([-1 if d == e else 1 for e in range(x.ndim)]))
    out.copy_(x[tuple(grid)] if grid else x)
