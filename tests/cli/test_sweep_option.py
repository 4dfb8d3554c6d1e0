"""mergekern merge --sweep and --statistics."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli.calls import Run, one_line

from engine.models import tensors, ties, write_folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    models = [write_folder(tmp_path / name, tensors(i)) for i, name in enumerate("abc")]
    path = tmp_path / "merge.yml"
    path.write_text(json.dumps(ties(*models, method="ties_global", density=0.9)))
    return path


def test_a_sweep_is_the_merges_it_names(run: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    points = ["density=0.1,lambda=1", "density=0.4,lambda=1"]
    asked = ("--sweep", "density=0.1,0.4", "--sweep", "lambda=1")
    code, printed, errors = run("merge", config, out, *asked, "--dry-run")
    assert (code, errors) == (0, "")
    assert not out.exists()
    code, printed, _ = run("merge", config, out, *asked)
    assert code == 0
    assert [line.partition(": ")[0] for line in printed.splitlines()] == [
        str(out / point) for point in points
    ]
    assert sorted(os.listdir(out)) == points
    assert run("verify", out / points[1], "--replay", "*")[0] == 0
    single = json.loads(config.read_text())
    single["parameters"]["density"] = 0.4
    config.write_text(json.dumps(single))
    assert run("merge", config, tmp_path / "one", "-q") == (0, "", "")
    name = "model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (out / points[1] / name).read_bytes()


@pytest.mark.parametrize("sweep", ["density", "density=", "nonsense=1", "density=x"])
def test_a_sweep_that_is_none(run: Run, config: Path, tmp_path: Path, sweep: str) -> None:
    text = one_line(*run("merge", config, tmp_path / "out", "--sweep", sweep))
    assert sweep.partition("=")[0] in text
    assert not (tmp_path / "out").exists()


def test_where_statistics_are_kept(run: Run, config: Path, tmp_path: Path) -> None:
    beside, chosen = tmp_path / ".mergekern_statistics", tmp_path / "kept"
    assert run("merge", config, tmp_path / "o1", "-q", "--statistics", "none")[0] == 0
    assert not beside.exists()
    assert run("merge", config, tmp_path / "o2", "-q", "--statistics", chosen)[0] == 0
    assert (len(os.listdir(chosen)), beside.exists()) == (1, False)
    assert run("merge", config, tmp_path / "o3", "-q")[0] == 0
    assert os.listdir(beside) == os.listdir(chosen)
