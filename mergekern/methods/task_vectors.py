"""task_arithmetic, ties, dare_linear, dare_ties: what to keep of each task vector, and how to add.

As mergekit's generalized task arithmetic, with these differences: arithmetic in float32 with one
rounding (mergekit rounds to the tensor's dtype after each step), ties of a trim go to the lowest
index (mergekit: undefined), masks are keyed by seed, tensor and model (mergekit: by call order).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..keep import NOTHING, Bernoulli, Keep
from ..ops.kth_magnitude import kth_magnitude
from ..ops.merge_deltas import merge_deltas
from .registry import REQUIRED, Inputs, Method, Parameter


def _trim(inputs: Inputs, x: Tensor, density: float) -> Keep:
    """Keep int(density * numel) of the largest magnitudes of x - base, at least one."""
    if density >= 1 or not x.numel():
        return None
    if density == 0:
        return NOTHING
    k = max(1, int(density * x.numel()))
    return kth_magnitude(x, k, base=inputs.base, backend=inputs.backend)


def _task_vectors(sparsify: str | None, elect: str | None) -> Callable[..., Tensor]:
    """The recipe with that sparsification ("magnitude", "random") and election."""

    def merge(
        inputs: Inputs,
        *,
        weight: list[float],
        density: list[float],
        normalize: bool,
        rescale: bool,
        lambda_: float,
        int8_mask: bool,
    ) -> Tensor:
        keep: list[Keep] | None = None
        if sparsify == "magnitude":
            keep = [_trim(inputs, x, d) for x, d in zip(inputs.xs, density, strict=True)]
        elif sparsify == "random":
            keep = [Bernoulli(d, inputs.seed, inputs.name, i) for i, d in enumerate(density)]
        return merge_deltas(
            inputs.base,
            inputs.xs,
            weight,
            keep=keep,
            rescale="l1" if rescale and keep else None,
            elect=elect,
            normalize=normalize,
            scale=lambda_,
            out_dtype=inputs.out_dtype,
            backend=inputs.backend,
        )

    return merge


def _method(
    name: str,
    doc: str,
    *,
    sparsify: str | None,
    elect: str | None,
    normalize: bool,
    rescale: bool,
) -> Method:
    used = "share of each task vector to keep" if sparsify else "not used by this method"
    return Method(
        name,
        doc,
        base="required",
        models=(1, None),
        parameters=(
            Parameter("weight", float, "model", REQUIRED, "weight of the task vector"),
            Parameter("density", float, "model", 1.0, used, bounds=(0, 1)),
            Parameter("normalize", bool, "tensor", normalize, "divide by the weights that voted"),
            Parameter(
                "rescale", bool, "tensor", rescale, "restore the L1 norm that was lost by dropping"
            ),
            Parameter("lambda", float, "tensor", 1.0, "factor on the merged task vector"),
            Parameter("int8_mask", bool, "tensor", False, "accepted; changes no result"),
        ),
        merge=_task_vectors(sparsify, elect),
    )


TASK_ARITHMETIC = _method(
    "task_arithmetic",
    "base + lambda * sum_i weight_i (x_i - base) (Ilharco et al., 2212.04089).",
    sparsify=None,
    elect=None,
    normalize=False,
    rescale=False,
)
TIES = _method(
    "ties",
    "Trim each task vector to its largest magnitudes, elect a sign per element, average what "
    "agrees (Yadav et al., 2306.01708).",
    sparsify="magnitude",
    elect="sum",
    normalize=True,
    rescale=False,
)
DARE_LINEAR = _method(
    "dare_linear",
    "Drop elements of each task vector at random, rescale, add (Yu et al., 2311.03099).",
    sparsify="random",
    elect=None,
    normalize=False,
    rescale=True,
)
DARE_TIES = _method(
    "dare_ties",
    "DARE's random drop with the sign election of TIES.",
    sparsify="random",
    elect="sum",
    normalize=False,
    rescale=True,
)
