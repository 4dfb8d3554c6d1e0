"""verify: an output against its manifest, its inputs, and a second merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekern as mk
from mergekern.engine.manifest import MANIFEST
from mergekern.methods import slices

from engine.models import tensors, ties, write_folder


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_folder(tmp_path / f"m{i}", tensors(i), shards=i + 1) for i in range(3)]


@pytest.fixture
def out(models: list[Path], tmp_path: Path) -> Path:
    config = ties(*models, density=0.4)
    mk.merge_checkpoints(config, tmp_path / "out", shard_size=600, progress=False)
    return tmp_path / "out"


def check(out: Path, **options: Any) -> mk.Verification:
    return mk.verify(out, progress=False, **options)


def edit(path: Path, **values: Any) -> None:
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, **values}))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_all_is_as_recorded(out: Path) -> None:
    found = check(out, inputs=True, replay=["*"])
    count = len(tensors())
    # position_ids is copied and read of the first model alone
    assert (found.problems, found.notes) == ((), ())
    assert (found.tensors, found.replayed, found.inputs) == (count, count, 3 * count - 2)
    weights = json.loads((out / MANIFEST).read_text())["weights"]
    assert found.files == len(list(out.rglob("*"))) - len(weights) - 1


def test_manifest_does_not_depend_on_the_run(models: list[Path], out: Path, tmp_path: Path) -> None:
    config = ties(*models, density=0.4)
    again = tmp_path / "again"
    mk.merge_checkpoints(config, again, shard_size=600, memory="2MiB", progress=False)
    assert (again / MANIFEST).read_bytes() == (out / MANIFEST).read_bytes()


@pytest.mark.parametrize("file", [0, 1, -1])
def test_one_bit_of_the_weights(out: Path, file: int) -> None:
    path = sorted(out.glob("*.safetensors"))[file]
    flip(path)
    (problem,) = check(out).problems
    assert problem.startswith(f"{path.name}: tensor ")
    assert problem.endswith("is not what was written")


def test_weights_that_are_replaced_missing_or_cut_short(out: Path) -> None:
    first, second, third, *_ = sorted(out.glob("*.safetensors"))
    kept = load_file(first)
    save_file({**{k: x[..., :1].clone() for k, x in kept.items()}, "more": torch.ones(1)}, first)
    second.unlink()
    third.write_bytes(third.read_bytes()[:-1])
    problems = check(out).problems
    assert f"{first.name}: holds tensor more, which the merge did not write" in problems
    assert sum("of another shape or dtype" in p for p in problems) == len(kept)
    assert any(second.name in p for p in problems)
    assert any(third.name in p and "no readable safetensors" in p for p in problems)


def test_files_beside_the_weights(out: Path) -> None:
    (out / "README.md").write_text("mine")
    (out / "notes.txt").write_text("mine")
    flip(out / "config.json")
    (out / "mergekern_config.yml").unlink()
    found = check(out)
    assert sorted(found.problems) == [
        "config.json: is not what was written",
        "mergekern_config.yml: is not there any more",
    ]
    assert found.notes == ("README.md: edited since", "notes.txt: not part of the merge")


def test_inputs_that_have_changed(models: list[Path], out: Path) -> None:
    flip(next(models[1].glob("*-00001-*.safetensors")))
    assert check(out).problems == ()  # names and sizes are the same
    (problem,) = check(out, inputs=True).problems
    assert f"input {models[1]}" in problem
    assert "is not what was read" in problem
    changed = check(out, replay=["*"]).problems
    assert len(changed) == 1
    assert "merged again, it comes out differently" in changed[0]


def test_inputs_of_other_names_or_gone(models: list[Path], out: Path) -> None:
    path = models[0] / "model.safetensors"
    save_file({**load_file(path), "more": torch.ones(1)}, path, {"format": "pt"})
    (models[2] / "model.safetensors.index.json").unlink()
    for shard in models[2].glob("*.safetensors"):
        shard.unlink()
    for options in ({}, {"inputs": True}):
        found = check(out, **options)
        changed = f"input {models[0]}: model.safetensors is another file than was read"
        gone = f"input {models[2]}: no weights found (looked for *.safetensors, *.bin)"
        assert (found.problems, found.notes) == ((changed,), (gone,))
    with pytest.raises(mk.CheckpointError, match="no weights found"):
        check(out, replay=["*"])


@pytest.mark.parametrize("method", ["dare_ties", "ties_global", "karcher"])
def test_replay_of_masks_surveys_and_sweeps(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(slices, "SLICE", 16)
    config = ties(*models, method=method)
    if method == "karcher":
        config = {"merge_method": method, "models": [{"model": str(p)} for p in models]}
    name, values = ("max_iter", [1, 5]) if method == "karcher" else ("density", [0.3, 0.5])
    mk.merge_sweep(config, tmp_path / "out", {name: values}, seed=3, progress=False)
    for value in values:
        point = tmp_path / "out" / f"{name}={value}"
        found = check(point, replay=["encoder.*", "head.weight"])
        assert (found.problems, found.replayed) == ((), 2 * 4 + 1)
        edit_tensor(point, "head.weight", "0" * 32)
        assert len(check(point, replay=["head*"]).problems) == 2  # in the file, and merged again


def edit_tensor(out: Path, key: str, digest: str) -> None:
    about = json.loads((out / MANIFEST).read_text())
    about["tensors"][key]["digest"] = digest
    (out / MANIFEST).write_text(json.dumps(about))


def test_what_cannot_be_verified(out: Path, tmp_path: Path) -> None:
    with pytest.raises(mk.CheckpointError, match=f"holds no {MANIFEST}"):
        check(tmp_path)
    with pytest.raises(mk.CheckpointError, match="'none\\*' fits no tensor"):
        check(out, replay=["none*"])
    edit(out / MANIFEST, slice=7)
    with pytest.raises(mk.CheckpointError, match="made by slices of 7 elements"):
        check(out, replay=["*"])
    edit(out / MANIFEST, format=99)
    with pytest.raises(mk.CheckpointError, match="has format 99; this version reads 1"):
        check(out)
    (out / MANIFEST).write_text("{")
    with pytest.raises(mk.CheckpointError, match=f"holds no {MANIFEST}"):
        check(out)
