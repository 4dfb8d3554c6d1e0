"""Read, compute and write, each in its own thread, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..methods.registry import Inputs
from .checkpoint import Checkpoint
from .config import MergeConfig
from .files import SafetensorsWriter, nbytes
from .plan import Plan, Task


@dataclass(frozen=True)
class Settings:
    config: MergeConfig
    device: str
    seed: int
    backend: str


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


def stream(
    plan: Plan,
    checkpoints: list[Checkpoint],
    staging: Path,
    settings: Settings,
    memory: int,
    advance: Callable[[int], None],
) -> None:
    """Reader and writer threads around the computing one; any error ends all three."""
    budget = _Budget(max(memory - OVERHEAD, memory // 2))
    ready: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
    output = _Output(plan, staging, checkpoints[0].metadata)

    def read() -> None:
        try:
            for task in plan.tasks:
                if not budget.take(task.cost):
                    return
                for i in task.sources:
                    checkpoints[i].prefetch(task.key)
                ready.put(task)
        finally:
            ready.put(None)

    def write(task: Task, result: Tensor) -> None:
        with contextlib.ExitStack() as failed:
            failed.callback(budget.close)  # else the others wait for bytes that never come back
            output.write(task.key, result)
            del result
            for i in task.sources:
                checkpoints[i].release(task.key)
            budget.give(task.cost)
            advance(task.cost)
            failed.pop_all()

    with (
        ThreadPoolExecutor(1, "mergekern-read") as reader,
        ThreadPoolExecutor(1, "mergekern-write") as writer,
    ):
        reading = reader.submit(read)
        writing: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()
        try:
            while (task := ready.get()) is not None:
                result = _compute(task, checkpoints, settings)
                writing.put(writer.submit(write, task, result))
                del result
                while not writing.empty():  # raises what the writer raised
                    done = writing.get()
                    if not done.done():
                        writing.put(done)
                        break
                    done.result()
            reading.result()
            while not writing.empty():
                writing.get().result()
        finally:
            budget.close()


def _compute(task: Task, checkpoints: list[Checkpoint], settings: Settings) -> Tensor:
    tensors = [checkpoints[i].read(task.key) for i in task.sources]
    if task.arguments is None:
        return tensors[0].to(task.result.dtype)
    tensors = [x.to(device=settings.device, dtype=task.compute) for x in tensors]
    apart = settings.config.base_apart
    inputs = Inputs(
        xs=tensors[apart:],
        base=tensors[0] if apart else None,
        name=task.key,
        seed=settings.seed,
        out_dtype=task.result.dtype,
        backend=settings.backend,
    )
    return settings.config.method.merge(inputs, **task.arguments).cpu()


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
