"""TIES as the paper has it: one threshold per task vector over the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..check import accumulator
from ..keep import NOTHING, Keep, Threshold, from_index
from ..ops.kth_magnitude import WholeModel
from ..ops.merge_deltas import merge_deltas
from .passes import Gather, Passes, Study
from .registry import Inputs, Method, Parameter, anywhere

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


Group = tuple[int, float]  # model and density: its tensors of one density are one vector
_Ties = dict[Group, list[tuple[tuple[int, int], int]]]  # ((order, offset), ties) of every piece


class _Survey:
    """The passes over the tensors of one process."""

    def __init__(self, gather: Gather) -> None:
        self._gather = gather
        self._hosts: set[str | None] = set()
        self._keep: dict[tuple[str, int], Keep] = {}
        self._groups: dict[tuple[str, int], Group] = {}
        self._wholes: dict[Group, WholeModel] = {}
        self._cuts: dict[tuple[str, int], int] = {}
        self._orders: dict[str, int] = {}
        self._ties: _Ties = {}
        self._balance = 0

    def passes(self) -> Passes:
        yield self._count
        self._hosts = set().union(*self._gather(self._hosts))
        for group in sorted(set().union(*self._gather(set(self._wholes)))):
            self._wholes.setdefault(group, self._whole(group))
        yield from self._descend()
        every_tie = bool(self._hosts & set(_PLUS_ONE))
        if not every_tie and any(w.splits_ties for w in self._wholes.values()):
            if len(self._gather(None)) > 1:
                yield self._tally
                self._gather_ties()
            yield self._place
        keep = self._rules()
        if not every_tie:
            return Found(keep, "positive")
        self._keep = keep
        yield self._weigh
        return Found(keep, "positive" if sum(self._gather(self._balance)) > 0 else "negative")

    def _descend(self) -> Passes:
        while True:
            for group in sorted(self._wholes):
                if self._wholes[group].unfinished:
                    self._wholes[group].end_pass(self._gather)
            if not any(w.unfinished for w in self._wholes.values()):
                return
            yield self._count

    def _whole(self, group: Group, backend: str = "auto") -> WholeModel:
        host = next(iter(self._hosts))
        return WholeModel([_rank(host, group[1])], backend)

    def _count(self, inputs: Inputs, *, density: list[float], **_: Any) -> None:
        self._hosts.add(inputs.host)
        for i, x, d in zip(_models(inputs), inputs.xs, density, strict=True):
            if d >= 1 or (d <= 0 and inputs.host not in _PLUS_ONE):
                self._keep[inputs.name, i] = None if d >= 1 else NOTHING
            elif x.numel():
                self._groups[inputs.name, i] = i, d
                if (i, d) not in self._wholes:
                    self._wholes[i, d] = self._whole((i, d), inputs.backend)
                if self._wholes[i, d].unfinished:
                    self._wholes[i, d].update([x], inputs.base, inputs.shared)

    # Of equal magnitudes the first in the order of the plan stay, and within a tensor by index.

    def _vectors(self, inputs: Inputs) -> Iterator[tuple[int, Tensor, Group, tuple[int, int]]]:
        """(model, tensor, group, place) of those whose equal magnitudes are divided."""
        seen = self._orders.setdefault(inputs.name, len(self._orders))
        place = (seen if inputs.order is None else inputs.order, inputs.offset)
        for i, x in zip(_models(inputs), inputs.xs, strict=True):
            group = self._groups.get((inputs.name, i))
            if group is not None and self._wholes[group].splits_ties:
                yield i, x, group, place

    def _tally(self, inputs: Inputs, **others: Any) -> None:
        for _, x, group, place in self._vectors(inputs):
            (ties,) = self._wholes[group].count_ties([x], inputs.base)
            self._ties.setdefault(group, []).append((place, ties))

    def _gather_ties(self) -> None:
        every: _Ties = {}
        for theirs in self._gather(self._ties):
            for group, ties in theirs.items():
                every.setdefault(group, []).extend(ties)
        self._ties = every

    def _place(self, inputs: Inputs, **_: Any) -> None:
        for i, x, group, place in self._vectors(inputs):
            before = None
            if self._ties:
                before = [sum(ties for at, ties in self._ties[group] if at < place)]
            (rule,) = self._wholes[group].rules([x], inputs.base, before)
            if rule.cut:
                self._cuts[inputs.name, i] = inputs.offset + rule.cut

    def _rules(self) -> dict[tuple[str, int], Keep]:
        """Of the tensors of all processes."""
        keep: dict[tuple[str, int], Keep] = {}
        cuts: dict[tuple[str, int], int] = {}
        groups: dict[tuple[str, int], Group] = {}
        for its_keep, its_groups, its_cuts in self._gather((self._keep, self._groups, self._cuts)):
            keep |= its_keep
            groups |= its_groups
            for name, cut in its_cuts.items():
                cuts[name] = max(cut, cuts.get(name, 0))
        for name, group in groups.items():
            (found,) = self._wholes[group].thresholds
            split = self._wholes[group].splits_ties and not self._hosts & set(_PLUS_ONE)
            keep[name] = found._replace(cut=cuts.get(name, 0)) if split else found
        return dict(sorted(keep.items()))

    def _weigh(self, inputs: Inputs, **_: Any) -> None:
        """Signs of the sum of the whole vector: a tied vote takes that of more elements."""
        for s in _sums(inputs, [self._keep.get((inputs.name, i)) for i in _models(inputs)]):
            self._balance += int((s > 0).sum()) - int((s < 0).sum())


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
    return [from_index(found.keep.get((inputs.name, i)), inputs.offset) for i in _models(inputs)]


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
    cut=anywhere,
    parity={
        "fusion_bench": "bits for float32 up to 4 models: keeps int(density n) + 1 of n and every "
        "tie, a tied vote takes the majority sign of the whole vector, negative if it has none "
        "(with merge_func max the result is 0 there)",
        "knots": "the rules of fusion_bench",
    },
    survey=Study(lambda gather: _Survey(gather).passes()),
    studied=("density",),
    kept=kept,
)
