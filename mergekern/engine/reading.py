"""Slices of the inputs, into buffers that serve again, with their digests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .files.formats import bytes_of
from .journal import digest_of
from .plan import Plan
from .units import Part, Unit


class Loaded(NamedTuple):
    """The tensors of a part, flat and as stored, one of each source."""

    part: Part
    tensors: list[Tensor]
    digests: list[tuple[str, ...]]  # of each slice, of each source


class Reader:
    def __init__(self, plan: Plan, checkpoints: Sequence[Checkpoint]) -> None:
        self._plan = plan
        self._where = [[checkpoints[i].locate(t.key) for i in t.sources] for t in plan.tasks]

    def sizes(self, unit: Unit) -> list[int]:
        """Bytes of the buffers that `load` fills: one for each part and source."""
        return [
            count * dtype.itemsize
            for part in unit.parts
            for count in [self._extent(part)[1] - self._extent(part)[0]]
            for dtype in self._plan.tasks[part.task].stored
        ]

    def _extent(self, part: Part) -> tuple[int, int]:
        ranges = self._plan.tasks[part.task].slices
        return ranges[part.first][0], ranges[part.last - 1][1]

    def load(self, unit: Unit, buffers: Sequence[Tensor]) -> list[Loaded]:
        left = iter(buffers)
        found = []
        for part in unit.parts:
            task = self._plan.tasks[part.task]
            begin, end = self._extent(part)
            tensors, digests = [], []
            for (file, name), dtype in zip(self._where[part.task], task.stored, strict=True):
                raw = next(left)[: (end - begin) * dtype.itemsize]
                data = bytes_of(raw)
                if data:
                    file.read_into(name, begin * dtype.itemsize, data)
                tensors.append(raw.view(dtype))
                ranges = task.slices[part.first : part.last]
                places = [[(i - begin) * dtype.itemsize for i in r] for r in ranges]
                digests.append([digest_of(data[first:last]) for first, last in places])
            found.append(Loaded(part, tensors, list(zip(*digests, strict=True))))
        return found

    def slice_bytes(self, task: int, index: int, source: int) -> memoryview:
        t = self._plan.tasks[task]
        begin, end = (i * t.stored[source].itemsize for i in t.slices[index])
        file, name = self._where[task][source]
        data = bytes_of(torch.empty(end - begin, dtype=torch.uint8))
        if data:
            file.read_into(name, begin, data)
        return data

    def file_of(self, task: int, source: int) -> Path:
        return self._where[task][source][0].path
