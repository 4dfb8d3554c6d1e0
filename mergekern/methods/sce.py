"""SCE: select where models disagree, weigh by what they changed there, erase minority signs."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..keep import Keep, Mask, Threshold
from ..ops.merge_deltas import merge_deltas
from ..ops.variance_mask import VarianceMask, WholeVariance, variance_mask, variance_threshold
from . import slices
from .passes import Passes, Study
from .registry import Inputs, Method, Parameter, anywhere


class Chosen(NamedTuple):
    """What was measured: the threshold of the variances, and per model its squares above it."""

    threshold: Threshold | None  # None: everything is kept
    squares: list[float]


def sce(inputs: Inputs, *, select_topk: float, int8_mask: bool) -> Tensor:
    known: Chosen | None = inputs.survey
    if known is not None:
        return _merge(inputs, _masked(inputs, known.threshold).mask, known.squares)
    parts = list(slices.parts(inputs, "elements"))
    if len(parts) == 1:
        found = variance_mask(inputs.xs, select_topk, base=inputs.base, backend=inputs.backend)
        return _merge(inputs, *found)
    threshold = None
    if select_topk < 1:
        threshold = variance_threshold(
            inputs.xs, select_topk, base=inputs.base, backend=inputs.backend
        )
    masks = [_masked(one, threshold) for one in parts]
    squares = functools.reduce(_added, (m.squares for m in masks))
    out = torch.empty(inputs.xs[0].shape, dtype=inputs.out_dtype, device=inputs.xs[0].device)
    for one, masked in zip(parts, masks, strict=True):
        _merge(one, masked.mask, squares, slices.of(out, one, "elements"))
    return out


def _kept(inputs: Inputs, *, select_topk: float, **_: Any) -> list[Keep]:
    known: Chosen | None = inputs.survey
    if known is not None:
        mask = _masked(inputs, known.threshold).mask
    else:
        mask = variance_mask(inputs.xs, select_topk, base=inputs.base, backend=inputs.backend).mask
    return [mask] * len(inputs.xs)


def _masked(inputs: Inputs, threshold: Threshold | None) -> VarianceMask:
    """The mask of a slice, and the squares under it."""
    rule = 1.0 if threshold is None else threshold.from_index(inputs.offset)
    return variance_mask(inputs.xs, rule, base=inputs.base, backend=inputs.backend)


def _added(a: list[float], b: list[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _merge(
    inputs: Inputs, mask: Mask | None, squares: list[float], out: Tensor | None = None
) -> Tensor:
    n = len(inputs.xs)
    total = sum(squares)
    if not math.isfinite(total):
        # The share of every model is undefined, and with it every element.
        out = torch.empty_like(inputs.xs[0], dtype=inputs.out_dtype) if out is None else out
        return out.fill_(math.nan)
    # As mergekit: below this no model counts for more than another.
    small = abs(total / max(1, inputs.total)) < 1e-6
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
        out=out,
        backend=inputs.backend,
    )


class _Measure:
    """The passes over the slices of one tensor."""

    def __init__(self) -> None:
        self._whole: WholeVariance | None = None
        self._threshold: Threshold | None = None
        self._cut = 0
        self._squares: list[float] = []

    def passes(self) -> Passes:
        yield self._count
        if self._whole is not None:
            self._whole.end_pass()
            while self._whole.unfinished:
                yield self._count
                self._whole.end_pass()
            (self._threshold,) = self._whole.thresholds
            if self._whole.splits_ties:
                yield self._place
                self._threshold = self._threshold._replace(cut=self._cut)
            yield self._square
        return Chosen(self._threshold, self._squares)

    def _count(self, inputs: Inputs, *, select_topk: float, **_: Any) -> None:
        if select_topk >= 1:
            self._square(inputs)
        else:
            if self._whole is None:
                self._whole = WholeVariance(select_topk, inputs.backend)
            self._whole.update(inputs.xs, inputs.base, inputs.shared)

    def _place(self, inputs: Inputs, **_: Any) -> None:
        assert self._whole is not None
        (rule,) = self._whole.rules(inputs.xs, inputs.base)
        if rule.cut:
            self._cut = inputs.offset + rule.cut

    def _square(self, inputs: Inputs, **_: Any) -> None:
        more = _masked(inputs, self._threshold).squares
        self._squares = _added(self._squares, more) if self._squares else more


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
    kept=_kept,
    cut=anywhere,
    measure=Study(lambda gather: _Measure().passes()),
)
