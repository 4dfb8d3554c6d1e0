"""Merges leave no cycles behind, and the collector of cycles as it was."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from mergekern import merge_checkpoints
from mergekern.engine.collector import paused, spared
from mergekern.errors import MergekernError

from engine.models import linear, tensors, write_file


@pytest.fixture
def config(tmp_path: Path) -> dict:
    return linear(*(write_file(tmp_path / f"{i}.safetensors", tensors(i)) for i in range(3)))


@pytest.mark.parametrize("method", ["linear", "ties", "karcher", "ties_global", "della"])
def test_a_merge_makes_no_cycles_of_tensors(config: dict, tmp_path: Path, method: str) -> None:
    """What the collector would find if it were asked after the merge."""
    if method in ("ties", "ties_global", "della"):
        config |= {"base_model": config["models"].pop(0)["model"]}
    if method == "karcher":
        config.pop("parameters", None)
        config["models"] = [{"model": m["model"]} for m in config["models"]]
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        merge_checkpoints({**config, "merge_method": method}, tmp_path / "out", progress=False)
        gc.collect()
        assert [type(x) for x in gc.garbage if isinstance(x, torch.Tensor)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_the_collector_is_as_it_was(config: dict, tmp_path: Path) -> None:
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    merge_checkpoints(config, tmp_path / "out", progress=False)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    with pytest.raises(MergekernError):
        merge_checkpoints({**config, "models": []}, tmp_path / "other", progress=False)
    assert gc.isenabled()


def test_who_has_stopped_it_keeps_it_stopped() -> None:
    gc.disable()
    try:
        with paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_who_has_frozen_objects_keeps_them_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with spared():
            assert gc.get_freeze_count() == frozen
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()
