"""Tensors of one shape, walked together in pieces that bound every temporary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

SIZE = 1 << 15  # elements: stays in cache, and torch starts no threads for so few


class Piece(NamedTuple):
    """Elements [first, first + size) in C order: of flat views, or rows along axis 0."""

    begin: int
    end: int
    first: int
    size: int
    flat: bool

    def of(self, x: Tensor) -> Tensor:
        """These elements as one axis; a view where `x` is contiguous."""
        if self.flat:
            return x.reshape(-1)[self.begin : self.end]
        return x[self.begin : self.end].reshape(-1)


def pieces(xs: Sequence[Tensor], limit: int = SIZE) -> list[Piece]:
    """What covers tensors of one shape; rows where one of them is not contiguous."""
    total = xs[0].numel()
    flat = all(x.is_contiguous() for x in xs)
    width = 1 if flat or not total else total // xs[0].shape[0]
    step = max(1, limit // width)
    starts = range(0, total // width, step) if total else ()
    ends = [min(i + step, total // width) for i in starts]
    return [
        Piece(i, e, i * width, (e - i) * width, flat) for i, e in zip(starts, ends, strict=True)
    ]
