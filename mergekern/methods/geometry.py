"""slerp, nuslerp, multislerp, karcher, model_stock: methods that need lengths and angles only.

Two passes over the inputs (see two_passes); between them, float64 arithmetic on an N x N matrix of
dot products gives the coefficient of each input. With a base, vectors are the differences to it.

Against mergekit 0.1.5: the same formulas and thresholds. There dot products are summed in float32
or the tensors' type, so results agree within (its) rounding, not bit for bit, and there is no
`host` to ask for but where a rule differs (karcher). A NaN or infinity in any vector makes the
whole result NaN (row by row: that row), as there.

Two vectors are opposite where the squared sine of their angle is below 2**-40: float64 sums over
the elements tell no smaller one from 0, and the plane the two span is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from .registry import REQUIRED, Inputs, Method, Parameter, anywhere
from .two_passes import alone, measured, vectors, whole

_OPPOSITE = 2.0**-40

# ---- slerp -----------------------------------------------------------------------------------

# mergekit's constants: a shorter vector is not normalized, a smaller angle is interpolated.
_LEAST_NORM = 1e-8
_COLINEAR = 0.9995


def slerp_coefficients(dots: Tensor, t: float) -> Tensor:
    """Coefficients of x_0 and x_1 at share t of the arc between them, from their Gram matrix."""
    norms = [math.sqrt(dots[i, i]) for i in range(2)]
    scale = math.prod(n if n > _LEAST_NORM else 1.0 for n in norms)
    cosine = max(-1.0, min(1.0, float(dots[0, 1]) / scale))
    shares = [1.0 - t, t]
    if abs(cosine) <= _COLINEAR:
        angle = math.acos(cosine)
        shares = [math.sin(share * angle) / math.sin(angle) for share in shares]
    return torch.tensor(shares, dtype=torch.float64)


def slerp(inputs: Inputs, *, t: float) -> Tensor:
    return whole(inputs, lambda dots: slerp_coefficients(dots, t))


SLERP = Method(
    "slerp",
    "Along the great circle from the base (or first model) to the other; straight where they are "
    "nearly colinear. Norms and angle of the whole tensor in float64 (Shoemake 1985). A NaN or "
    "infinity in either tensor makes the whole result NaN.",
    base="first",
    models=(2, 2),
    parameters=(Parameter("t", float, "tensor", REQUIRED, "0 gives the base, 1 the other model"),),
    merge=slerp,
    cut=anywhere,
    measure=measured(),
    studied=(),
)

# ---- nuslerp ---------------------------------------------------------------------------------

_LEAST_SQUARE = 1e-14  # of a norm of 1e-7, by which shorter vectors are divided
_LEAST_SINE = 1e-16  # squared: straight below
_LEAST_TOTAL = 1e-6  # of the weights: halves below


def nuslerp_coefficients(dots: Tensor, t: float) -> Tensor:
    """As for slerp, for any number of matrices; straight for parallel and opposite vectors."""
    squares = dots.diagonal(dim1=-2, dim2=-1).clamp(min=_LEAST_SQUARE)
    cross = dots[..., 0, 1]
    square = (cross / squares[..., 0]) * (cross / squares[..., 1])  # of the cosine, exact for x, x
    sine = (1 - square).clamp(min=0)
    straight = sine <= torch.where(cross < 0, _OPPOSITE, _LEAST_SINE)
    angle = torch.atan2(sine.sqrt(), torch.copysign(square.sqrt(), cross))[..., None]
    shares = torch.tensor([1.0 - t, t], dtype=torch.float64, device=dots.device)
    arc = torch.sin(shares * angle) / torch.sin(angle)
    return torch.where(straight[..., None], shares, arc)


def nuslerp(
    inputs: Inputs, *, weight: list[float], nuslerp_flatten: bool, nuslerp_row_wise: bool
) -> Tensor:
    total = math.fsum(weight)
    t = 0.5 if abs(total) < _LEAST_TOTAL else weight[1] / total

    def coefficients(dots: Tensor) -> Tensor:
        return nuslerp_coefficients(dots, t)

    if nuslerp_flatten:
        return whole(inputs, coefficients)
    return vectors(inputs, 0 if nuslerp_row_wise else -1, coefficients)


_SHORT = 64  # of vectors whose dot products would take more memory than a slice


def _nuslerp_cut(
    arguments: Mapping[str, Any], shape: Sequence[int], host: str | None
) -> str | None:
    """Rows hold whole vectors along the last axis, and a part of all those along the first."""
    if arguments["nuslerp_flatten"] or len(shape) < 2:
        return "elements"
    return None if arguments["nuslerp_row_wise"] and shape[0] < _SHORT else "rows"


def _along_first(arguments: Mapping[str, Any]) -> bool:
    return arguments["nuslerp_row_wise"] and not arguments["nuslerp_flatten"]


def _nuslerp_needs(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> bool:
    return _nuslerp_cut(arguments, shape, host) == "elements" or _along_first(arguments)


NUSLERP = Method(
    "nuslerp",
    "slerp at t = weight_1 / (weight_0 + weight_1) (1/2 for a sum within 1e-6 of 0), of two models "
    "or of their differences to a base, to which the result is added. Straight for parallel and "
    "opposite vectors only. Of whole tensors, or with nuslerp_flatten off of each vector along the "
    "last axis, with nuslerp_row_wise along the first. A vector shorter than 1e-7 counts as 1e-7 "
    "long. Within rounding of mergekit.",
    base="optional",
    models=(2, 2),
    parameters=(
        Parameter("weight", float, "model", REQUIRED, "weight of the model"),
        Parameter("nuslerp_flatten", bool, "tensor", True, "whole tensors rather than vectors"),
        Parameter("nuslerp_row_wise", bool, "tensor", False, "vectors along the first axis"),
    ),
    merge=nuslerp,
    cut=_nuslerp_cut,
    measure=measured(_along_first),
    needs=_nuslerp_needs,
)

# ---- multislerp ------------------------------------------------------------------------------


def _multislerp_needs(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> bool:
    return len(arguments["weight"]) > 1


def multislerp_coefficients(
    dots: Tensor, weight: list[float], eps: float, name: str = ""
) -> Tensor:
    """cos(eps) (sum_j w_j |x_j|) w_i / ((|x_i| + eps) |m|), m = sum_i w_i x_i / (|x_i| + eps).

    mergekit goes from m / |m| along the weighted sum of the tangents there. That sum is m less its
    projection on m, which is nothing: only the cosine of the eps that it adds to a length remains.
    """
    w = torch.tensor(weight, dtype=torch.float64)
    norms = dots.diagonal().sqrt()
    if not norms.any():
        return torch.zeros_like(w)
    shares = torch.where(norms > 0, w / (norms + eps), 0)
    square = float(shares @ dots @ shares)
    if square < eps**2 or square <= _OPPOSITE * float(shares.abs() @ norms) ** 2:
        if len(w) == 2:
            return w
        raise ArgumentError.of(
            "multislerp",
            f"the weighted directions of {name or 'the tensors'} cancel, so their mean has none",
            f"length {math.sqrt(max(0.0, square)):.1e}",
            "other weights, or models that are not opposite",
        )
    return math.cos(eps) * float(norms @ w) / math.sqrt(square) * shares


def multislerp(
    inputs: Inputs, *, weight: list[float], normalize_weights: bool, eps: float
) -> Tensor:
    if len(inputs.xs) == 1:
        return alone(inputs)
    if normalize_weights:
        total = math.fsum(weight)
        if total == 0:
            what = "weights cannot be normalized"
            raise ArgumentError.of("multislerp", what, "a sum of 0", "any other")
        weight = [w / total for w in weight]
    return whole(inputs, lambda dots: multislerp_coefficients(dots, weight, eps, inputs.name))


MULTISLERP = Method(
    "multislerp",
    "The weighted mean of directions, as long as the weighted mean of lengths; of models, or of "
    "their differences to a base, to which it is added. One model is returned as it is, and so is "
    "the base where all models equal it (mergekit refuses from three models on). Where the "
    "directions cancel, the weighted sum of two vectors, and for more of them an error. Within "
    "rounding of mergekit.",
    base="optional",
    models=(1, None),
    parameters=(
        Parameter("weight", float, "model", REQUIRED, "weight of the model"),
        Parameter("normalize_weights", bool, "tensor", True, "divide by the sum of the weights"),
        Parameter(
            "eps", float, "tensor", 1e-8, "added to lengths; least one of a mean", (0, math.inf)
        ),
    ),
    merge=multislerp,
    cut=anywhere,
    measure=measured(),
    studied=(),
    needs=_multislerp_needs,
)

# ---- karcher ---------------------------------------------------------------------------------


def karcher_coefficients(dots: Tensor, max_iter: int, tol: float, least: float) -> Tensor:
    """The mean on the sphere of the vectors longer than `least`, as long as all are on average.

    Points are coordinates over the unit vectors, whose Gram matrix gives their products.
    """
    norms = dots.diagonal().sqrt()
    kept = norms > least
    coefficients = torch.zeros_like(norms)
    if not kept.any():
        return coefficients
    lengths = norms[kept]
    units = dots[kept][:, kept] / lengths / lengths[:, None]

    def length(point: Tensor) -> float:
        return math.sqrt(max(0.0, float(point @ units @ point)))

    alpha = 1 / len(lengths)
    mean = torch.full_like(lengths, alpha)
    first = torch.zeros_like(lengths)
    first[0] = 1
    size = length(mean)
    mean = first if size < tol else mean / size
    for _ in range(max_iter):
        cosines = (units @ mean).clamp(-1, 1)
        angles = torch.acos(cosines)
        opposite = (cosines < 0) & (1 - cosines.square() <= _OPPOSITE)
        still = (angles < tol) | opposite
        factors = torch.where(still, 0, alpha * angles / torch.sin(angles))
        tangent = factors - (factors @ cosines) * mean
        step = length(tangent)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
    coefficients[kept] = norms.mean() * mean / lengths
    return coefficients


def karcher(inputs: Inputs, *, max_iter: int, tol: float) -> Tensor:
    if len(inputs.xs) == 1:
        return alone(inputs)
    least = tol if inputs.host == "mergekit" else 0.0
    return whole(inputs, lambda dots: karcher_coefficients(dots, max_iter, tol, least))


KARCHER = Method(
    "karcher",
    "The Karcher mean of the directions on the sphere, all models alike, as long as the mean of "
    "their lengths (2603.04972). Zero vectors have no direction and are left out of it, and so is, "
    "in a step, a vector opposite to the mean; directions whose mean is shorter than `tol` start "
    "from the first of them. mergekit leaves out vectors up to a length of `tol` as well, and so "
    "makes small tensors 0. One model is returned as it is.",
    base="model",
    models=(1, None),
    parameters=(
        Parameter("max_iter", int, "tensor", 10, "most steps of the iteration", (0, math.inf)),
        Parameter("tol", float, "tensor", 1e-5, "angles below are nothing", (0, math.inf)),
    ),
    merge=karcher,
    cut=anywhere,
    measure=measured(),
    studied=(),
    parity={"mergekit": "the same vectors left out (those up to `tol` long); within rounding"},
)

# ---- model_stock -----------------------------------------------------------------------------

_LEAST_PRODUCT = 1e-6  # of two norms, by which smaller ones are divided
_SINGULAR = 1e-6  # denominators below leave the base


def model_stock_coefficients(dots: Tensor) -> Tensor:
    """t / N for every model, for any number of matrices."""
    n = dots.shape[-1]
    norms = dots.diagonal(dim1=-2, dim2=-1).sqrt()
    products = (norms[..., :, None] * norms[..., None, :]).clamp(min=_LEAST_PRODUCT)
    i, j = torch.triu_indices(n, n, 1, device=dots.device)
    cosine = (dots / products)[..., i, j].clamp(-1, 1).mean(-1, keepdim=True)
    denominator = 1 + (n - 1) * cosine
    share = torch.where(denominator.abs() < _SINGULAR, 0, cosine / denominator)
    return share.expand(*dots.shape[:-1]).clone()


def _model_stock_cut(
    arguments: Mapping[str, Any], shape: Sequence[int], host: str | None
) -> str | None:
    return "rows" if arguments["filter_wise"] and len(shape) > 1 else "elements"


def _model_stock_needs(
    arguments: Mapping[str, Any], shape: Sequence[int], host: str | None
) -> bool:
    return _model_stock_cut(arguments, shape, host) == "elements"


def model_stock(inputs: Inputs, *, filter_wise: bool) -> Tensor:
    if filter_wise:
        return vectors(inputs, -1, model_stock_coefficients)
    return whole(inputs, model_stock_coefficients)


MODEL_STOCK = Method(
    "model_stock",
    "base + t (mean of the models - base), t = N c / (1 + (N - 1) c) of the mean cosine c between "
    "the differences x_i - base, t = 0 for a denominator within 1e-6 of 0 (Jang et al., 2403.19522)"
    ". Of whole tensors, or with filter_wise of each vector along the last axis. A product of two "
    "norms counts as 1e-6 at least. Within rounding of mergekit.",
    base="required",
    models=(2, None),
    parameters=(
        Parameter("filter_wise", bool, "tensor", False, "a share for each vector of the last axis"),
    ),
    merge=model_stock,
    cut=_model_stock_cut,
    measure=measured(),
    studied=(),
    needs=_model_stock_needs,
)
