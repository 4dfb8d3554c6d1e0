"""covariance in plain torch: all in float64, which no setting of TF32 or of precision touches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import chunks

_BLOCK = 512  # rows of the products that one matrix product fills


def covariance(
    products: Tensor,
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    xs: list[list[Tensor]],
    rows: Tensor | None,
    zero: bool,
) -> bool:
    width = sum(x.shape[-1] for side in xs for x in side)
    if not zero and not all(part.isfinite().all() for x in xs for part in _chunks(x, rows, width)):
        return False
    for batch in zip(*(_chunks(x, rows, width) for x in xs), strict=True):
        n = len(batch[0])
        share = n / (count + n)
        centred, deltas = [], []
        for part, mean in zip(batch, means, strict=True):
            wide = part.to(torch.float64)
            wide = torch.where(wide.isfinite(), wide, 0) if zero else wide
            middle = wide[0] + (wide - wide[0]).mean(0)  # a constant is its own mean
            centred.append(wide - middle)
            deltas.append(middle - mean)
            mean += deltas[-1] * share
        x, y = centred[0], centred[-1]
        for i in range(0, len(products), _BLOCK):
            j = 0 if squares else i
            block = products[i : i + _BLOCK, j:]
            block.addmm_(x[:, i : i + _BLOCK].T, y[:, j:])
            block.addr_(deltas[0][i : i + _BLOCK] * (count * share), deltas[-1][j:])
        for total, v, delta in zip(squares, centred, deltas):
            total += v.square().sum(0) + delta.square() * (count * share)
        count += n
    return True


def _chunks(side: list[Tensor], rows: Tensor | None, width: int) -> Iterator[Tensor]:
    """Chunks of rows of a side; `width` is that of all tensors that are read side by side."""
    flat = [x.reshape(-1, x.shape[-1]) for x in side]
    step = max(1, 4 * chunks.CHUNK // width)
    for begin in range(0, len(flat[0]) if rows is None else len(rows), step):
        some = slice(begin, begin + step)
        yield torch.cat([x[some if rows is None else rows[some]] for x in flat], -1)
