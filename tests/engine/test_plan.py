"""What a merge will do: the plan, its digest, the outlook of a dry run."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

import mergekern as mk
from mergekern.methods import slices

from engine.models import linear, tensors, ties, write_file, write_folder


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_folder(tmp_path / f"m{i}", tensors(i), shards=i + 1) for i in range(3)]


def test_outlook_is_what_the_merge_then_does(models: list[Path], tmp_path: Path) -> None:
    for method in ("ties", "ties_global"):
        config = ties(*models, method=method, density=0.4)
        before = sorted(os.listdir(tmp_path))
        plan, outlook = mk.plan_merge(config, tmp_path / method)
        assert sorted(os.listdir(tmp_path)) == before
        done = mk.merge_checkpoints(config, tmp_path / method, progress=False)
        assert outlook.bytes_written == plan.bytes_written == done.bytes_written
        assert outlook.bytes_read == done.bytes_read
        assert (outlook.passes > 1) == (method == "ties_global")
        assert 0 < outlook.seconds < 3600


def test_plan_is_json_and_names_bytes(models: list[Path], tmp_path: Path) -> None:
    plan, _ = mk.plan_merge(linear(*models), tmp_path / "out")
    about = json.loads(json.dumps(plan.describe()))
    assert {t["key"] for t in about["tasks"]} == set(tensors())
    assert about["sources"][0]["size"] == (models[0] / "model.safetensors").stat().st_size
    for task in plan.tasks:
        assert task.slices[0][0] == 0
        assert task.slices[-1][1] == torch.Size(task.shape).numel()


def test_digest_is_that_of_what_comes_out(models: list[Path], tmp_path: Path) -> None:
    def digest(config: dict, **options: object) -> str:
        return mk.plan_merge(config, tmp_path / "out", **options)[0].digest  # type: ignore[arg-type]

    config = ties(*models, density=0.4)
    first = digest(config)
    assert digest(config, memory="1GiB", backend="torch") == first
    others = [
        digest(ties(*models, density=0.5)),
        digest(ties(*models[::-1], density=0.4)),
        digest({**config, "dtype": "bfloat16"}),
        digest(config, seed=1),
        digest(config, shard_size=600),
        digest(config, sweep={"density": [0.4]}),
    ]
    assert len({first, *others}) == len(others) + 1


def test_memory_that_a_plan_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE", 1 << 10)
    path = write_file(tmp_path / "m.safetensors", {"w": torch.zeros(1 << 16)})
    plan, outlook = mk.plan_merge(linear(path, path), tmp_path / "out")
    count = len(plan.tasks[0].slices)
    assert plan.peak == outlook.peak == 3 * 4 * (1 << 16) // count
    assert dataclasses.is_dataclass(plan)
