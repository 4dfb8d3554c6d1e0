"""Which rank merges what: a function of the plan, of what is done and of the number of ranks."""

from __future__ import annotations

import heapq
from collections.abc import Container, Sequence

from .plan import Plan

Place = tuple[int, int]  # task and slice


def shares(plan: Plan, done: Container[Place], ranks: int) -> list[set[Place]]:
    """The slices that are not done, divided among ranks by the bytes that are read and written.

    Whole files where at least as many are unfinished as there are ranks, so that no two machines
    write one file; else a stretch of slices each, where a tensor that is measured before it is
    merged stays in one piece. No rank has more than the mean and one such piece.
    """
    left = [
        [(i, j) for j in range(len(task.slices)) if (i, j) not in done]
        for i, task in enumerate(plan.tasks)
    ]
    task_of = {task.key: i for i, task in enumerate(plan.tasks)}
    files = [[p for key in shard.names for p in left[task_of[key]]] for shard in plan.shards]
    files = [places for places in files if places]
    if len(files) >= ranks:
        owners = _packed([_bytes(plan, places) for places in files], ranks)
        return _divided(files, owners, ranks)
    pieces: list[list[Place]] = []
    for task, places in zip(plan.tasks, left, strict=True):
        pieces += [places] if task.measured else [[place] for place in places]
    return _divided(pieces, _stretches([_bytes(plan, p) for p in pieces], ranks), ranks)


def stretches(plan: Plan, ranks: int) -> list[set[Place]]:
    """All slices that are merged, a stretch for each rank, for a survey of the whole model."""
    merged = [i for i, task in enumerate(plan.tasks) if task.arguments is not None]
    pieces = [[(i, j)] for i in merged for j in range(len(plan.tasks[i].slices))]
    return _divided(pieces, _stretches([_bytes(plan, p) for p in pieces], ranks), ranks)


def _bytes(plan: Plan, places: Sequence[Place]) -> int:
    size = 0
    for i, j in places:
        task = plan.tasks[i]
        begin, end = task.slices[j]
        element = sum(d.itemsize for d in task.stored) + len(plan.points) * task.result.itemsize
        size += (end - begin) * element
    return size


def _packed(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank of each piece: the largest first, each to the rank that has least."""
    loads = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, owners[i] = loads[0]
        heapq.heapreplace(loads, (load + sizes[i], owners[i]))
    return owners


def _stretches(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank of each piece, in order: those that begin in the rank's part of all bytes."""
    total = max(1, sum(sizes))
    owners, begin = [], 0
    for size in sizes:
        owners.append(min(begin * ranks // total, ranks - 1))
        begin += size
    return owners


def _divided(
    pieces: Sequence[Sequence[Place]], owners: Sequence[int], ranks: int
) -> list[set[Place]]:
    divided: list[set[Place]] = [set() for _ in range(ranks)]
    for places, owner in zip(pieces, owners, strict=True):
        divided[owner].update(places)
    return divided
