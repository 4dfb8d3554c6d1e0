"""coefficient_gradients in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunks


def coefficient_gradients(out: Tensor, grad: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    grad, *xs = chunks.flat([grad, *xs] if base is None else [grad, *xs, base])
    base = None if base is None else xs.pop()
    out.zero_()
    for begin, end, _ in chunks.rows(xs):
        rows = torch.stack([chunks.part(x, begin, end, torch.float64) for x in xs])
        if base is not None:
            rows -= chunks.part(base, begin, end, torch.float64)
        out += rows @ chunks.part(grad, begin, end, torch.float64)
