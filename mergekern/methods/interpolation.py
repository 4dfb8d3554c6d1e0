"""linear and passthrough: weighted sums of the models themselves."""

from __future__ import annotations

from torch import Tensor

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
