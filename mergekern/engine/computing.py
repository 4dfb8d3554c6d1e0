"""What a unit becomes: its parts computed, one by one or end to end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..methods.registry import Inputs
from .ahead import Arrived
from .config import MergeConfig
from .place import Place, Sent
from .plan import Plan, Task
from .progress import Bar
from .ranks import ALONE, Ranks
from .report.numbers import Row, numbers_of_slices
from .units import Part


@dataclass(frozen=True)
class Settings:
    config: MergeConfig
    device: str
    seed: int
    backend: str
    host: str | None
    memory: int
    bar: Bar
    ranks: Ranks = ALONE
    report: bool = False  # whether numbers of each slice are wanted


class Computed(NamedTuple):
    """Results of a part on their way back, one per point; per point numbers of each slice."""

    results: Sent
    rows: list[list[Row]]


class Computing:
    """The arithmetic of one plan, at a place."""

    def __init__(self, plan: Plan, settings: Settings, place: Place) -> None:
        self._plan, self._settings, self._place = plan, settings, place
        self._method = settings.config.method

    def unit(self, arrived: Arrived, found: Sequence[Any]) -> list[Computed]:
        """The results of a unit: of tensors that the method may join, in one call."""
        computed = []
        parts = list(zip(arrived.unit.parts, arrived.sent, strict=True))
        for joins, run in itertools.groupby(parts, lambda each: self._joins(each[0])):
            together = list(run)
            if joins is not None and len(together) > 1:
                computed += self._compute_joined(*zip(*together, strict=True))
            else:
                computed += [self._compute(part, sent, found) for part, sent in together]
        return computed

    def _joins(self, part: Part) -> Any:
        """Equal for whole tensors that may be merged end to end; None for others."""
        settings, task = self._settings, self._plan.tasks[part.task]
        alone = settings.host is not None or settings.report or len(task.slices) > 1
        if alone or task.arguments is None:
            return None
        if math.prod(task.shape) >= min(map(self._method.joins, task.arguments)):
            return None
        return task.sources, task.stored, task.compute, task.result, task.arguments

    def _compute_joined(self, parts: Sequence[Part], sent: Sequence[Sent]) -> list[Computed]:
        task = self._plan.tasks[parts[0].task]
        sizes = [len(each.tensors[0]) for each in sent]
        each_source = zip(*map(self._place.receive, sent), strict=True)
        tensors = [torch.cat(pieces).to(task.compute) for pieces in each_source]
        inputs = replace(self._inputs(task, tensors), sizes=sizes)
        made = [
            self._method.merge(inputs, **arguments).to(task.result)
            for arguments in task.arguments or ()
        ]
        fetched = self._place.fetch(made)
        points = [torch.split(result, sizes) for result in fetched.tensors]
        return [
            Computed(Sent(list(results), fetched.arrived), [])
            for results in zip(*points, strict=True)
        ]

    def _compute(self, part: Part, sent: Sent, found: Sequence[Any]) -> Computed:
        """The result of a part, flat, for each point."""
        task = self._plan.tasks[part.task]
        if task.arguments is None:
            copied = sent.tensors[0].to(task.compute).to(task.result)
            return Computed(Sent([copied] * len(self._plan.points)), [])
        inputs = self.inputs(part, self._place.receive(sent))
        results, rows = [], []
        for arguments, survey in zip(task.arguments, found, strict=True):
            these = replace(inputs, survey=survey)
            result = self._method.merge(these, **arguments).to(task.result).view(-1)
            results.append(result)
            if self._settings.report:
                ranges = [(a - inputs.offset, b - inputs.offset) for a, b in self.slices(part)]
                about = numbers_of_slices(these, arguments, self._method, result, ranges)
                rows.append(about)
        return Computed(self._place.fetch(results), rows)

    def slices(self, part: Part) -> Sequence[tuple[int, int]]:
        return self._plan.tasks[part.task].slices[part.first : part.last]

    def inputs(self, part: Part, tensors: Sequence[Tensor]) -> Inputs:
        """A part as its method takes it, of flat tensors as they are stored."""
        task = self._plan.tasks[part.task]
        whole = part.last - part.first == len(task.slices)
        shaped = [x.view(_shape(task, whole)).to(dtype=task.compute) for x in tensors]
        return replace(
            self._inputs(task, shaped),
            offset=task.slices[part.first][0],
            shape=None if whole else task.shape,
            order=part.task,
        )

    def _inputs(self, task: Task, tensors: list[Tensor]) -> Inputs:
        settings, apart = self._settings, self._settings.config.base_apart
        return Inputs(
            xs=tensors[apart:],
            base=tensors[0] if apart else None,
            name=task.key,
            seed=settings.seed,
            out_dtype=task.compute if settings.host == "mergekit" else task.result,
            backend=settings.backend,
            host=settings.host,
            models=[i - apart for i in task.sources[apart:]],
        )


def _shape(task: Task, whole: bool) -> tuple[int, ...]:
    if whole:
        return task.shape
    return (-1, *task.shape[1:]) if task.cut == "rows" else (-1,)
