"""regmean: of all matrices the one that answers the inputs of every model most as it does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from .chunked import chunks_for, rounded
from .interpolation import linear
from .registry import Inputs, Method, Parameter

_SKEW = 1e-3  # of a Gram matrix, relative to its largest element: more is no rounding
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def prepared(gram: Tensor, reduce: float, what: str) -> Tensor:
    """A given Gram matrix in float64, symmetric, off the diagonal times `reduce`."""
    if gram.dtype not in UNIT:
        got = check.name_of(gram.dtype)
        raise ArgumentError.of("regmean", f"{what} is too coarse", got, "float32 or float64")
    check.finite("regmean", what, gram)
    wide = gram.double()
    skew = float((wide - wide.T).abs().max())
    if skew > _SKEW * float(wide.abs().max()):
        raise ArgumentError.of(
            "regmean", f"{what} is not symmetric", f"a difference of {skew:.3g}", "x^T x / n"
        )
    wide = (wide + wide.T).mul_(reduce / 2)
    wide.diagonal().copy_(gram.diagonal())
    return wide


class Singular(NamedTuple):
    """A sum of Gram matrices with a pivot of at most `least` of its diagonal, and what was added.

    pivot, least, jitter: shares of the diagonal.
    """

    name: str
    pivot: float
    least: float
    jitter: float


def factored(total: Tensor, unit: float, name: str) -> tuple[Tensor, Singular | None]:
    """The Cholesky factor L of sum_i w_i G_i, whose elements are exact to `unit`.

    Where a pivot is at most in * unit of its diagonal element, which errors alone make of 0, eight
    times that share of the diagonal is added. It goes on each G_i and not on their sum alone, which
    leaves sum_i w_i (W_i - mean) G_i as it is: what no data tell apart keeps the models' mean but
    for an eighth, and equal models stay equal. Inputs that are always 0 keep the mean.
    """
    least = len(total) * unit
    total.diagonal()[total.diagonal() == 0] = 1
    factor, pivot = _cholesky(total)
    if pivot > least:
        return factor, None
    jitter = 8 * least
    shifted = total.clone()
    shifted.diagonal().mul_(1 + jitter)
    factor, after = _cholesky(shifted)
    if not after > least:
        what = f"the Gram matrices of {name} are not positive semidefinite"
        got = f"a pivot of {after:.2g} of its diagonal beside a jitter of {jitter:.2g}"
        raise ArgumentError.of("regmean", what, got, "second moments of inputs")
    return factor, Singular(name, pivot, least, jitter)


def warn_of(found: Sequence[Singular], stacklevel: int) -> None:
    """One warning that names all of them and says how much jitter they got, if there are any."""
    if found:
        worst, most = min(s.pivot for s in found), max(found, key=lambda s: s.jitter)
        warnings.warn(
            f"regmean: the Gram matrix of {', '.join(s.name for s in found)} is singular; got a "
            f"pivot of {worst:.2g} of its diagonal; expected more than {most.least:.2g}: "
            f"{most.jitter:.2g} of the diagonal was added",
            stacklevel=stacklevel + 1,
        )


def _cholesky(matrix: Tensor) -> tuple[Tensor, float]:
    """L, and its least pivot as a share of the diagonal; 0 where a pivot is not positive."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    share = (factor.diagonal().square() / matrix.diagonal()).min()
    return factor, 0.0 if failed else float(share)


def solved(mean: Tensor, moved: Tensor, factor: Tensor) -> Tensor:
    """mean + moved (L L^T)^-1, for matrices [out, in]."""
    return mean + torch.cholesky_solve(moved.T, factor).T


def shares(weight: Sequence[float]) -> list[float]:
    """The weights over their sum."""
    total = math.fsum(weight)
    if total == 0:
        raise ArgumentError.of("regmean", "weights cannot be normalized", "a sum of 0", "above 0")
    return [w / total for w in weight]


def mean_of(xs: Sequence[Tensor], share: Sequence[float]) -> Tensor:
    """sum_i share_i x_i in float64, exactly x where all are x."""
    first = xs[0].double()
    return first + sum((x.double() - first) * s for x, s in zip(xs[1:], share[1:], strict=True))


def _regmean_matrix(
    inputs: Inputs, share: list[float], gram: Sequence[Tensor], reduce: float
) -> Tensor:
    chunks_for("regmean", inputs.backend)
    name, shape = inputs.name or "the matrix", inputs.xs[0].shape
    mean = mean_of(inputs.xs, share)
    total, moved = mean.new_zeros(shape[1], shape[1]), torch.zeros_like(mean)
    for i, (x, given, w) in enumerate(zip(inputs.xs, gram, share, strict=True)):
        what = f"gram[{i}] of {name}"
        if given.shape != total.shape or given.device != x.device:
            got, expected = (f"{list(g.shape)} on {g.device}" for g in (given, total))
            raise ArgumentError.of("regmean", f"{what} does not fit", got, expected)
        own = prepared(given, reduce, what)
        total.add_(own, alpha=w)
        moved.addmm_(x.double() - mean, own, alpha=w)
    factor, singular = factored(total, max(UNIT[g.dtype] for g in gram), name)
    warn_of([singular] if singular else [], stacklevel=5)
    return solved(mean, moved, factor)


@torch.no_grad()
def regmean(
    inputs: Inputs, *, weight: list[float], gram: Sequence[Tensor | None] | None, reduce: float
) -> Tensor:
    shape = inputs.xs[0].shape if inputs.shape is None else inputs.shape
    given = [g for g in gram or () if g is not None]
    if _beside(shape) is None or (gram is not None and not given):
        if given:
            what = f"gram of {inputs.name or 'the tensor'}, which is no matrix"
            raise ArgumentError.of("regmean", what, list(shape), "[out, in], or no gram")
        return linear(inputs, weight=weight, normalize=True)
    if len(given) < len(inputs.xs):
        got = f"{len(given)} of {len(inputs.xs)}"
        what = f"{inputs.name or 'the matrix'} has too few Gram matrices"
        raise ArgumentError.of("regmean", what, got, "one per model, or None for each: the mean")
    share = shares(weight)
    if not inputs.xs[0].numel():
        return linear(inputs, weight=weight, normalize=True)
    merged = _regmean_matrix(inputs, share, given, reduce)
    return rounded("regmean", merged, inputs.out_dtype, inputs.backend)


def _beside(shape: Sequence[int]) -> Sequence[int] | None:
    """Of a matrix [out, in]."""
    return (shape[1], shape[1]) if len(shape) == 2 else None


def _cut(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> str | None:
    averaged = arguments["gram"] is not None and all(g is None for g in arguments["gram"])
    return "elements" if averaged or _beside(shape) is None else None


REGMEAN = Method(
    "regmean",
    "sum_i w_i W_i G_i (sum_i w_i G_i)^-1 for matrices W_i [out, in]: the minimum of sum_i w_i "
    "|X_i (W - W_i)^T|^2 / n_i, G_i = X_i^T X_i / n_i the second moments of the inputs of model i "
    "(Jin et al., 2212.09849), or any Fisher information of its layer as a factor [in, in]. Other "
    "tensors, convolutions too, are sum_i w_i x_i / sum_i w_i, and so is a matrix (an embedding) "
    "for which None stands in the place of every Gram matrix. `reduce` scales what is off the "
    "diagonals; FusionBench's configuration has 0.95. Computed in float64 as the mean and a "
    "Cholesky solve for the difference to it, rounded once. Where the sum is singular (a pivot of "
    "in u of its diagonal, u that of the Gram matrices) 8 in u of the diagonal is added, and a "
    "warning says so; what no input shows is the mean then, and so it is of inputs that are always "
    "0. Gram matrices of 16 bits or that are not finite and symmetric are refused, and such that "
    "their sum is not semidefinite; NaN in a W_i makes its row NaN.",
    base="model",
    models=(1, None),
    parameters=(
        Parameter(
            "gram",
            Tensor,
            "model",
            None,
            "a matrix, or of models a state dict of them",
            beside=_beside,
            optional=True,
        ),
        Parameter("weight", float, "model", 1.0, "weight of the model", bounds=(0, math.inf)),
        Parameter("reduce", float, "tensor", 1.0, "off the diagonals, a factor", bounds=(0, 1)),
    ),
    merge=regmean,
    cut=_cut,
)
