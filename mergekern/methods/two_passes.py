"""Methods in two passes: dot products of the inputs, then a sum with coefficients made of them.

The first pass is `gram`, in float64. The second is `weighted_sum` or `weighted_rows`: with a base b
the result b + sum_i c_i (x_i - b) is added up as (1 - sum_i c_i) b + sum_i c_i x_i. Sums of float32
tensors are float64, so that nothing is lost where these cancel: of 2**18 fine-tuned weights (sigma
0.02, differences of 1e-3 and 1e-5) each result is the exact one rounded once, where differences
taken in float32 are off by up to 3 units more for coefficients of 30; 16-bit types do not care.

A NaN or infinity in a vector leaves its angles undefined and makes the whole of its result NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import check
from ..ops.gram import gram
from ..ops.weighted_rows import weighted_rows
from ..ops.weighted_sum import weighted_sum
from .registry import Inputs

Coefficients = Callable[[Tensor], Tensor]  # float64 dot products [..., N, N] -> [..., N]


def whole(inputs: Inputs, coefficients: Coefficients) -> Tensor:
    """b + sum_i c_i (x_i - b), or sum_i c_i x_i, with c from the dot products of whole tensors."""
    dots = gram(inputs.xs, base=inputs.base, backend=inputs.backend).cpu()
    if not dots.isfinite().all():
        return torch.full_like(inputs.xs[0], math.nan, dtype=inputs.out_dtype)
    tensors, weights = _with_base(inputs.xs, inputs.base, coefficients(dots))
    return weighted_sum(
        tensors, weights.tolist(), out_dtype=inputs.out_dtype, backend=inputs.backend
    )


_DOTS = 1 << 20  # dot products held at a time


def vectors(inputs: Inputs, dim: int, coefficients: Coefficients) -> Tensor:
    """The same for each vector along `dim`, 0 or -1."""
    first, n = inputs.xs[0], len(inputs.xs)
    if first.ndim < 2:
        return whole(inputs, coefficients)
    out = check.output("merge", None, first, dtype=inputs.out_dtype)
    # Each vector has a matrix of dot products, many times its own size where it is short.
    others = range(first.ndim)[1:] if dim == 0 else range(first.ndim)[:-1]
    count = math.prod(first.shape[d] for d in others)
    parts = min(count, -(-count * n * n // _DOTS))
    longest = max(others, key=lambda d: first.shape[d])
    cut = next((d for d in others if first.shape[d] >= parts), longest)
    size = max(1, first.shape[cut] // max(1, parts))
    for begin in range(0, first.shape[cut], size):
        length = min(size, first.shape[cut] - begin)
        xs = [x.narrow(cut, begin, length) for x in inputs.xs]
        base = None if inputs.base is None else inputs.base.narrow(cut, begin, length)
        dots = gram(xs, base=base, dim=dim, backend=inputs.backend).view(-1, n, n)
        tensors, weights = _with_base(xs, base, coefficients(dots))
        weights[~dots.isfinite().all(-1).all(-1)] = math.nan
        weighted_rows(
            tensors,
            weights,
            axis=-1 - dim,
            out=out.narrow(cut, begin, length),
            backend=inputs.backend,
        )
    return out


def _with_base(
    xs: list[Tensor], base: Tensor | None, weights: Tensor
) -> tuple[list[Tensor], Tensor]:
    if base is None:
        return xs, weights
    return [*xs, base], torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)


def alone(inputs: Inputs) -> Tensor:
    """The one model as it is, but for its type."""
    x = inputs.xs[0]
    if x.dtype == inputs.out_dtype:
        return x.clone()
    return weighted_sum([x], [1], out_dtype=inputs.out_dtype, backend=inputs.backend)
