"""mergekit's executor and loader without their quadratic steps, and the line at the end of a run.

Same tasks in the same order, same results, same progress bars. What is spared for every task: a
scan of the list of targets, a scan of every live value for those that expire, and for every
tensor read a new list of all names in its file.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from .._swaps import Swaps
from .calls import MODE, counts

LOG = logging.getLogger("mergekern")


def run_schedule(executor: Any, quiet: bool = False, desc: str | None = None) -> Iterator[Any]:
    """In the place of `Executor._run`: (handle, value) of every target, as they come."""
    from mergekit.graph import tqdm

    tasks = executor.schedule.tasks
    expiring = defaultdict(list)
    for handle, index in executor.schedule.last_use_index.items():
        expiring[index].append(handle)
    targets = set(executor.targets)
    values = dict(executor.cached_values or {})
    for index, handle in tqdm.tqdm(
        list(enumerate(tasks)), disable=quiet, desc=desc or "Executing graph"
    ):
        value = _execute(executor, handle, values)
        values[handle] = value
        if handle in targets:
            yield handle, value
        del value
        for expired in expiring.pop(index, ()):
            values.pop(expired, None)


def _execute(executor: Any, handle: Any, values: dict[Any, Any]) -> Any:
    """One task, its inputs on the device it asks for, its result where results are kept."""
    task = handle.task()
    move = task.uses_accelerator()
    arguments = {
        name: executor._move_tensors(values[needed], executor.math_device)
        if move
        else values[needed]
        for name, needed in handle.arguments().items()
    }
    return executor._move_tensors(task.execute(**arguments), executor.storage_device)


class Shard:
    """An open safetensors file that lists its names once."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._keys = dict.fromkeys(file.keys())

    def keys(self) -> Any:
        return self._keys.keys()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def opener(original: Any) -> Any:
    """In the place of `TensorLoader.get`, whose class method object is `original`."""

    def get(cls: type, shard_path: str, *args: Any, **kwargs: Any) -> Any:
        loader = original.__get__(None, cls)(shard_path, *args, **kwargs)
        return Shard(loader) if shard_path.lower().endswith(".safetensors") else loader

    return classmethod(get)


def reporting(run: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """`run` of an executor: one key for its masks, and a line at its end on who merged what."""

    def reported(executor: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        before = counts()
        around = MODE.running, MODE.seed  # a run may start others
        MODE.running, MODE.seed = True, None
        try:
            yield from run(executor, *args, **kwargs)
        finally:
            MODE.running, MODE.seed = around
        served = counts() - before
        if MODE.installed and (served.merged or served.fallbacks):
            LOG.info("mergekern: %s", served.sentence())

    return reported


def replace(swaps: Swaps) -> None:
    from mergekit.graph import Executor
    from mergekit.io.loader import TensorLoader
    from mergekit.multigpu_executor import MultiGPUExecutor

    swaps.attribute(Executor, "_run", run_schedule)
    swaps.attribute(TensorLoader, "get", opener(vars(TensorLoader)["get"]))
    for executor in (Executor, MultiGPUExecutor):
        swaps.attribute(executor, "run", reporting(executor.run))
