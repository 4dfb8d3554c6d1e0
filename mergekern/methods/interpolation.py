"""linear and passthrough: weighted sums of the models themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..check import accumulator
from ..ops.weighted_sum import weighted_sum
from .registry import REQUIRED, Inputs, Method, Parameter, anywhere, ever


def _by_chunks(inputs: Inputs, merge: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """merge(xs) chunk by chunk, rounded as hosts do: to the inputs' dtype, then to the result's."""
    from ..backends.torch import chunks  # here, since importing mergekern loads no backend

    dtype = inputs.xs[0].dtype
    out = torch.empty_like(
        inputs.xs[0], dtype=inputs.out_dtype, memory_format=torch.contiguous_format
    )
    target, *xs = chunks.flat([out, *inputs.xs])
    for begin, end, _ in chunks.rows(xs):
        merged = merge([chunks.part(x, begin, end, dtype) for x in xs]).to(dtype)
        into = target[begin:end] if target.ndim else target
        into.copy_(merged.view(into.shape))
    return out


def _mergekit_linear(inputs: Inputs, weight: list[float], normalize: bool) -> Tensor:
    first = inputs.xs[0]
    acc = accumulator(first.dtype)
    factors = torch.tensor([weight], dtype=acc, device=first.device)
    divisor = factors.sum(dim=1)

    def merge(xs: list[Tensor]) -> Tensor:
        total = torch.zeros_like(xs[0], dtype=acc)
        for x, factor in zip(xs, factors.unbind(1), strict=True):
            total.addcmul_(x, factor)  # a fused multiply-add where the processor has one
        return total.div_(divisor) if normalize else total

    return _by_chunks(inputs, merge)


def _fusion_bench_linear(inputs: Inputs, weight: list[float], normalize: bool) -> Tensor:
    """Every product and sum rounded to the tensors' dtype."""
    n = len(weight)
    average = normalize and weight == [1.0] * n
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (np.asarray(weight) / (np.sum(weight) if normalize else 1.0)).tolist()

    def merge(xs: list[Tensor]) -> Tensor:
        terms = iter(xs if average else [x * w for x, w in zip(xs, shares, strict=True)])
        total = next(terms)
        for term in terms:
            total = total + term
        return total / n if average else total

    return _by_chunks(inputs, merge)


_LINEAR_OF = {"mergekit": _mergekit_linear, "fusion_bench": _fusion_bench_linear}


def linear(inputs: Inputs, *, weight: list[float], normalize: bool) -> Tensor:
    if inputs.host is not None:
        return _LINEAR_OF[inputs.host](inputs, weight, normalize)
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
    cut=anywhere,
    joins=ever,
    parity={
        "mergekit": "The bits of `linear` on the same device.",
        "fusion_bench": "The bits of SimpleAverageAlgorithm where every weight is 1 and "
        "`normalize` is on, else of WeightedAverageAlgorithm, on the same device.",
    },
)


def passthrough(inputs: Inputs, *, scale: list[float]) -> Tensor:
    if scale == [1.0] and inputs.out_dtype == inputs.xs[0].dtype:
        return inputs.xs[0].clone()
    if inputs.host == "mergekit":
        return _by_chunks(inputs, lambda xs: xs[0] * scale[0])
    return weighted_sum(inputs.xs, scale, out_dtype=inputs.out_dtype, backend=inputs.backend)


PASSTHROUGH = Method(
    "passthrough",
    "The one model, times `scale`.",
    base="model",
    models=(1, 1),
    parameters=(Parameter("scale", float, "model", 1.0, "factor"),),
    merge=passthrough,
    cut=anywhere,
    joins=ever,
    parity={"mergekit": "The bits of `passthrough` on the same device."},
)
