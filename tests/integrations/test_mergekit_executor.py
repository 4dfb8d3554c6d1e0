"""mergekit's executor and loader under the drop-in: the same runs, without the scans."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mergekern.integrations import mergekit as dropin
from mergekern.integrations.mergekit import executor

from accuracy import assert_bytes_equal
from mergekit_calls import api, arguments
from required import peer

graph = peer("mergekit.graph", "mergekit")
loader = peer("mergekit.io.loader", "mergekit")


@pytest.fixture(autouse=True)
def taken_back() -> Iterator[None]:
    yield
    dropin.uninstall()


@pytest.fixture
def installed() -> None:
    dropin.install(host=False)


class Value:
    """A result that knows how many others are alive."""

    alive = 0

    def __init__(self, number: int) -> None:
        self.number = number
        Value.alive += 1

    def __del__(self) -> None:
        Value.alive -= 1


LIVING: list[int] = []


class Step(graph.Task):
    number: int
    needs: tuple[graph.Task, ...] = ()

    def arguments(self) -> dict[str, Any]:
        return {f"x{i}": t for i, t in enumerate(self.needs)}

    def priority(self) -> int:
        return self.number % 3

    def execute(self, **values: Value) -> Value:
        LIVING.append(Value.alive)
        return Value(self.number + sum(v.number for v in values.values()))


def steps(seed: int) -> list[Any]:
    """A graph of tasks that need up to three earlier ones; every third is a target."""
    g = torch.Generator().manual_seed(seed)
    made: list[Any] = []
    for i in range(30):
        n = int(torch.randint(0, min(4, i + 1), (), generator=g))
        which = torch.randperm(i, generator=g)[:n].tolist()
        made.append(Step(number=i, needs=tuple(made[j] for j in which)))
    return made[::3]


def ran(seed: int, *, cached: bool) -> tuple[list[tuple[int, int]], list[int]]:
    """Targets and values in order, and how many results were alive at each step."""
    targets = steps(seed)
    universe = graph.TaskUniverse(targets)
    handles = [universe.get_handle(t) for t in targets]
    known = {handles[0]: Value(100)} if cached else None
    run = graph.Executor(handles, cached_values=known)._run(quiet=True)
    LIVING.clear()
    got = []
    for handle, value in run:
        got.append((handle.task().number, value.number))
        del value
    return got, list(LIVING)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cached", [False, True])
def test_executor_runs_frees_and_yields_alike(seed: int, cached: bool) -> None:
    expected = ran(seed, cached=cached)
    dropin.install()
    assert ran(seed, cached=cached) == expected
    assert expected[0]
    assert Value.alive == 0


def test_a_file_lists_its_names_once(installed: None, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    states = {f"w{i}": torch.full((2,), float(i)) for i in range(5)}
    save_file(states, tmp_path / "m.safetensors")
    torch.save(states, tmp_path / "m.bin")
    shard = loader.TensorLoader.get(str(tmp_path / "m.safetensors"))
    assert shard.keys() is not shard.keys()
    assert list(shard.keys()) == list(states)
    assert "w3" in shard.keys()  # noqa: SIM118 (mergekit asks this way)
    assert_bytes_equal(shard.get_tensor("w3"), states["w3"])
    assert not isinstance(loader.TensorLoader.get(str(tmp_path / "m.bin")), executor.Shard)


def test_one_line_a_run(installed: None, caplog: pytest.LogCaptureFixture) -> None:
    class Merge(graph.Task):
        method: str

        def arguments(self) -> dict[str, Any]:
            return {}

        def execute(self, **_: Any) -> Any:
            return api.merge_tensors(**arguments(self.method))

    caplog.set_level(logging.INFO, logger="mergekern")
    tasks = [Merge(method="linear"), Merge(method="ties"), Merge(method="passthrough")]
    graph.Executor(tasks).execute()
    graph.Executor(steps(0)).execute()  # nothing merged, nothing to say
    (line,) = [r.getMessage() for r in caplog.records if r.name == "mergekern"]
    assert line.startswith("mergekern: 3 tensors merged by mergekern (linear 1, passthrough 1, tie")
    assert "backends for cpu: " in line
    api.merge_tensors(**arguments("passthrough", scale=None))
    assert len(caplog.records) == 1
