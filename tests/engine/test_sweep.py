"""merge_sweep: many merges from one read, each what merge_checkpoints makes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import mergekern as mk
from mergekern.errors import ArgumentError

from engine.models import tensors, ties, write_folder


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_folder(tmp_path / f"m{i}", tensors(i), shards=i + 1) for i in range(3)]


def set_to(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The configuration with these parameters for all models."""
    entries = [
        {**m, "parameters": {k: v for k, v in m.get("parameters", {}).items() if k not in values}}
        for m in config["models"]
    ]
    return {**config, "models": entries, "parameters": {**config.get("parameters", {}), **values}}


@pytest.mark.parametrize("method", ["ties", "ties_global"])
def test_each_point_is_the_merge_with_its_values(
    models: list[Path], tmp_path: Path, method: str
) -> None:
    config = ties(*models, method=method, density=0.9)
    sweep = {"density": [0.2, 0.5], "lambda": [1, 0.3]}
    done = mk.merge_sweep(config, tmp_path / "out", sweep, shard_size=600, progress=False)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(done)
    assert len(done) == 4
    for density in sweep["density"]:
        for scale in sweep["lambda"]:
            alone = tmp_path / f"{density}-{scale}"
            single = set_to(config, density=density, **{"lambda": scale})
            mk.merge_checkpoints(single, alone, shard_size=600, progress=False)
            point = f"density={density},lambda={scale}"
            assert done[point].out == tmp_path / "out" / point
            for name in (*done[point].weights, "model.safetensors.index.json", "config.json"):
                assert (done[point].out / name).read_bytes() == (alone / name).read_bytes()


def test_the_inputs_are_read_once(models: list[Path], tmp_path: Path) -> None:
    config = ties(*models, density=0.9)
    once = mk.merge_checkpoints(config, tmp_path / "one", progress=False)
    many = mk.merge_sweep(config, tmp_path / "out", {"density": [0.1, 0.2, 0.3]}, progress=False)
    assert {m.bytes_read for m in many.values()} == {once.bytes_read}


def test_a_complete_sweep_is_left_as_it_is(models: list[Path], tmp_path: Path) -> None:
    config = ties(*models, density=0.9)
    sweep = {"density": [0.1, 0.2]}
    mk.merge_sweep(config, tmp_path / "out", sweep, progress=False)
    again = mk.merge_sweep(config, tmp_path / "out", sweep, progress=False)
    assert {m.bytes_written for m in again.values()} == {0}
    with pytest.raises(mk.CheckpointError, match="output exists already"):
        mk.merge_sweep(config, tmp_path / "out", {"density": [0.1, 0.3]}, progress=False)


@pytest.mark.parametrize(
    ("sweep", "text"),
    [
        ({}, "no parameters to sweep"),
        ({"density": []}, "no values of density"),
        ({"density": "0.1"}, "no values of density"),
        ({"nonsense": [1]}, "ties: unknown parameter; got 'nonsense'"),
        ({"density": [0.1, 7]}, "density is out of range; got 7"),
        ({"lambda": [1], "lambda_": [2]}, "no parameters to sweep"),
    ],
)
def test_sweep_that_is_none(
    models: list[Path], tmp_path: Path, sweep: dict[str, Any], text: str
) -> None:
    with pytest.raises((ArgumentError, mk.ConfigError), match=text):
        mk.merge_sweep(ties(*models), tmp_path / "out", sweep, progress=False)
    assert not (tmp_path / "out").exists()
