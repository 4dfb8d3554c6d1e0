"""Generalized task arithmetic: what to keep of each task vector, whose sign wins, how to add.

As mergekit's methods of these names, with these differences: arithmetic in float32 with one
rounding (mergekit rounds to the tensor's dtype after each step), ties of a trim go to the lowest
index (mergekit: undefined), masks are keyed by seed, tensor and model (mergekit: by call order).
host="mergekit", "peft" and "sd_mecha" take the other side of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..keep import Keep
from ..ops.merge_deltas import merge_deltas
from . import host_masks
from .registry import REQUIRED, Inputs, Method, Parameter
from .trims import (
    Kept,
    Trim,
    cut_of,
    factors,
    joins_of,
    largest,
    measure_of,
    needs_of,
    without_outliers,
)

MAGNITUDE = Trim("the largest magnitudes", (), largest)
OUTLIERS = Trim(
    "large magnitudes but not the largest",
    (Parameter("gamma", float, "model", 0.01, "share of outliers to drop", bounds=(0, 1)),),
    without_outliers,
)
RANDOM = Trim("elements at random", (), None)


# ---- the recipe ------------------------------------------------------------------------------


def combine(
    inputs: Inputs,
    weight: list[float],
    keep: list[Keep] | None,
    rescale: list[float] | None,
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


def _kept(
    trim: Trim, inputs: Inputs, density: list[float], special: dict[str, Any]
) -> tuple[list[Keep], list[float] | None]:
    """What to keep, and what restores the norms if it was measured."""
    known: Kept | None = inputs.survey
    if known is None:
        return trim.rules(inputs, density, **special), None
    return known.keep(inputs, density), known.factors


def _restoring(inputs: Inputs, keep: list[Keep], density: list[float]) -> list[float]:
    if inputs.host == "mergekit":
        return host_factors(inputs, keep)
    if inputs.host == "peft":  # by the probability, not the norm
        return [d or 1.0 for d in density]
    return factors(inputs, keep)


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
        keep, restored = None, None
        if trim:
            keep, known = _kept(trim, inputs, density, special)
            if rescale:
                restored = known or _restoring(inputs, keep, density)
        return combine(inputs, weight, keep, restored, elect, normalize, lambda_)

    return merge


def _kept_by(trim: Trim | None) -> Callable[..., list[Keep] | None]:
    def kept(inputs: Inputs, *, density: list[float], **others: Any) -> list[Keep] | None:
        if trim is None:
            return [None] * len(inputs.xs)
        if trim is RANDOM and inputs.host is not None:  # drawn from torch's generator, once
            return None
        special = {p.name: others[p.name] for p in trim.parameters}
        return _kept(trim, inputs, density, special)[0]

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


TRIMMED_BY = ("density", "gamma", "rescale")  # on these a measure depends


def _method(
    name: str,
    doc: str,
    *,
    trim: Trim | None,
    elect: str | None,
    normalize: bool,
    rescale: bool,
    parity: dict[str, str],
    draws: frozenset[str] = frozenset(),
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
        cut=cut_of(trim),
        measure=None if trim is None else measure_of(trim),
        needs=needs_of(trim),
        draws=draws,
        joins=joins_of(trim),
        studied=TRIMMED_BY,
        kept=_kept_by(trim),
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
    draws=frozenset({"mergekit", "peft"}),
)
DARE_TIES = _method(
    "dare_ties",
    "DARE's random drop with the sign election of TIES.",
    trim=RANDOM,
    elect="sum",
    normalize=False,
    rescale=True,
    parity={"mergekit": _MERGEKIT.format(_DRAWS), "peft": _PEFT.format(_PEFT_DRAWS)},
    draws=frozenset({"mergekit", "peft"}),
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
    keep, _ = _kept(MAGNITUDE, inputs, density, {})
    return combine(inputs, weight, keep, None, None, False, lambda_)


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
    kept=_kept_by(MAGNITUDE),
    parity={"peft": _PEFT.format(_TIES)},
    cut=cut_of(MAGNITUDE),
    joins=joins_of(MAGNITUDE),
    measure=measure_of(MAGNITUDE),
    needs=needs_of(MAGNITUDE),
    studied=TRIMMED_BY,
)
