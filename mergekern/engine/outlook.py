"""What a merge will read, write, need and take, before it is begun."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import CheckpointError
from .computing import Computing
from .files.formats import bytes_of
from .job import Job
from .place import Place
from .plan import Task
from .progress import Bar
from .reading import Reader
from .units import Part, Unit

_SAMPLE = 64 << 20  # bytes written to learn the rate of the disk


@dataclass(frozen=True)
class Outlook:
    """Rates in bytes per second: of reading the inputs as they lie now (on the disk or in the
    system's cache), of writing and syncing, of computing, by bytes of the inputs."""

    passes: int  # over the tensors that are merged; the last one merges
    bytes_read: int
    bytes_written: int
    peak: int  # bytes that the largest slice takes
    read_rate: float
    write_rate: float
    compute_rate: float

    @property
    def seconds(self) -> float:
        """Reading and writing share a disk; computing goes on meanwhile."""
        moved = self.bytes_read / self.read_rate + self.bytes_written / self.write_rate
        return max(moved, self.bytes_read / self.compute_rate)


def outlook(job: Job, target: Path) -> Outlook:
    """From one slice that is read and merged, and a file that is written beside `target`."""
    plan = job.plan
    merged = [t for t in plan.tasks if t.arguments is not None]
    read = compute = float("inf")
    passes = 1
    if merged:
        read, compute, passes = _of_a_slice(job, max(merged, key=lambda t: t.cost(t.slices[0])))
    size = sum(t.bytes_read for t in plan.tasks)
    size += (passes - 1) * sum(t.bytes_read for t in merged)
    return Outlook(
        passes=passes,
        bytes_read=size,
        bytes_written=plan.bytes_written,
        peak=plan.peak,
        read_rate=read,
        write_rate=_write_rate(target, min(_SAMPLE, max(1, plan.bytes_written))),
        compute_rate=compute,
    )


def _of_a_slice(job: Job, task: Task) -> tuple[float, float, int]:
    """Rates of reading and of computing, and the passes of a survey."""
    reader = Reader(job.plan, job.checkpoints)
    at_place = Computing(job.plan, job.settings(Bar()), Place())
    unit = Unit((Part(job.plan.tasks.index(task), 0, 1),), 0)
    sizes = reader.sizes(unit)
    buffers = [torch.ones(size, dtype=torch.uint8) for size in sizes]
    begun = time.perf_counter()
    (loaded,) = reader.load(unit, buffers)
    reading = time.perf_counter() - begun
    method, inputs = job.config.method, at_place.inputs(loaded.part, loaded.tensors)
    assert task.arguments is not None
    given, passes = task.arguments[0], 1

    def visit(visitor: Callable[..., None]) -> None:
        nonlocal passes
        passes += 1
        visitor(inputs, **given)

    def compute() -> None:
        if method.survey:
            method.merge(replace(inputs, survey=method.survey(visit)), **given)
        else:  # as a tensor of its own
            method.merge(replace(inputs, shape=None, offset=0), **given)

    compute()  # the first time loads what torch needs
    passes = 1
    begun = time.perf_counter()
    compute()
    computing = time.perf_counter() - begun
    return max(1, sum(sizes)) / reading, max(1, sum(sizes)) / computing, passes


def _write_rate(target: Path, size: int) -> float:
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    data = bytes_of(torch.ones(size, dtype=torch.uint8))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            begun = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return size / (time.perf_counter() - begun)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None
