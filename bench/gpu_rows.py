"""Rows of `python -m bench.gpu`: what they are, and on which tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekern.ops._cost import Cost

from inputs import models

Call = Callable[[], Any]
WIDTH = 4096  # of the matrices


class Row(NamedTuple):
    """call(backend) is timed; check(result) gives an error over its bound, at most 1.

    plain: the same in plain torch, as tools do it. share: of the limit, aimed at. peer: times
    plain, aimed at. launches: at most.
    """

    op: str
    name: str
    call: Callable[[str], Any]
    cost: Cost
    check: Callable[[Any], float]
    plain: Call | None = None
    share: float | None = None
    wanted: float | None = None
    launches: int | None = None


class Place(NamedTuple):
    device: torch.device
    small: bool

    @property
    def nbytes(self) -> int:
        """Of one tensor: eight of them are far beyond any cache."""
        return 1 << 16 if self.small else 1 << 29

    def models(self, n: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        base, xs = models(n, self.nbytes, dtype)
        return base.to(self.device), [x.to(self.device) for x in xs]


def same_bits(expected: Any) -> Callable[[Any], float]:
    """The error of elementwise ops: none."""

    def check(got: Any) -> float:
        pairs = (
            [(got[k], expected[k]) for k in expected]
            if isinstance(expected, Mapping)
            else [(got, expected)]
        )
        equal = all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
        return 0.0 if equal else float("inf")

    return check
