"""TIES as the paper has it: one threshold per task vector over the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..check import accumulator
from ..keep import NOTHING, Keep, Threshold
from ..ops.kth_magnitude import WholeModel, ties_of
from ..ops.merge_deltas import merge_deltas
from .registry import Inputs, Method, Parameter, Visit

_CHUNK = 1 << 18
_PLUS_ONE = ("fusion_bench", "knots")  # hosts that keep one more, and every tie with it
_COMBINE: dict[str, dict[str, Any]] = {
    "mean": {"normalize": "count"},
    "sum": {},
    "max": {"combine": "max"},
}


class Found(NamedTuple):
    """What the survey found: what to keep by tensor and model, and the sign of a tied vote."""

    keep: dict[tuple[str, int], Keep]
    zero: str


def _models(inputs: Inputs) -> Sequence[int]:
    return range(len(inputs.xs)) if inputs.models is None else inputs.models


def _rank(host: str | None, density: float) -> Callable[[int], int]:
    """k of a model with that many elements."""
    if host in _PLUS_ONE:
        return lambda total: min(int(density * total) + 1, total)
    return lambda total: max(1, int(density * total))


def survey(visit: Visit) -> Found:
    wholes: dict[int, WholeModel] = {}
    keep: dict[tuple[str, int], Keep] = {}
    hosts: set[str | None] = set()

    def count(inputs: Inputs, *, density: list[float], **_: Any) -> None:
        hosts.add(inputs.host)
        for i, x, d in zip(_models(inputs), inputs.xs, density, strict=True):
            if d >= 1 or (d <= 0 and inputs.host not in _PLUS_ONE):
                keep[inputs.name, i] = None if d >= 1 else NOTHING
            elif x.numel():
                whole = wholes.setdefault(i, WholeModel(_rank(inputs.host, d), inputs.backend))
                if whole.unfinished:
                    whole.update(x, inputs.base)

    visit(count)
    while unfinished := [w for w in wholes.values() if w.unfinished]:
        for whole in unfinished:
            whole.end_pass()
        if any(w.unfinished for w in unfinished):
            visit(count)

    left = {i: whole.ties for i, whole in wholes.items()}

    def place(inputs: Inputs, **_: Any) -> None:
        """Ties are kept in the order of the tensors, and within them by index."""
        for i, x in zip(_models(inputs), inputs.xs, strict=True):
            if i not in wholes or (inputs.name, i) in keep:
                continue
            threshold = wholes[i].threshold
            if inputs.host not in _PLUS_ONE and left[i] < threshold.equal and x.numel():
                ties, cut = ties_of(x, threshold.value, left[i], inputs.base, inputs.backend)
                left[i] -= ties
                threshold = threshold._replace(cut=cut)
            keep[inputs.name, i] = threshold

    visit(place)
    if not hosts & set(_PLUS_ONE):
        return Found(keep, "positive")
    return Found(keep, _majority(visit, keep))


def _majority(visit: Visit, keep: dict[tuple[str, int], Keep]) -> str:
    """The sign that more elements of the whole vector have after the sum; negative if neither."""
    balance = 0

    def count(inputs: Inputs, **_: Any) -> None:
        nonlocal balance
        for s in _sums(inputs, [keep.get((inputs.name, i)) for i in _models(inputs)]):
            balance += int((s > 0).sum()) - int((s < 0).sum())

    visit(count)
    return "positive" if balance > 0 else "negative"


def _sums(inputs: Inputs, keep: list[Keep]) -> Iterator[Tensor]:
    """Sums of the kept task vectors, in chunks."""
    acc = accumulator(inputs.xs[0].dtype)
    assert inputs.base is not None  # base="required"
    flat, base = [x.reshape(-1) for x in inputs.xs], inputs.base.reshape(-1)
    for at in range(0, len(base), _CHUNK):
        part = slice(at, at + _CHUNK)
        origin = base[part].to(acc)
        total = torch.zeros_like(origin)
        for x, rule in zip(flat, keep, strict=True):
            d = x[part].to(acc) - origin
            # These hosts keep every tie; a NaN is above every threshold.
            kept = ~(d.abs() < rule.value) if isinstance(rule, Threshold) else None
            total += d if kept is None else torch.where(kept, d, 0)
        yield total


def kept(inputs: Inputs, **_: Any) -> list[Keep]:
    found: Found = inputs.survey
    return [found.keep.get((inputs.name, i)) for i in _models(inputs)]


def ties_global(
    inputs: Inputs,
    *,
    weight: list[float],
    density: list[float],
    merge_func: str,
    lambda_: float,
) -> Tensor:
    found: Found = inputs.survey
    return merge_deltas(
        inputs.base,
        inputs.xs,
        weight,
        keep=kept(inputs),
        elect="sum",
        zero=found.zero,
        scale=lambda_,
        out_dtype=inputs.out_dtype,
        backend=inputs.backend,
        **_COMBINE[merge_func],
    )


TIES_GLOBAL = Method(
    "ties_global",
    "TIES with one threshold per task vector over the whole model, as in the paper (Yadav et al., "
    "2306.01708), FusionBench and KnOTS; `ties` trims each tensor by itself, as mergekit and PEFT.",
    base="required",
    models=(1, None),
    parameters=(
        Parameter("weight", float, "model", 1.0, "weight of the task vector"),
        Parameter("density", float, "model", 0.2, "share of the model to keep", bounds=(0, 1)),
        Parameter(
            "merge_func",
            str,
            "tensor",
            "mean",
            "mean of those that agree, sum, or the largest",
            choices=tuple(_COMBINE),
        ),
        Parameter("lambda", float, "tensor", 1.0, "factor on the merged task vector"),
    ),
    merge=ties_global,
    parity={
        "fusion_bench": "bits for float32 up to 4 models: keeps int(density n) + 1 of n and every "
        "tie, a tied vote takes the majority sign of the whole vector, negative if it has none "
        "(with merge_func max the result is 0 there)",
        "knots": "the rules of fusion_bench",
    },
    survey=survey,
    kept=kept,
)
