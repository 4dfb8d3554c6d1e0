"""Merges of several ranks: the bytes of one process, whoever dies on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekern as mk
from mergekern.methods import slices

from engine import jobs
from engine.models import ties, write_folder

CUT = 1000
SHARD = 9000  # bytes of an output file, where there are several


def content(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of several slices, of one, of none, a buffer; few magnitudes, so that they tie."""
    g = torch.Generator().manual_seed(seed)
    made = {
        "ids": torch.arange(2500)[None],
        "empty": torch.zeros(0, 3),
        "scale": torch.tensor(1.5),
    }
    for i in range(5):
        w = torch.randint(-9, 10, (37 + i, 101), generator=g) / 8
        made[f"layer.{i}.weight"] = w.to(torch.bfloat16 if i % 2 else torch.float32)
        made[f"layer.{i}.bias"] = torch.randn(50, generator=g)
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [write_folder(folder / f"m{i}", content(i), shards=1 + i) for i in range(3)]


@pytest.fixture(autouse=True)
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the oracle, one process, is cut by."""
    monkeypatch.setattr(slices, "SLICE", CUT)


def write_config(path: Path, models: list[Path], method: str = "ties", **parameters: Any) -> Path:
    path.write_text(json.dumps(ties(*models, method=method, **{"density": 0.3, **parameters})))
    return path


def files(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def assert_same_files(got: Path, expected: Path) -> None:
    a, b = files(got), files(expected)
    assert a.keys() == b.keys()
    assert not [name for name in a if a[name] != b[name]]


def merged(config: Path, out: Path, **options: Any) -> Path:
    """By this process alone."""
    mk.merge_checkpoints(config, out, progress=False, **options)
    return out


def assert_all_well(ended: list[jobs.Ended]) -> None:
    assert [each.code for each in ended] == [0] * len(ended), ended
    assert not any(each.err for each in ended[1:]), ended  # progress is rank 0's


# ---- the same bytes --------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_do_not_depend_on_ranks(models: list[Path], tmp_path: Path, ranks: int) -> None:
    """Measured, counted over the whole model, at random; one file and several, and a sweep."""
    theirs, ours = tmp_path / "ranks", tmp_path / "alone"  # statistics lie beside the output
    cases: dict[str, tuple[Path, str]] = {}
    acts: list[Callable[[], int]] = []
    for method in ("ties", "ties_global", "dare_ties", "karcher"):
        config = write_config(tmp_path / f"{method}.yml", models, method)
        if method == "karcher":
            plain = {"merge_method": method, "models": [{"model": str(m)} for m in models]}
            config.write_text(json.dumps(plain))
        for size in ("5GB", str(SHARD)):
            name = f"{method}-{size}"
            acts.append(partial(jobs.merge, config, theirs / name, "--shard-size", size))
            cases[name] = config, size
    values = {"density": [0.2, 0.7]}
    swept = tmp_path / "ties_global.yml"
    acts.append(partial(jobs.sweep, swept, theirs / "sweep", values))
    act = partial(jobs.cut_at, CUT, partial(jobs.in_turn, acts))
    with jobs.started(ranks, act, tmp_path / "logs") as job:
        ended = job.wait()
    assert_all_well(ended)
    assert len(ended[0].out.splitlines()) == len(cases)
    assert not any(each.out for each in ended[1:])
    for name, (config, size) in cases.items():
        assert_same_files(theirs / name, merged(config, ours / name, shard_size=size))
    mk.merge_sweep(swept, ours / "sweep", values, progress=False)
    assert_same_files(theirs / "sweep", ours / "sweep")
    assert {p.name for p in theirs.iterdir()} == {*cases, "sweep", ".mergekern_statistics"}
