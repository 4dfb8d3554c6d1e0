"""linear, slerp and passthrough: methods without task vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.gram import gram
from ..ops.weighted_sum import weighted_sum
from .registry import REQUIRED, Inputs, Method, Parameter


def linear(inputs: Inputs, *, weight: list[float], normalize: bool) -> Tensor:
    return weighted_sum(
        inputs.xs,
        weight,
        normalize=normalize,
        out_dtype=inputs.out_dtype,
        backend=inputs.backend,
    )


LINEAR = Method(
    "linear",
    "sum_i weight_i x_i, divided by sum_i weight_i (Wortsman et al., 2203.05482).",
    base="model",
    models=(1, None),
    parameters=(
        Parameter("weight", float, "model", REQUIRED, "weight of the model"),
        Parameter("normalize", bool, "tensor", True, "divide by the sum of the weights"),
    ),
    merge=linear,
)

# mergekit's constants: a shorter vector is not normalized, a smaller angle is interpolated.
_LEAST_NORM = 1e-8
_COLINEAR = 0.9995


def slerp_coefficients(dots: Tensor, t: float) -> tuple[float, float]:
    """Coefficients of x_0 and x_1 at share t of the arc between them, from their Gram matrix."""
    norms = [math.sqrt(dots[i, i]) for i in range(2)]
    scale = math.prod(n if n > _LEAST_NORM else 1.0 for n in norms)
    cosine = max(-1.0, min(1.0, float(dots[0, 1]) / scale))
    if abs(cosine) > _COLINEAR:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(inputs: Inputs, *, t: float) -> Tensor:
    dots = gram(inputs.xs, backend=inputs.backend)
    if not dots.isfinite().all():
        # The angle to a vector with NaN or infinity is undefined, and with it every element.
        return torch.full_like(inputs.xs[0], math.nan, dtype=inputs.out_dtype)
    return weighted_sum(
        inputs.xs,
        slerp_coefficients(dots.cpu(), t),
        out_dtype=inputs.out_dtype,
        backend=inputs.backend,
    )


SLERP = Method(
    "slerp",
    "Along the great circle from the base (or first model) to the other; straight where they are "
    "nearly colinear. Norms and angle of the whole tensor in float64 (Shoemake 1985). A NaN or "
    "infinity in either tensor makes the whole result NaN.",
    base="first",
    models=(2, 2),
    parameters=(Parameter("t", float, "tensor", REQUIRED, "0 gives the base, 1 the other model"),),
    merge=slerp,
)


def passthrough(inputs: Inputs, *, scale: list[float]) -> Tensor:
    if scale == [1.0] and inputs.out_dtype == inputs.xs[0].dtype:
        return inputs.xs[0].clone()
    return weighted_sum(inputs.xs, scale, out_dtype=inputs.out_dtype, backend=inputs.backend)


PASSTHROUGH = Method(
    "passthrough",
    "The one model, times `scale`.",
    base="model",
    models=(1, 1),
    parameters=(Parameter("scale", float, "model", 1.0, "factor"),),
    merge=passthrough,
)
