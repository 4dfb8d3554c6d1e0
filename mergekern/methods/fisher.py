"""fisher: the mean of models, each element weighted by what its model's data say about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from ..ops.gram import gram
from . import slices
from .chunked import Part, elementwise, number
from .passes import Gather, Passes, Study
from .registry import REQUIRED, Inputs, Method, Parameter, anywhere


def _square(x: Tensor, backend: str) -> float:
    return float(gram([x], backend=backend)[0, 0])


def _norm(tensors: Sequence[Tensor], backend: str) -> float:
    """The L2 norm of tensors taken as one vector, in float64."""
    return math.sqrt(math.fsum(_square(x, backend) for x in tensors))


def _norm_of(x: Tensor, backend: str) -> float:
    """The same of one tensor, summed by the slice."""
    ranges = slices.slices(x.shape, "elements")
    return _norm(
        [slices.part(x, b, e, "elements") if len(ranges) > 1 else x for b, e in ranges], backend
    )


def _measure(gather: Gather) -> Passes:
    """The norms of whole tensors that are among the arguments: one slice is enough."""
    norms: list[float] = []

    def take(inputs: Inputs, *, fisher: list[Tensor], **_: Any) -> None:
        if not norms:
            norms[:] = [_norm_of(f, inputs.backend) for f in fisher]

    yield take
    return norms


def _needs(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> bool:
    return arguments["normalize"] and arguments["norm"] is None


def whole_models(parameters: dict[str, Any], names: Sequence[str], backend: str) -> dict[str, Any]:
    """The norms that merge_state_dicts divides by: of all of a model's Fisher tensors."""
    given = parameters.get("norm")
    if given is None and parameters.get("normalize", True):
        fisher = parameters["fisher"]
        return {**parameters, "norm": [_norm([f[k] for k in names], backend) for f in fisher]}
    return parameters


def coefficients(weight: list[float], norm: list[float], minimal: float) -> list[float]:
    """weight_i / (norm_i + minimal), scaled so that the reciprocals sum to 1, as FusionBench."""
    for i, size in enumerate(norm):
        if size + minimal <= 0:
            raise ArgumentError.of(
                "fisher", f"norm[{i}] + minimal is not positive", size + minimal, "above 0"
            )
    shares = [1.0 / (size + minimal) for size in norm]
    return [w * s / math.fsum(shares) for w, s in zip(weight, shares, strict=True)]


def fisher(
    inputs: Inputs,
    *,
    weight: list[float],
    fisher: list[Tensor],
    normalize: bool,
    minimal: float,
    norm: list[float] | None,
) -> Tensor:
    xs, n = inputs.xs, len(inputs.xs)
    if normalize:
        sizes = norm or inputs.survey or [_norm_of(f, inputs.backend) for f in fisher]
        sizes = check.numbers("fisher", "norm", sizes, n)
        weight = coefficients(weight, sizes, minimal)
    if inputs.shape is not None:
        fisher = [slices.of(f, inputs, "elements").view(xs[0].shape) for f in fisher]

    def step(part: Part) -> Tensor:
        total = divisor = torch.zeros_like(part(0))
        for i, w in enumerate(weight):
            share = (part(n + i) + number(minimal, total)) * number(w, total)
            total = total + share * part(i)
            divisor = divisor + share
        return total / divisor

    return elementwise(
        "fisher", xs, step, beside=fisher, out_dtype=inputs.out_dtype, backend=inputs.backend
    )


FISHER = Method(
    "fisher",
    "sum_i c_i F_i x_i / sum_i c_i F_i, F_i the diagonal of model i's Fisher information plus "
    "`minimal` (Matena and Raffel, 2111.09832). With `normalize` c_i is weight_i / (norm_i + "
    "minimal), norm_i the L2 norm of all Fisher tensors of model i: of the whole model in "
    "merge_state_dicts, of the one tensor in merge_tensors. In float32, 3 roundings a model and 2; "
    "NaN where every F_i is 0 and minimal is 0, and wherever an F_i or x_i is NaN.",
    base="model",
    models=(1, None),
    parameters=(
        Parameter("fisher", Tensor, "model", REQUIRED, "a tensor, or of models a state dict"),
        Parameter("weight", float, "model", 1.0, "weight of the model"),
        Parameter("normalize", bool, "tensor", True, "divide by the norm of the model's Fisher"),
        Parameter("minimal", float, "tensor", 1e-6, "added to each F_i", bounds=(0, math.inf)),
        Parameter("norm", float, "model", None, "those norms, where they are known"),
    ),
    merge=fisher,
    cut=anywhere,
    measure=Study(_measure),
    needs=_needs,
    whole_models=whole_models,
)
