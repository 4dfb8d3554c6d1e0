"""What the methods on task vectors in plain torch share: the task vectors of one chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from .chunked import Part, Step, elementwise
from .registry import Inputs, Parameter

SCALE = Parameter("scale", float, "tensor", 1.0, "factor on the merged task vector")


def checked(op: str, base: Any, xs: Sequence[Any]) -> list[Tensor]:
    """The xs and, last if there is one, the base: checked, of one dtype."""
    if not len(xs):
        raise ArgumentError.of(op, "xs is empty", "no tensor", "at least one")
    return check.tensors(op, [*xs, *([] if base is None else [base])])


def deltas(part: Part, n: int, base: bool) -> Iterator[Tensor]:
    """The n task vectors of a chunk, one at a time."""
    origin = part(n) if base else None
    for i in range(n):
        yield part(i) if origin is None else part(i) - origin


def total_of(part: Part, n: int, base: bool) -> Tensor:
    """Their sum, in input order."""
    each = deltas(part, n, base)
    total = next(each).clone()
    for d in each:
        total += d
    return total


def merge_chunks(op: str, inputs: Inputs, step: Step, acc: torch.dtype | None = None) -> Tensor:
    """step(part) of every chunk of the models and, last, their base."""
    return elementwise(
        op,
        checked(op, inputs.base, inputs.xs),
        step,
        out_dtype=inputs.out_dtype,
        backend=inputs.backend,
        acc=acc,
    )
