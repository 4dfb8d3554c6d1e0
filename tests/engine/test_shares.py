"""Who merges what: all of it, once, evenly, and no file by two where that can be had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekern.engine.plan import Plan, Shard, Task
from mergekern.engine.shares import Place, shares, stretches


class Size(NamedTuple):
    """Of a tensor, with how it is merged."""

    slices: tuple[int, ...]  # elements of each
    measured: bool = False
    copied: bool = False


def task(key: str, size: Size) -> Task:
    ends = [sum(size.slices[: i + 1]) for i in range(len(size.slices))]
    sources = (0,) if size.copied else (0, 1)
    return Task(
        key=key,
        shape=(ends[-1],),
        sources=sources,
        stored=(torch.float32,) * len(sources),
        arguments=None if size.copied else ({},),
        compute=torch.float32,
        result=torch.bfloat16,
        cut="elements",
        slices=tuple(zip([0, *ends[:-1]], ends, strict=True)),
        measured=size.measured,
        element=10,
    )


def plan_of(files: Sequence[Sequence[Size]]) -> Plan:
    tasks, shards = [], []
    for f, sizes in enumerate(files):
        keys = [f"{f}.{i}" for i in range(len(sizes))]
        tasks += [task(key, size) for key, size in zip(keys, sizes, strict=True)]
        shards.append(Shard(f"model-{f}.safetensors", {key: key for key in keys}))
    return Plan("linear", None, 0, ("",), tuple(tasks), tuple(shards), (), (), {}, ())


def places(plan: Plan) -> set[Place]:
    return {(i, j) for i, t in enumerate(plan.tasks) for j in range(len(t.slices))}


def moved(plan: Plan, of: set[Place]) -> int:
    """Bytes that are read and written."""
    return sum(
        (t.slices[j][1] - t.slices[j][0]) * (4 * len(t.sources) + 2)
        for i, j in of
        for t in [plan.tasks[i]]
    )


SIZES = st.builds(
    Size,
    st.lists(st.integers(0, 40), min_size=1, max_size=5).map(tuple),
    st.booleans(),
    st.booleans(),
)
PLANS = st.lists(st.lists(SIZES, min_size=1, max_size=4), min_size=1, max_size=6).map(plan_of)


@given(PLANS, st.integers(1, 7), st.randoms(use_true_random=False))
def test_every_slice_that_is_not_done_is_merged_once_and_evenly(plan, ranks, random) -> None:
    done = {p for p in places(plan) if random.random() < 0.4}
    parts = shares(plan, done, ranks)
    assert parts == shares(plan, done, ranks)
    assert len(parts) == ranks
    left = places(plan) - done
    assert set().union(*parts) == left
    assert sum(map(len, parts)) == len(left)

    home = {key: shard.path for shard in plan.shards for key in shard.names}
    files: dict[str, set[Place]] = {}
    for place in left:
        files.setdefault(home[plan.tasks[place[0]].key], set()).add(place)
    pieces = [{p} for p in left if not plan.tasks[p[0]].measured]
    pieces += [{p for p in left if p[0] == i} for i, t in enumerate(plan.tasks) if t.measured]
    if len(files) >= ranks:
        pieces = list(files.values())
    for piece in pieces:  # of one rank
        assert sum(bool(piece & part) for part in parts) == bool(piece)
    largest = max((moved(plan, piece) for piece in pieces), default=0)
    assert ranks * max(moved(plan, part) for part in parts) <= moved(plan, left) + ranks * largest


@given(PLANS, st.integers(1, 7))
def test_a_survey_is_divided_into_stretches_of_what_is_merged(plan, ranks) -> None:
    parts = stretches(plan, ranks)
    merged = [p for p in sorted(places(plan)) if plan.tasks[p[0]].arguments is not None]
    assert [p for part in parts for p in sorted(part)] == merged
    largest = max((moved(plan, {p}) for p in merged), default=0)
    total = moved(plan, set(merged))
    assert ranks * max(moved(plan, part) for part in parts) <= total + ranks * largest


def test_whole_files_where_there_are_enough() -> None:
    plan = plan_of([[Size((8,)), Size((2,))], [Size((5,))], [Size((4,))], [Size((1,))]])
    assert shares(plan, set(), 2) == [{(0, 0), (1, 0)}, {(2, 0), (3, 0), (4, 0)}]
    assert shares(plan, set(), 4) == [{(0, 0), (1, 0)}, {(2, 0)}, {(3, 0)}, {(4, 0)}]


def test_slices_where_there_are_fewer_files_left_than_ranks() -> None:
    plan = plan_of([[Size((4, 4, 4, 4))], [Size((4,))]])
    assert shares(plan, {(1, 0)}, 2) == [{(0, 0), (0, 1)}, {(0, 2), (0, 3)}]
    assert shares(plan, {(1, 0), (0, 0)}, 3) == [{(0, 1)}, {(0, 2)}, {(0, 3)}]
    assert shares(plan, places(plan), 3) == [set(), set(), set()]


def test_a_tensor_that_is_measured_stays_with_one_rank() -> None:
    plan = plan_of([[Size((4, 4, 4), measured=True), Size((4, 4))]])
    assert shares(plan, set(), 2) == [{(0, 0), (0, 1), (0, 2)}, {(1, 0), (1, 1)}]
