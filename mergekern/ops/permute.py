"""permute: gather along any axes in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ._cost import Cost


def permute(
    x: Tensor, index: Mapping[int, Any], *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """out[i, j, ...] = x[index[0][i], index[1][j], ...]; axes without an index stay.

    Shapes: x any, any strides, any dtype; index maps an axis (negative ones count from the end)
    to a 1-d sequence of positions on it. A permutation reorders, a shorter or longer one selects
    or repeats. The result is contiguous unless `out` is given; `out` may not overlap x.
    Result: a copy of the bits of x, NaN payloads included.
    Cost: one read and one write, all axes at once.
    Raises: ArgumentError for axes that are not there or given twice, for positions out of range
    (negative ones are).
    Source: `apply_permutation` of Git Re-Basin (Ainsworth et al., 2209.04836).

    >>> import torch
    >>> permute(torch.arange(6).view(2, 3), {0: [1, 0], 1: [2, 0, 1]})
    tensor([[5, 3, 4],
            [2, 0, 1]])
    """
    op = "permute"
    x = check.tensor(op, x, "x", floating=False)
    chosen_index: dict[int, Tensor] = {}
    shape = list(x.shape)
    if not isinstance(index, Mapping):
        got, expected = type(index).__name__, "a mapping of axes to positions"
        raise ArgumentError.of(op, "index is no mapping", got, expected)
    for axis, positions in index.items():
        if not hasattr(axis, "__index__") or not -x.ndim <= axis < x.ndim:
            raise ArgumentError.of(op, "no such axis", axis, f"one of the {x.ndim} axes of x")
        d = axis % x.ndim
        if d in chosen_index:
            raise ArgumentError.of(op, "an axis is given twice", d, "each axis once")
        chosen_index[d] = _positions(op, d, positions, x)
        shape[d] = len(chosen_index[d])
    out = check.output(op, out, x, shape=shape, inputs=[x], in_place=False)
    backend = dispatch.select(backend, op, x.device, x.dtype)
    if out.is_contiguous():
        dispatch.load(backend, op)(out, x, chosen_index)
    else:
        dense = torch.empty(shape, dtype=x.dtype, device=x.device)
        dispatch.load(backend, op)(dense, x, chosen_index)
        out.copy_(dense)
    return out


def _positions(op: str, axis: int, positions: Any, x: Tensor) -> Tensor:
    """A contiguous int64 index on the device of x, checked against the axis."""
    i = check.integers(op, f"index of axis {axis}", positions).to(x.device)
    if i.numel():
        low, high = (int(v) for v in torch.aminmax(i))
        if low < 0 or high >= x.shape[axis]:
            what, limit = f"index of axis {axis} is out of range", x.shape[axis] - 1
            raise ArgumentError.of(op, what, f"{low} to {high}", f"0 to {limit}")
    return i


def cost(out_numel: int, itemsize: int) -> Cost:
    """One read and one write of what the result holds."""
    return Cost(2 * out_numel * itemsize, 0)
