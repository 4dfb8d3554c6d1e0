"""Methods in two passes: dot products of the inputs, then a sum with coefficients made of them.

The first pass is `gram`, in float64. The second is `weighted_sum` or `weighted_rows`: with a base b
the result b + sum_i c_i (x_i - b) is added up as (1 - sum_i c_i) b + sum_i c_i x_i. Sums of float32
tensors are float64, so that nothing is lost where these cancel: of 2**18 fine-tuned weights (sigma
0.02, differences of 1e-3 and 1e-5) each result is the exact one rounded once, where differences
taken in float32 are off by up to 3 units more for coefficients of 30; 16-bit types do not care.

A NaN or infinity in a vector leaves its angles undefined and makes the whole of its result NaN.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import check
from ..ops.gram import gram
from ..ops.weighted_rows import weighted_rows
from ..ops.weighted_sum import weighted_sum
from . import slices
from .passes import Gather, Passes, Study
from .registry import Inputs

Coefficients = Callable[[Tensor], Tensor]  # float64 dot products [..., N, N] -> [..., N]


def whole(inputs: Inputs, coefficients: Coefficients) -> Tensor:
    """b + sum_i c_i (x_i - b), or sum_i c_i x_i, with c from the dot products of whole tensors."""
    dots = inputs.survey
    if dots is None:
        dots = functools.reduce(operator.add, map(_dots, slices.parts(inputs, "elements")))
    if not dots.isfinite().all():
        return torch.full_like(inputs.xs[0], math.nan, dtype=inputs.out_dtype)
    tensors, weights = _with_base(inputs.xs, inputs.base, coefficients(dots))
    return weighted_sum(
        tensors, weights.tolist(), out_dtype=inputs.out_dtype, backend=inputs.backend
    )


def _dots(inputs: Inputs) -> Tensor:
    """Counted once for all points of a sweep."""
    if "dots" not in inputs.shared:
        found = gram(inputs.xs, base=inputs.base, backend=inputs.backend)
        inputs.shared["dots"] = found.cpu()
    dots: Tensor = inputs.shared["dots"]
    return dots


_DOTS = 1 << 20  # dot products held at a time


class _Part(NamedTuple):
    """Some of the vectors of a tensor: a range of one of the other axes."""

    axis: int
    begin: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        return x.narrow(*self)


def _parts(shape: Sequence[int], n: int, dim: int) -> list[_Part]:
    """Each vector has a matrix of dot products, many times its own size where it is short."""
    others = range(len(shape))[1:] if dim == 0 else range(len(shape))[:-1]
    count = math.prod(shape[d] for d in others)
    parts = min(count, -(-count * n * n // _DOTS))
    longest = max(others, key=lambda d: shape[d])
    axis = next((d for d in others if shape[d] >= parts), longest)
    size = max(1, shape[axis] // max(1, parts))
    begins = range(0, shape[axis], size)
    return [_Part(axis, begin, min(size, shape[axis] - begin)) for begin in begins]


def _dots_along(inputs: Inputs, dim: int, part: _Part) -> Tensor:
    """Dot products of vectors along `dim`, those along the first axis added up by the slice."""
    n = len(inputs.xs)
    base = inputs.base

    def dots(begin: int, end: int) -> Tensor:
        xs = [part.of(x[begin:end]) for x in inputs.xs]
        origin = None if base is None else part.of(base[begin:end])
        return gram(xs, base=origin, dim=dim, backend=inputs.backend).view(-1, n, n)

    shape = inputs.xs[0].shape
    row = math.prod(shape[1:])
    if dim != 0 or math.prod(shape) <= slices.SLICE:
        return dots(0, shape[0])
    ranges = slices.slices(shape, "rows")
    return functools.reduce(operator.add, (dots(b // row, e // row) for b, e in ranges))


def vectors(
    inputs: Inputs, dim: int, coefficients: Coefficients, out: Tensor | None = None
) -> Tensor:
    """The same for each vector along `dim`, 0 or -1."""
    first, n = inputs.xs[0], len(inputs.xs)
    if first.ndim < 2:
        return whole(inputs, coefficients)
    if out is None:
        out = check.output("merge", None, first, dtype=inputs.out_dtype)
    if dim != 0 and first.numel() > slices.SLICE and first.shape[0] > 1:
        # The bits of a dot product may depend on how many are taken at a time.
        for one in slices.parts(inputs, "rows"):
            vectors(one, dim, coefficients, slices.of(out, one, "rows"))
        return out
    for i, part in enumerate(_parts(first.shape, n, dim)):
        xs = [part.of(x) for x in inputs.xs]
        base = None if inputs.base is None else part.of(inputs.base)
        dots = inputs.survey[i] if inputs.survey else _dots_along(inputs, dim, part)
        tensors, weights = _with_base(xs, base, coefficients(dots))
        weights[~dots.isfinite().all(-1).all(-1)] = math.nan
        weighted_rows(tensors, weights, axis=-1 - dim, out=part.of(out), backend=inputs.backend)
    return out


def _along_first(inputs: Inputs) -> list[Tensor]:
    """Dot products of the vectors along the first axis, part by part."""
    parts = _parts(inputs.xs[0].shape, len(inputs.xs), 0)
    if "along" not in inputs.shared:
        inputs.shared["along"] = [_dots_along(inputs, 0, part) for part in parts]
    dots: list[Tensor] = inputs.shared["along"]
    return dots


def measured(columns: Callable[[Mapping[str, Any]], bool] = lambda arguments: False) -> Study:
    """Dot products of one tensor, added up slice by slice: of all of it, or along its first axis
    with arguments for which `columns` is so."""

    def passes(gather: Gather) -> Passes:
        total: Any = None

        def add(inputs: Inputs, **arguments: Any) -> None:
            nonlocal total
            if columns(arguments) and len(inputs.shape or ()) > 1:
                dots = _along_first(inputs)
                total = [a + b for a, b in zip(total, dots, strict=True)] if total else dots
            else:
                total = _dots(inputs) if total is None else total + _dots(inputs)

        yield add
        return total

    return Study(passes)


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
