"""RAM: what only one model changed is added whole, what several changed is averaged."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..check import accumulator
from ..keep import Keep, above
from ..ops.merge_deltas import merge_deltas
from .passes import Gather, Passes, Study
from .registry import Inputs, Method, Parameter, anywhere

_CHUNK = 1 << 18


def kept(inputs: Inputs, *, epsilon: float, **_: Any) -> list[Keep]:
    return [above(_rounded(epsilon, inputs))] * len(inputs.xs)


def _merge(inputs: Inputs, epsilon: float, alone: list[float] | None) -> Tensor:
    return merge_deltas(
        inputs.base,
        inputs.xs,
        [1.0] * len(inputs.xs),
        keep=kept(inputs, epsilon=epsilon),
        elect="present",
        normalize="count",
        alone=alone,
        out_dtype=inputs.out_dtype,
        backend=inputs.backend,
    )


def _rounded(epsilon: float, inputs: Inputs) -> float:
    """The largest number of the accumulator that is not above epsilon."""
    value = torch.tensor(epsilon, dtype=accumulator(inputs.xs[0].dtype))
    if float(value) > epsilon:
        value = torch.nextafter(value, torch.zeros_like(value))
    return float(value)


def ram(inputs: Inputs, *, epsilon: float) -> Tensor:
    return _merge(inputs, epsilon, None)


def ramplus_tl(inputs: Inputs, *, epsilon: float, r: float, alpha: float) -> Tensor:
    known: Counts | None = inputs.survey
    shared, unique = _counts(inputs, epsilon) if known is None else known
    # Where a model changed nothing alone, its factor is used nowhere.
    ratios = [s / max(u, epsilon) if u else 0.0 for s, u in zip(shared, unique, strict=True)]
    return _merge(inputs, epsilon, [1 + r * min(max(ratio, 0.0), alpha) for ratio in ratios])


Counts = tuple[list[int], list[int]]


def _measure(gather: Gather) -> Passes:
    shared: list[int] = []
    unique: list[int] = []

    def count(inputs: Inputs, *, epsilon: float, **_: Any) -> None:
        for total, more in zip((shared, unique), _counts(inputs, epsilon), strict=True):
            total[:] = [a + b for a, b in zip(total or [0] * len(more), more, strict=True)]

    yield count
    return shared, unique


def _counts(inputs: Inputs, epsilon: float) -> Counts:
    """Per model, how many of its changed elements others changed too, and how many it alone."""
    epsilon = _rounded(epsilon, inputs)
    acc, n = accumulator(inputs.xs[0].dtype), len(inputs.xs)
    flat = [x.reshape(-1) for x in inputs.xs]
    base = torch.zeros_like(flat[0]) if inputs.base is None else inputs.base.reshape(-1)
    shared, unique = [0] * n, [0] * n
    for at in range(0, len(base), _CHUNK):
        part = slice(at, at + _CHUNK)
        origin = base[part].to(acc)
        # Not |d| <= epsilon: a NaN is a change.
        changed = [~((x[part].to(acc) - origin).abs() <= epsilon) for x in flat]
        count = sum(c.to(torch.int32) for c in changed)
        for i, c in enumerate(changed):
            alone = int((c & (count == 1)).sum())
            unique[i] += alone
            shared[i] += int(c.sum()) - alone
    return shared, unique


_EPSILON = Parameter(
    "epsilon", float, "tensor", 1e-5, "changes up to this do not count", bounds=(0, math.inf)
)

RAM = Method(
    "ram",
    "base + per element the mean of the task vectors that change it by more than epsilon "
    "(2601.13572).",
    base="required",
    models=(1, None),
    parameters=(_EPSILON,),
    merge=ram,
    cut=anywhere,
    kept=kept,
)
RAMPLUS_TL = Method(
    "ramplus_tl",
    "RAM, with what only model i changed times 1 + r * clamp(shared_i / unique_i, 0, alpha).",
    base="required",
    models=(1, None),
    parameters=(
        _EPSILON,
        Parameter("r", float, "tensor", 0.1, "strength of the correction"),
        Parameter("alpha", float, "tensor", 0.2, "its limit"),
    ),
    merge=ramplus_tl,
    cut=anywhere,
    measure=Study(_measure),
    kept=kept,
)
