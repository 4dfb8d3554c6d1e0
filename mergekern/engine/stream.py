"""Read, compute and write, each in its own thread, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods.registry import Inputs
from .checkpoint import Checkpoint
from .config import MergeConfig
from .files import SafetensorsWriter, nbytes
from .plan import Plan, Task
from .progress import Bar


@dataclass(frozen=True)
class Settings:
    config: MergeConfig
    device: str
    seed: int
    backend: str
    host: str | None
    memory: int
    bar: Bar


# Code that torch loads on first use, scratch of the kernels, freed results that the heap keeps.
OVERHEAD = 40 << 20


class _Budget:
    """Bytes under way: `take` waits until they fit (or nothing else is), `give` returns them."""

    def __init__(self, limit: int) -> None:
        self._limit = self._free = limit
        self._closed = False
        self._changed = threading.Condition()

    def take(self, size: int) -> bool:
        """False if the run has ended meanwhile."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or size <= self._free or self._free == self._limit
            )
            self._free -= size
            return not self._closed

    def give(self, size: int) -> None:
        with self._changed:
            self._free += size
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@contextlib.contextmanager
def _ahead(
    tasks: Sequence[Task], checkpoints: list[Checkpoint], memory: int
) -> Iterator[tuple[Iterator[Task], _Budget]]:
    """The tasks, each when its tensors are in memory, read by a thread as far as the budget goes.

    Who has done a task gives its cost back. Any error, here or there, ends both.
    """
    budget = _Budget(max(memory - OVERHEAD, memory // 2))
    ready: queue.SimpleQueue[Task | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for task in tasks:
                if not budget.take(task.cost):
                    return
                for i in task.sources:
                    checkpoints[i].prefetch(task.key)
                ready.put(task)
        finally:
            ready.put(None)

    with ThreadPoolExecutor(1, "mergekern-read") as reader:
        reading = reader.submit(read)
        try:
            yield iter(ready.get, None), budget
            reading.result()
        finally:
            budget.close()


def stream(
    plan: Plan,
    checkpoints: list[Checkpoint],
    staging: Path,
    settings: Settings,
) -> int:
    """The survey, if the method has one, then the merge; all bytes read."""
    read = plan.bytes_read

    def visit(visitor: Callable[..., None]) -> None:
        nonlocal read
        read += _visit(visitor, plan, checkpoints, settings)

    settings.bar.expect(sum(task.cost for task in plan.tasks))
    survey = settings.config.method.survey
    found = None if survey is None else survey(visit)
    with contextlib.ExitStack() as draws:
        if settings.host is not None:  # hosts draw masks from torch's own generator
            draws.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(settings.seed)
        _merge(plan, checkpoints, staging, settings, found)
    return read


def _visit(
    visitor: Callable[..., None],
    plan: Plan,
    checkpoints: list[Checkpoint],
    settings: Settings,
) -> int:
    """One pass over every tensor that is merged; the bytes it reads."""
    tasks = [task for task in plan.tasks if task.arguments is not None]
    size = sum(task.read for task in tasks)
    settings.bar.expect(size)
    with _ahead(tasks, checkpoints, settings.memory) as (ready, budget):
        for task in ready:
            visitor(_inputs(task, checkpoints, settings), **(task.arguments or {}))
            for i in task.sources:
                checkpoints[i].release(task.key)
            budget.give(task.cost)
            settings.bar.advance(task.read)
    return size


def _merge(
    plan: Plan,
    checkpoints: list[Checkpoint],
    staging: Path,
    settings: Settings,
    survey: Any,
) -> None:
    """Reader and writer threads around the computing one; any error ends all three."""
    output = _Output(plan, staging, checkpoints[0].metadata)

    def write(task: Task, result: Tensor) -> None:
        with contextlib.ExitStack() as failed:
            failed.callback(budget.close)  # else the others wait for bytes that never come back
            output.write(task.key, result)
            del result
            for i in task.sources:
                checkpoints[i].release(task.key)
            budget.give(task.cost)
            settings.bar.advance(task.cost)
            failed.pop_all()

    with (
        _ahead(plan.tasks, checkpoints, settings.memory) as (ready, budget),
        ThreadPoolExecutor(1, "mergekern-write") as writer,
    ):
        writing: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()
        for task in ready:
            result = _compute(task, checkpoints, settings, survey)
            writing.put(writer.submit(write, task, result))
            del result
            while not writing.empty():  # raises what the writer raised
                done = writing.get()
                if not done.done():
                    writing.put(done)
                    break
                done.result()
        while not writing.empty():
            writing.get().result()


def _compute(task: Task, checkpoints: list[Checkpoint], settings: Settings, survey: Any) -> Tensor:
    if task.arguments is None:
        copied = checkpoints[task.sources[0]].read(task.key)
        return copied.to(task.compute).to(task.result.dtype)
    inputs = replace(_inputs(task, checkpoints, settings), survey=survey)
    return settings.config.method.merge(inputs, **task.arguments).cpu().to(task.result.dtype)


def _inputs(task: Task, checkpoints: list[Checkpoint], settings: Settings) -> Inputs:
    tensors = [
        checkpoints[i].read(task.key).to(device=settings.device, dtype=task.compute)
        for i in task.sources
    ]
    apart = settings.config.base_apart
    return Inputs(
        xs=tensors[apart:],
        base=tensors[0] if apart else None,
        name=task.key,
        seed=settings.seed,
        out_dtype=task.compute if settings.host == "mergekit" else task.result.dtype,
        backend=settings.backend,
        host=settings.host,
        models=[i - apart for i in task.sources[apart:]],
    )


class _Output:
    """The weight files of the result and, where sharded, their indices."""

    def __init__(self, plan: Plan, staging: Path, metadata: Mapping[str, str]) -> None:
        self._plan, self._staging = plan, staging
        self._where: dict[str, tuple[SafetensorsWriter, str]] = {}
        signatures = {t.key: t.result for t in plan.tasks}
        for shard in plan.shards:
            path = staging / shard.path
            path.parent.mkdir(parents=True, exist_ok=True)
            inside = {name: signatures[key] for key, name in shard.names.items()}
            writer = SafetensorsWriter(path, inside, {"format": "pt", **metadata})
            self._where.update({key: (writer, name) for key, name in shard.names.items()})
        self._write_indices()

    def write(self, key: str, tensor: Tensor) -> None:
        writer, name = self._where[key]
        writer.write(name, tensor)

    def _write_indices(self) -> None:
        folders: dict[Path, list[tuple[str, dict[str, str]]]] = {}
        for shard in self._plan.shards:
            path = Path(shard.path)
            folders.setdefault(path.parent, []).append((path.name, shard.names))
        sizes = {t.key: t.result for t in self._plan.tasks}
        for folder, shards in folders.items():
            if len(shards) == 1:
                continue
            weight_map = {name: file for file, names in shards for name in names.values()}
            total = sum(nbytes(sizes[key]) for _, names in shards for key in names)
            stem = shards[0][0].partition("-0")[0]
            text = json.dumps(
                {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2
            )
            index = self._staging / folder / f"{stem}.safetensors.index.json"
            index.write_text(text + "\n", encoding="utf-8")
