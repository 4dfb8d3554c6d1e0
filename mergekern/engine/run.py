"""merge_checkpoints: read, compute and write, each in its own thread, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, CheckpointError
from ..methods.registry import Inputs
from .checkpoint import Checkpoint
from .config import MergeConfig, load_config
from .files import SafetensorsWriter, nbytes
from .folder import carry, write_card
from .plan import Plan, Task, make_plan
from .progress import bar

DEFAULT_MEMORY = "4GiB"
DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Manifest:
    """What a merge did. `left_out` are files of the model folder that were not carried along."""

    out: Path
    method: str
    merged: int
    copied: int
    dropped: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    weights: tuple[str, ...]
    carried: tuple[str, ...]
    left_out: tuple[str, ...]


def merge_checkpoints(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    memory: int | str = DEFAULT_MEMORY,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    device: str = "cpu",
    seed: int = 0,
    backend: str = "auto",
    progress: bool = True,
) -> Manifest:
    """Merges the checkpoints of a configuration (mergekit's YAML) into the folder `out`.

    Tensors are merged one by one: reading, computing and writing overlap while the bytes of the
    tensors under way stay within `memory` (beside what the process holds anyway). Names are
    preserved; a tensor that one input lacks, or has in another shape or class of dtype, is an
    error that lists all of them. Integer buffers are copied if equal. Files that are no weights
    are copied from the base model (or the first); a model card and the configuration are added.
    `out` appears, complete and synced to disk, or not at all.

    dtype in the configuration only sets the dtype of the result (out_dtype goes before it):
    inputs are never rounded, the result is, once. float64 computes in float64.

    Raises: ConfigError, CheckpointError, ArgumentError; OSError where the disk refuses.
    Source: mergekit `mergekit-yaml`, `mergekit-pytorch`.
    """
    started = time.perf_counter()
    parsed = load_config(config)
    target = Path(out)
    _check_device(device)
    limit, largest = parse_size("memory", memory), parse_size("shard_size", shard_size)
    with contextlib.ExitStack() as stack:
        checkpoints = []
        for path in parsed.paths:
            checkpoints.append(Checkpoint(path))
            stack.callback(checkpoints[-1].close)
        plan = make_plan(parsed, checkpoints, limit, largest)
        staging = stack.enter_context(_staged(target, plan.bytes_written))
        home = checkpoints[parsed.paths.index(parsed.home)]
        carried, left_out = carry(home, staging)
        write_card(parsed, staging)
        settings = _Settings(parsed, device, seed, backend)
        with bar(sum(t.cost for t in plan.tasks), shown=progress) as advance:
            _stream(plan, checkpoints, staging, settings, limit, advance)
    merged = sum(t.arguments is not None for t in plan.tasks)
    return Manifest(
        out=target,
        method=parsed.method.name,
        merged=merged,
        copied=len(plan.tasks) - merged,
        dropped=plan.dropped,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        seconds=time.perf_counter() - started,
        weights=tuple(s.path for s in plan.shards),
        carried=tuple(carried),
        left_out=tuple(left_out),
    )


@dataclass(frozen=True)
class _Settings:
    config: MergeConfig
    device: str
    seed: int
    backend: str


def parse_size(name: str, size: int | str) -> int:
    """Bytes in a number or a text such as "4GiB", "500MB", "4G" (as 4GiB).

    >>> parse_size("memory", "1.5GiB"), parse_size("memory", "2MB")
    (1610612736, 2000000)
    """
    found = re.fullmatch(r"([0-9.]+)\s*([kKmMgGtT]?)(i?)([bB]?)", str(size).strip())
    try:
        number = float(found.group(1)) if found else -1.0
    except ValueError:
        number = -1.0
    if not found or number <= 0:
        raise ArgumentError(f"{name}: no size; got {size!r}; expected such as 4GiB or 500MB")
    decimal = found.group(4) and not found.group(3)
    power = " kmgt".index(found.group(2).lower() or " ")
    return int(number * (1000 if decimal else 1024) ** power)


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ArgumentError(f"device: unknown; got {device!r}; expected cpu or cuda") from None
    if kind not in ("cpu", "cuda"):
        raise ArgumentError(f"device: not served; got {device!r}; expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device: torch sees no CUDA GPU; got {device!r}; expected cpu")


@contextlib.contextmanager
def _staged(target: Path, size: int) -> Iterator[Path]:
    """A folder beside `target` that takes its name at the end, or vanishes on any error."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: output exists already; remove it or choose another name")
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if size > free:
            raise CheckpointError(
                f"{target}: the result needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB"
            )
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        _sync_tree(staging)
        staging.rename(target)
        _sync(parent)
    except OSError as error:
        raise CheckpointError(f"{target}: writing failed ({error.strerror or error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- the stream ------------------------------------------------------------------------------


class _Budget:
    """Bytes under way: `take` waits until they fit, `give` returns them."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._closed = False
        self._changed = threading.Condition()

    def take(self, size: int) -> bool:
        """False if the run has ended meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or size <= self._free)
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


def _stream(
    plan: Plan,
    checkpoints: list[Checkpoint],
    staging: Path,
    settings: _Settings,
    memory: int,
    advance: Callable[[int], None],
) -> None:
    """Reader and writer threads around the computing one; any error ends all three."""
    budget = _Budget(memory)
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
        output,
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


def _compute(task: Task, checkpoints: list[Checkpoint], settings: _Settings) -> Tensor:
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
        self._plan, self._staging, self._metadata = plan, staging, {"format": "pt", **metadata}
        self._where: dict[str, tuple[SafetensorsWriter, str]] = {}
        self._opened = contextlib.ExitStack()

    def write(self, key: str, tensor: Tensor) -> None:
        writer, name = self._where[key]
        writer.write(name, tensor)

    def __enter__(self) -> _Output:
        signatures = {t.key: t.result for t in self._plan.tasks}
        with contextlib.ExitStack() as opened:
            for shard in self._plan.shards:
                path = self._staging / shard.path
                path.parent.mkdir(parents=True, exist_ok=True)
                inside = {name: signatures[key] for key, name in shard.names.items()}
                writer = SafetensorsWriter(path, inside, self._metadata)
                opened.callback(writer.close)
                self._where.update({key: (writer, name) for key, name in shard.names.items()})
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._opened.close()
        if kind is None:
            self._write_indices()

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
