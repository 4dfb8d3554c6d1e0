"""SCE: select where models disagree, weigh by what they changed there, erase minority signs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.merge_deltas import merge_deltas
from ..ops.variance_mask import variance_mask
from .registry import Inputs, Method, Parameter


def sce(inputs: Inputs, *, select_topk: float, int8_mask: bool) -> Tensor:
    mask, squares = variance_mask(inputs.xs, select_topk, base=inputs.base, backend=inputs.backend)
    n, numel = len(inputs.xs), max(1, inputs.xs[0].numel())
    total = sum(squares)
    if not math.isfinite(total):
        # The share of every model is undefined, and with it every element.
        return torch.full_like(inputs.xs[0], math.nan, dtype=inputs.out_dtype)
    # As mergekit: below this no model counts for more than another.
    small = abs(total / numel) < 1e-6
    weights = [1 / n if small else s / total for s in squares]
    return merge_deltas(
        inputs.base,
        inputs.xs,
        weights,
        keep=None if mask is None else [mask] * n,
        elect="sum",
        weigh="after",
        normalize=True,
        floor=1e-6,
        out_dtype=inputs.out_dtype,
        backend=inputs.backend,
    )


SCE = Method(
    "sce",
    "Keep the elements of largest variance over the models, weigh each model by the mean square of "
    "its task vector there, drop what has the minority's sign (FuseChat, Wan et al., 2408.07990). "
    "A NaN or infinity among what is kept makes the whole result NaN.",
    base="required",
    models=(1, None),
    parameters=(
        Parameter("select_topk", float, "tensor", 1.0, "share of changing elements to keep"),
        Parameter("int8_mask", bool, "tensor", False, "accepted; changes no result"),
    ),
    merge=sce,
)
