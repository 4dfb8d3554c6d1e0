"""gram in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunks


def gram(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    flat = chunks.flat(xs if base is None else [base, *xs])
    base, xs = (None, flat) if base is None else (flat[0], flat[1:])
    out.zero_()
    for begin, end, _ in chunks.rows(xs):
        rows = torch.stack([chunks.part(x, begin, end, torch.float64) for x in xs])
        if base is not None:
            rows -= chunks.part(base, begin, end, torch.float64)
        out += rows @ rows.T
    out.copy_(out.triu() + out.triu(1).T)
