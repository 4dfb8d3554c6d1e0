"""Methods in two passes: dot products of the inputs, then a sum with coefficients made of them.

The first pass is `gram` (float64), the second adds base + sum_i c_i (x_i - base), in this order: as
sum_i c_i x_i + (1 - sum_i c_i) base its error would grow with the base rather than with the
differences (on fine-tuned float32 weights by @@). A NaN or infinity in a vector leaves its angles
undefined and makes the whole of its result NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops.gram import gram
from ..ops.merge_deltas import merge_deltas
from ..ops.weighted_sum import weighted_sum
from .registry import Inputs

Coefficients = Callable[[Tensor], Tensor]  # float64 [..., N, N] -> [..., N]


def whole(inputs: Inputs, coefficients: Coefficients) -> Tensor:
    """b + sum_i c_i (x_i - b), or sum_i c_i x_i, c from the dot products of whole tensors."""
    dots = gram(inputs.xs, base=inputs.base, backend=inputs.backend).cpu()
    if not dots.isfinite().all():
        return torch.full_like(inputs.xs[0], math.nan, dtype=inputs.out_dtype)
    weights = coefficients(dots).tolist()
    dtype, backend = inputs.out_dtype, inputs.backend
    if inputs.base is None:
        return weighted_sum(inputs.xs, weights, out_dtype=dtype, backend=backend)
    return merge_deltas(inputs.base, inputs.xs, weights, out_dtype=dtype, backend=backend)


_BLOCK = 1 << 20  # elements worked on at a time where weights differ: bounds what is allocated


def vectors(inputs: Inputs, dim: int, coefficients: Coefficients) -> Tensor:
    """The same for each vector along `dim`, the first or the last axis."""
    first = inputs.xs[0]
    if first.ndim < 2:
        return whole(inputs, coefficients)
    out = torch.empty(first.shape, dtype=inputs.out_dtype, device=first.device)
    tensors = inputs.xs if inputs.base is None else [*inputs.xs, inputs.base]
    n = len(inputs.xs)
    along = dim % first.ndim
    split = max((d for d in range(first.ndim) if d != along), key=lambda d: first.shape[d])
    # Each vector has a matrix of dot products, which outweighs it where it is short.
    size = first.numel() // max(1, first.shape[split]) * max(1, n * n // max(1, first.shape[along]))
    for parts in _blocks([*tensors, out], split, size):
        base = parts[n] if inputs.base is not None else None
        dots = gram(parts[:n], base=base, dim=dim, backend=inputs.backend).reshape(-1, n, n)
        weights = coefficients(dots)
        weights[~dots.isfinite().all(-1).all(-1)] = math.nan
        _weigh(inputs, parts[:n], base, weights, dim, parts[-1])
    return out


def _blocks(tensors: list[Tensor], dim: int, size: int) -> Iterator[list[Tensor]]:
    """The tensors cut along `dim`, where one step has `size` elements."""
    step = max(1, _BLOCK // max(1, size))
    for begin in range(0, tensors[0].shape[dim], step):
        length = min(step, tensors[0].shape[dim] - begin)
        yield [x.narrow(dim, begin, length) for x in tensors]


def _weigh(
    inputs: Inputs,
    xs: list[Tensor],
    base: Tensor | None,
    weights: Tensor,
    dim: int,
    out: Tensor,
) -> None:
    axis = 0 if dim == -1 else -1
    if base is None:
        weighted_rows(xs, weights, axis=axis, out=out, backend=inputs.backend)
        return
    acc = torch.float64 if out.dtype == torch.float64 else torch.float32
    acc = torch.promote_types(acc, base.dtype)
    size = out.numel() // max(1, out.shape[dim])
    for part in _blocks([*xs, base, out], dim, size):
        origin = part[-2].to(acc)
        deltas = [x.to(acc) - origin for x in part[:-2]]
        sum_ = weighted_rows(deltas, weights, axis=axis, out=deltas[0], backend=inputs.backend)
        weighted_sum([origin, sum_], [1, 1], out=part[-1], backend=inputs.backend)


def weighted_rows(
    xs: Sequence[Tensor], weights: Tensor, *, axis: int, out: Tensor, backend: str
) -> Tensor:
    """Stand-in until ops.weighted_rows is merged: the same result from torch."""
    acc = torch.promote_types(xs[0].dtype, torch.float32)
    k, shape = len(weights), out.shape
    total = torch.zeros((), dtype=acc, device=out.device)
    for x, w in zip(xs, weights.to(out.device, acc).T, strict=True):
        wide = x.to(acc)
        rows = wide.reshape(k, -1) * w[:, None] if axis == 0 else wide.reshape(-1, k) * w
        total = total + rows.view(shape)
    return out.copy_(total)


def alone(inputs: Inputs) -> Tensor:
    """The one model as it is, but for its type."""
    x = inputs.xs[0]
    if x.dtype == inputs.out_dtype:
        return x.clone()
    return weighted_sum([x], [1], out_dtype=inputs.out_dtype, backend=inputs.backend)
