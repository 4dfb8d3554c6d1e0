"""Generalized task arithmetic: what to keep of each task vector, whose sign wins, how to add.

As mergekit's methods of these names, with these differences: arithmetic in float32 with one
rounding (mergekit rounds to the tensor's dtype after each step), ties of a trim go to the lowest
index (mergekit: undefined), masks are keyed by seed, tensor and model (mergekit: by call order).
host="mergekit", "peft" and "sd_mecha" take the other side of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..keep import NOTHING, Band, Bernoulli, Keep, Threshold
from ..ops.kth_magnitude import kth_magnitudes
from ..ops.merge_deltas import merge_deltas
from . import host_masks
from .registry import REQUIRED, Inputs, Method, Parameter


@dataclass(frozen=True)
class Trim:
    """How a method chooses what to keep: parameters beside density, and the rules they give."""

    doc: str
    parameters: tuple[Parameter, ...]
    rules: Callable[..., list[Keep]]


# ---- what to keep ----------------------------------------------------------------------------


def by_magnitude(inputs: Inputs, density: list[float]) -> list[Keep]:
    """int(density * numel) of the largest magnitudes of each x - base, at least one.

    sd-mecha keeps those not below the smallest of the rest, and so at least one more.
    """
    least = 0 if inputs.host == "peft" else 1
    total = inputs.xs[0].numel()
    if inputs.host == "sd_mecha":
        ranks = [(total + 1 - max(1, int((1 - d) * total)), 0) for d in density]
        keep = _between(inputs, density, ranks)
        return [k._replace(cut=total) if isinstance(k, Threshold) else k for k in keep]
    ranks = [(max(least, int(d * total)) if d > 0 else 0, 0) for d in density]
    return _between(inputs, density, ranks)


def without_outliers(inputs: Inputs, density: list[float], gamma: list[float]) -> list[Keep]:
    """int(density * numel) magnitudes below the int(gamma * numel) largest ones.

    Fewer outliers go where the rest would not be enough.
    """
    total = inputs.xs[0].numel()
    ranks = []
    for d, g in zip(density, gamma, strict=True):
        target = int(d * total)
        last = total - max(0, total - target - int(g * total))
        ranks.append((last, last - target))
    return _between(inputs, density, ranks)


def _between(inputs: Inputs, density: list[float], ranks: list[tuple[int, int]]) -> list[Keep]:
    """Per model, the largest magnitudes up to the first rank without those up to the second."""
    keep: list[Keep] = [None] * len(inputs.xs)
    chosen = []
    for i, (d, (last, outliers)) in enumerate(zip(density, ranks, strict=True)):
        if last <= outliers:
            keep[i] = NOTHING
        elif d < 1 and inputs.xs[i].numel():
            chosen.append((i, [r for r in (last, outliers) if r]))
    if chosen:
        found = kth_magnitudes(
            [inputs.xs[i] for i, _ in chosen],
            [r for _, r in chosen],
            base=inputs.base,
            rounded=inputs.host == "mergekit",
            backend=inputs.backend,
        )
        for (i, _), thresholds in zip(chosen, found, strict=True):
            keep[i] = Band(*thresholds) if len(thresholds) == 2 else thresholds[0]
    return keep


def at_random(inputs: Inputs, density: list[float]) -> list[Keep]:
    """Each element with probability density."""
    if inputs.host is None:
        return [Bernoulli(d, inputs.seed, inputs.name, i) for i, d in enumerate(density)]
    return [
        None if d >= 1 else host_masks.bernoulli(x, d)
        for x, d in zip(inputs.xs, density, strict=True)
    ]


MAGNITUDE = Trim("the largest magnitudes", (), by_magnitude)
OUTLIERS = Trim(
    "large magnitudes but not the largest",
    (Parameter("gamma", float, "model", 0.01, "share of outliers to drop", bounds=(0, 1)),),
    without_outliers,
)
RANDOM = Trim("elements at random", (), at_random)


# ---- the recipe ------------------------------------------------------------------------------


def combine(
    inputs: Inputs,
    weight: list[float],
    keep: list[Keep] | None,
    rescale: str | list[float] | None,
    elect: str | None,
    normalize: bool,
    scale: float,
) -> Tensor:
    """merge_deltas with the steps of the host."""
    options: dict[str, Any] = {"normalize": normalize}
    if inputs.host == "mergekit":
        options["rounding"] = "host"
    elif inputs.host == "sd_mecha":
        elect = "count"
        options = {"weigh": "after", "normalize": "count", "zero": "none"}
    elif inputs.host == "peft":
        options["divide"] = True
        if inputs.xs[0].dtype == torch.float32:  # PEFT computes 16-bit types in float32
            options["rounding"] = "host"
        if elect:
            options |= {"weigh": "after", "normalize": "count"}
    return merge_deltas(
        inputs.base,
        inputs.xs,
        weight,
        keep=keep,
        rescale=rescale,
        elect=elect,
        scale=scale,
        out_dtype=inputs.out_dtype,
        backend=inputs.backend,
        **options,
    )


def host_factors(inputs: Inputs, keep: list[Keep]) -> list[float]:
    """What restores the L1 norms as mergekit sums them."""
    assert inputs.base is not None  # base="required"
    base = inputs.base
    return [host_masks.l1_factor(x, base, k) for x, k in zip(inputs.xs, keep, strict=True)]


def _recipe(trim: Trim | None, elect: str | None) -> Callable[..., Tensor]:
    def merge(
        inputs: Inputs,
        *,
        weight: list[float],
        density: list[float],
        normalize: bool,
        rescale: bool,
        lambda_: float,
        int8_mask: bool,
        **special: Any,
    ) -> Tensor:
        keep = trim.rules(inputs, density, **special) if trim else None
        restored: str | list[float] | None = "l1" if rescale and keep else None
        if keep and restored and inputs.host == "mergekit":
            restored = host_factors(inputs, keep)
        elif restored and inputs.host == "peft":  # by the probability, not the norm
            restored = [d or 1.0 for d in density]
        return combine(inputs, weight, keep, restored, elect, normalize, lambda_)

    return merge


def _kept(trim: Trim | None) -> Callable[..., list[Keep] | None]:
    def kept(inputs: Inputs, *, density: list[float], **others: Any) -> list[Keep] | None:
        if trim is None:
            return [None] * len(inputs.xs)
        if trim is RANDOM and inputs.host is not None:  # drawn from torch's generator, once
            return None
        return trim.rules(inputs, density, **{p.name: others[p.name] for p in trim.parameters})

    return kept


# ---- the methods -----------------------------------------------------------------------------

_MERGEKIT = (
    "bits on a CPU for float32, bfloat16 and float16, with NaN, infinities and both zeros: {}. "
    "Exception: with 5 or more float32 models torch sums in another order"
)
_TIES = "which of equal magnitudes are kept is undefined there, lowest index first here"
_TRIM = _TIES + "; a density of 0 drops a NaN there and keeps it here"
_DRAWS = "masks are drawn from torch's generator in its order"
_PEFT = (
    "bits of the merged task vector on a CPU for float32 and up to 4 models, with NaN and "
    "infinities: {}"
)
_PEFT_DRAWS = _DRAWS + "; a density of 0, which gives NaN there, gives the base"
_MECHA = (
    "bits of the merged task vector (`ties_sum` with k = density) for finite float32, weights of 1 "
    "and up to 4 models: keeps every tie of the least magnitude kept, each model has one vote, a "
    "tied vote gives 0"
)


def parameters(
    what: str | None, normalize: bool, rescale: bool, *special: Parameter
) -> tuple[Parameter, ...]:
    """Those that all of these methods share."""
    used = f"share of each task vector to keep: {what}" if what else "not used by this method"
    return (
        Parameter("weight", float, "model", REQUIRED, "weight of the task vector"),
        Parameter("density", float, "model", 1.0, used, bounds=(0, 1)),
        *special,
        Parameter("normalize", bool, "tensor", normalize, "divide by the weights that voted"),
        Parameter("rescale", bool, "tensor", rescale, "restore the L1 norm lost by dropping"),
        Parameter("lambda", float, "tensor", 1.0, "factor on the merged task vector"),
        Parameter("int8_mask", bool, "tensor", False, "accepted; changes no result"),
    )


def _method(
    name: str,
    doc: str,
    *,
    trim: Trim | None,
    elect: str | None,
    normalize: bool,
    rescale: bool,
    parity: dict[str, str],
) -> Method:
    special = trim.parameters if trim else ()
    return Method(
        name,
        doc,
        base="required",
        models=(1, None),
        parameters=parameters(trim.doc if trim else None, normalize, rescale, *special),
        merge=_recipe(trim, elect),
        parity=parity,
        kept=_kept(trim),
    )


TASK_ARITHMETIC = _method(
    "task_arithmetic",
    "base + lambda * sum_i weight_i (x_i - base) (Ilharco et al., 2212.04089).",
    trim=None,
    elect=None,
    normalize=False,
    rescale=False,
    parity={
        "mergekit": _MERGEKIT.format("nothing is selected"),
        "peft": _PEFT.format("nothing is selected"),
    },
)
TIES = _method(
    "ties",
    "Trim each task vector to its largest magnitudes, elect a sign per element, average what "
    "agrees (Yadav et al., 2306.01708).",
    trim=MAGNITUDE,
    elect="sum",
    normalize=True,
    rescale=False,
    parity={
        "mergekit": _MERGEKIT.format(_TRIM),
        "peft": _PEFT.format(_TIES),
        "sd_mecha": _MECHA,
    },
)
DARE_LINEAR = _method(
    "dare_linear",
    "Drop elements of each task vector at random, rescale, add (Yu et al., 2311.03099).",
    trim=RANDOM,
    elect=None,
    normalize=False,
    rescale=True,
    parity={"mergekit": _MERGEKIT.format(_DRAWS), "peft": _PEFT.format(_PEFT_DRAWS)},
)
DARE_TIES = _method(
    "dare_ties",
    "DARE's random drop with the sign election of TIES.",
    trim=RANDOM,
    elect="sum",
    normalize=False,
    rescale=True,
    parity={"mergekit": _MERGEKIT.format(_DRAWS), "peft": _PEFT.format(_PEFT_DRAWS)},
)
BREADCRUMBS = _method(
    "breadcrumbs",
    "Drop the largest magnitudes of each task vector as outliers, and the smallest (Davari and "
    "Belilovsky, 2312.06795).",
    trim=OUTLIERS,
    elect=None,
    normalize=False,
    rescale=False,
    parity={"mergekit": _MERGEKIT.format(_TIES)},
)
BREADCRUMBS_TIES = _method(
    "breadcrumbs_ties",
    "Breadcrumbs with the sign election of TIES.",
    trim=OUTLIERS,
    elect="sum",
    normalize=False,
    rescale=False,
    parity={"mergekit": _MERGEKIT.format(_TIES)},
)


def _magnitude_prune(
    inputs: Inputs, *, weight: list[float], density: list[float], lambda_: float
) -> Tensor:
    return combine(inputs, weight, by_magnitude(inputs, density), None, None, False, lambda_)


MAGNITUDE_PRUNE = Method(
    "magnitude_prune",
    "Trim each task vector to its largest magnitudes and add them (PEFT `magnitude_prune`).",
    base="required",
    models=(1, None),
    parameters=(
        Parameter("weight", float, "model", REQUIRED, "weight of the task vector"),
        Parameter("density", float, "model", 1.0, MAGNITUDE.doc, bounds=(0, 1)),
        Parameter("lambda", float, "tensor", 1.0, "factor on the merged task vector"),
    ),
    merge=_magnitude_prune,
    kept=_kept(MAGNITUDE),
    parity={"peft": _PEFT.format(_TIES)},
)
