"""Where a tensor may be cut, so that it need not be in memory whole.

A tensor is computed slice by slice whatever the memory: sums over it are taken in the same order,
so the result never depends on how much of it is held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from .registry import Inputs

SLICE = 1 << 22  # elements, of a row if it has more


def slices(shape: Sequence[int], cut: str | None, size: int | None = None) -> list[tuple[int, int]]:
    """Ranges of flat indices that make up the tensor, in order; one of an empty one.

    cut "elements": `SLICE` each. "rows": as many rows of the first axis as fit in `SLICE`, at
    least one. None: all at once. size: in place of `SLICE`.

    >>> slices([5 * SLICE // 2], "elements") == [
    ...     (0, SLICE), (SLICE, 2 * SLICE), (2 * SLICE, 5 * SLICE // 2)
    ... ]
    True
    >>> [end - begin for begin, end in slices([3, SLICE // 2 + 1], "rows")] == 3 * [SLICE // 2 + 1]
    True
    """
    total = math.prod(shape)
    size = SLICE if size is None else size
    step = total
    if cut == "elements":
        step = size
    elif cut == "rows" and shape and total:
        row = total // shape[0]
        step = max(1, size // row) * row
    if total <= step:
        return [(0, total)]
    return [(begin, min(begin + step, total)) for begin in range(0, total, step)]


def parts(inputs: Inputs, cut: str | None) -> Iterator[Inputs]:
    """The slices of tensors that are in memory whole; `inputs` itself where they are one."""
    shape = tuple(inputs.xs[0].shape)
    if math.prod(shape) <= SLICE:
        yield inputs
        return
    ranges = slices(shape, cut)
    if len(ranges) == 1:
        yield inputs
        return
    for begin, end in ranges:
        xs = [part(x, begin, end, cut) for x in inputs.xs]
        base = None if inputs.base is None else part(inputs.base, begin, end, cut)
        yield replace(inputs, xs=xs, base=base, offset=begin, shape=shape, shared={})


def part(x: Tensor, begin: int, end: int, cut: str | None) -> Tensor:
    """The elements [begin, end): flat, or as rows. A view, but of flat ones with other strides."""
    if cut == "rows":
        row = x.numel() // x.shape[0]
        return x[begin // row : end // row]
    if x.is_contiguous():
        return x.view(-1)[begin:end]
    x = x.squeeze()
    row = x.numel() // x.shape[0]
    first = begin // row
    return x[first : -(-end // row)].reshape(-1)[begin - first * row : end - first * row]


def of(out: Tensor, inputs: Inputs, cut: str | None) -> Tensor:
    """Where in the merged tensor the slice `inputs` goes."""
    return part(out, inputs.offset, inputs.offset + inputs.xs[0].numel(), cut)
