"""weighted_sum: averages, soups, interpolation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ._cost import Cost


def weighted_sum(
    xs: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out = sum_i w_i x_i, divided by sum_i w_i if `normalize`.

    Shapes: all of one shape, any strides. `out` may be one of the inputs.
    Dtypes: float32, float16, bfloat16, float64; the result has `out_dtype`, or that of `out`, or
    the inputs'.

    Result: the same bits on every backend and thread count. Products and sums are rounded to
    float64 (float32 for 16-bit inputs) in input order, then divided, then rounded once to the
    result. Weights are never rounded below that (beyond the range of float32 they are infinite
    there). |error| <= (n + 1) u sum_i |w_i x_i|, two u more with `normalize`, plus half a unit of
    the result's last place, u = 2**-53 (2**-24), where nothing under- or overflows (bfloat16
    products beyond float32 do). NaN and infinities propagate as in this arithmetic.

    Cost: reads every input and writes the result once; 2n flops an element.
    Raises: ArgumentError for an empty list, unequal shapes, dtypes or devices, non-finite weights,
    weights that sum to 0 with `normalize`; BackendError for a backend that cannot serve.
    Source: model soups (Wortsman et al., 2203.05482); mergekit `linear`.

    >>> import torch
    >>> weighted_sum([torch.ones(3), 2 * torch.ones(3)], [1, 3], normalize=True)
    tensor([1.7500, 1.7500, 1.7500])
    """
    op = "weighted_sum"
    xs = check.tensors(op, xs)
    weights = check.numbers(op, "weights", weights, len(xs))
    divisor = 1.0
    if normalize:
        divisor = sum(weights)
        if divisor == 0:
            raise ArgumentError.of(op, "weights cannot be normalized", "a sum of 0", "any other")
    first = xs[0]
    dtype = check.result_dtype(op, out_dtype, out, first)
    out = check.output(op, out, first, dtype=dtype, inputs=xs)
    chosen = dispatch.select(backend, op, first.device, first.dtype)
    dispatch.load(chosen, op)(out, xs, weights, divisor)
    return out


def cost(n: int, numel: int, itemsize: int, out_itemsize: int | None = None) -> Cost:
    """Least traffic of n inputs of `numel` elements."""
    return Cost(numel * (n * itemsize + (out_itemsize or itemsize)), 2 * n * numel)
