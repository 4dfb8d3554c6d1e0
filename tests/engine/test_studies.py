"""Statistics of a merge serve the next one, and never a wrong one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekern as mk
from mergekern.engine import memory, units
from mergekern.engine.studies import FOLDER
from mergekern.methods import slices

from engine.models import tensors, ties, write_file, write_folder


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_folder(tmp_path / f"m{i}", tensors(i), shards=i + 1) for i in range(3)]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def config(models: list[Path], weight: float = 1.0, **more: Any) -> dict[str, Any]:
    made = ties(*models, method="ties_global", **{"density": 0.3, **more})
    for m in made["models"]:
        m["parameters"] = {"weight": weight}
    return made


def test_other_weights_skip_the_passes(models: list[Path], tmp_path: Path) -> None:
    first = mk.merge_checkpoints(config(models), tmp_path / "a", progress=False)
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    second = mk.merge_checkpoints(config(models, 0.5), tmp_path / "b", progress=False)
    fresh = mk.merge_checkpoints(
        config(models, 0.5), tmp_path / "c", statistics=False, progress=False
    )
    plan, _ = mk.plan_merge(config(models), tmp_path / "d")
    assert second.bytes_read == plan.bytes_read < first.bytes_read == fresh.bytes_read
    assert weights(tmp_path / "b") == weights(tmp_path / "c") != weights(tmp_path / "a")


@pytest.mark.parametrize("change", ["density", "order", "content", "torn"])
def test_what_they_depend_on(models: list[Path], tmp_path: Path, change: str) -> None:
    mk.merge_checkpoints(config(models), tmp_path / "a", progress=False)
    other = config(models, 0.5)
    if change == "density":
        other = config(models, 0.5, density=0.4)
    elif change == "order":
        other = config([models[0], models[2], models[1]], 0.5)
    elif change == "content":
        write_file(models[0] / "model.safetensors", tensors(7))
    else:
        (file,) = (tmp_path / FOLDER).iterdir()
        file.write_text(file.read_text()[:-9])
    mk.merge_checkpoints(other, tmp_path / "b", progress=False)
    mk.merge_checkpoints(other, tmp_path / "c", statistics=False, progress=False)
    assert weights(tmp_path / "b") == weights(tmp_path / "c")


def test_an_input_that_changed_under_an_unchanged_stamp(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekern.engine.resume._stamp", lambda *_: [0, 0, 0])
    mk.merge_checkpoints(config(models), tmp_path / "a", progress=False)
    write_file(models[0] / "model.safetensors", tensors(7))
    with pytest.raises(mk.CheckpointError, match="an input has changed since the statistics"):
        mk.merge_checkpoints(config(models, 0.5), tmp_path / "b", progress=False)
    assert not (tmp_path / "b").exists()
    assert not os.listdir(tmp_path / FOLDER)
    mk.merge_checkpoints(config(models, 0.5), tmp_path / "b", resume=False, progress=False)


def test_a_sweep_studies_only_what_is_new(models: list[Path], tmp_path: Path) -> None:
    mk.merge_checkpoints(config(models), tmp_path / "a", progress=False)
    sweep = {"density": [0.3, 0.6]}
    mk.merge_sweep(config(models), tmp_path / "b", sweep, progress=False)
    assert len(os.listdir(tmp_path / FOLDER)) == 2
    again = mk.merge_sweep(config(models, 0.5), tmp_path / "c", sweep, progress=False)
    plan, _ = mk.plan_merge(config(models), tmp_path / "d", sweep=sweep)
    assert again["density=0.3"].bytes_read == plan.bytes_read
    assert weights(tmp_path / "b" / "density=0.3") == weights(tmp_path / "a")


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "karcher", "model_stock", "sce"])
def test_tensors_that_do_not_fit_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """They are measured slice by slice; the bits are those of tensors that do, with or without
    what was measured before."""
    monkeypatch.setattr(slices, "SLICE", 1 << 10)
    monkeypatch.setattr(units, "_BATCH", 1 << 12)
    paths = []
    for i in range(3):
        g = torch.Generator().manual_seed(i)
        content = {"small": torch.randn(9, generator=g), "big": torch.randn(99, 101, generator=g)}
        paths.append(write_file(tmp_path / f"{i}.safetensors", content))
    base = {} if method in ("karcher",) else {"base_model": str(paths[0])}
    plain = {"merge_method": method, "models": [{"model": str(p)} for p in paths[bool(base) :]]}
    options = {"weight": 0.7, "density": 0.4} if method in ("ties", "breadcrumbs") else {}
    setting = {**plain, **base, "parameters": options}
    whole = mk.merge_checkpoints(setting, tmp_path / "whole", progress=False)
    assert not (tmp_path / FOLDER).exists()
    monkeypatch.setattr(memory, "OVERHEAD", 0)
    small = 120_000  # of 4 * 4 * 9,999 bytes
    cut = mk.merge_checkpoints(setting, tmp_path / "cut", memory=small, progress=False)
    assert cut.bytes_read > whole.bytes_read
    assert len(os.listdir(tmp_path / FOLDER)) == 1
    again = mk.merge_checkpoints(setting, tmp_path / "again", memory=small, progress=False)
    assert again.bytes_read == whole.bytes_read
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole") == weights(tmp_path / "again")
