"""How a plan moves through memory: slices, whole tensors, or several small ones at a time.

What is computed does not depend on it: a tensor is merged by the same slices however they travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .plan import Task

_BATCH = 4 << 20  # bytes of small tensors that travel together
_MOST = 4096  # tensors


@dataclass(frozen=True)
class Part:
    """Consecutive slices of one task."""

    task: int
    first: int
    last: int  # exclusive


@dataclass(frozen=True)
class Unit:
    parts: tuple[Part, ...]
    cost: int  # bytes in memory while it is under way


@dataclass(frozen=True)
class Apart:
    """A task that is measured slice by slice before it is merged: it does not fit in memory."""

    task: int


def slice_units(tasks: Sequence[Task], task: int, pending: Iterable[int]) -> Iterator[Unit]:
    """Each of these slices by itself."""
    t = tasks[task]
    for i in pending:
        yield Unit((Part(task, i, i + 1),), t.cost(t.slices[i]))


def merge_units(
    tasks: Sequence[Task], limit: int, done: Callable[[int, int], bool]
) -> Iterator[Unit | Apart]:
    """All that is not done. A task that must be measured travels whole if half the window holds
    it, so that it is read once."""

    def apiece() -> Iterator[Unit | Apart]:
        for i, task in enumerate(tasks):
            pending = [j for j in range(len(task.slices)) if not done(i, j)]
            if not pending:
                continue
            whole = _whole(tasks, i)
            if len(task.slices) == 1 or (task.measured and 2 * whole.cost <= limit):
                yield whole
            elif task.measured:
                yield Apart(i)
            else:
                yield from slice_units(tasks, i, pending)

    return _batched(apiece())


def visit_units(
    tasks: Sequence[Task], wanted: Callable[[int, int], bool]
) -> Iterator[Unit | Apart]:
    """The slices of every task that is merged, for a survey."""

    def apiece() -> Iterator[Unit | Apart]:
        for i, task in enumerate(tasks):
            if task.arguments is not None:
                pending = (j for j in range(len(task.slices)) if wanted(i, j))
                yield from slice_units(tasks, i, pending)

    return _batched(apiece())


def _whole(tasks: Sequence[Task], i: int) -> Unit:
    return Unit((Part(i, 0, len(tasks[i].slices)),), tasks[i].cost(tasks[i].extent))


def _batched(apiece: Iterable[Unit | Apart]) -> Iterator[Unit | Apart]:
    """Small units together, all in order."""
    parts: list[Part] = []
    cost = 0
    for unit in apiece:
        small = unit.cost if isinstance(unit, Unit) and unit.cost <= _BATCH else None
        if parts and (small is None or cost + small > _BATCH or len(parts) == _MOST):
            yield Unit(tuple(parts), cost)
            parts, cost = [], 0
        if isinstance(unit, Unit) and small is not None:
            parts += unit.parts
            cost += small
        else:
            yield unit
    if parts:
        yield Unit(tuple(parts), cost)
