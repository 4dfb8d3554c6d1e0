"""Slices of the inputs, into buffers that serve again, with their digests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .files import WeightFile
from .files.formats import Piece, bytes_of
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
        """Bytes of the buffers that `load` fills: one for each source, of all parts."""
        sizes: dict[int, int] = {}
        for part in unit.parts:
            task = self._plan.tasks[part.task]
            begin, end = task.span(part.first, part.last)
            for i, dtype in enumerate(task.stored):
                sizes[i] = _aligned(sizes.get(i, 0)) + (end - begin) * dtype.itemsize
        return list(sizes.values())

    def load(self, unit: Unit, buffers: Sequence[Tensor]) -> list[Loaded]:
        memory = [bytes_of(x) for x in buffers]
        reads: dict[WeightFile, list[Piece]] = {}
        places: list[list[tuple[int, int]]] = []  # in the buffer of each source
        filled = [0] * len(buffers)
        for part in unit.parts:
            task = self._plan.tasks[part.task]
            begin, end = task.span(part.first, part.last)
            places.append([])
            for i, dtype in enumerate(task.stored):
                first = _aligned(filled[i])
                filled[i] = first + (end - begin) * dtype.itemsize
                places[-1].append((first, filled[i]))
                if end > begin:
                    file, name = self._where[part.task][i]
                    piece = name, begin * dtype.itemsize, memory[i][first : filled[i]]
                    reads.setdefault(file, []).append(piece)
        for file, pieces in reads.items():
            file.read_many(pieces)
        return [
            self._loaded(part, each, buffers, memory)
            for part, each in zip(unit.parts, places, strict=True)
        ]

    def _loaded(
        self,
        part: Part,
        places: Sequence[tuple[int, int]],
        buffers: Sequence[Tensor],
        memory: Sequence[memoryview],
    ) -> Loaded:
        task = self._plan.tasks[part.task]
        ranges = task.slices[part.first : part.last]
        origin = ranges[0][0]
        tensors, digests = [], []
        for i, ((first, last), dtype) in enumerate(zip(places, task.stored, strict=True)):
            size = dtype.itemsize
            tensors.append(buffers[i][first:last].view(dtype))
            at = first - origin * size
            digests.append([digest_of(memory[i][at + a * size : at + b * size]) for a, b in ranges])
        return Loaded(part, tensors, list(zip(*digests, strict=True)))

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


def _aligned(place: int) -> int:
    return -(-place // 64) * 64
