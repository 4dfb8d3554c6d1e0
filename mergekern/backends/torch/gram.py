"""gram and gram_rows in plain torch."""

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


def gram_rows(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    rows, width = xs[0].shape
    out.zero_()
    step = max(1, chunks.CHUNK // max(1, width))
    for top in range(0, rows, step):
        for left in range(0, width, chunks.CHUNK):
            block = (slice(top, top + step), slice(left, left + chunks.CHUNK))
            vectors = torch.stack([x[block].to(torch.float64) for x in xs], 1)
            if base is not None:
                vectors -= base[block].to(torch.float64)[:, None]
            out[block[0]] += vectors @ vectors.mT
    upper = out.triu()
    out.copy_(upper + out.triu(1).mT)
