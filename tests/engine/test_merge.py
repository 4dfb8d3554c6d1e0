"""merge_checkpoints: what is written, what is refused, and what is left behind when it fails."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import mergekern as mk
from mergekern import ArgumentError, CheckpointError, ConfigError, merge_checkpoints
from mergekern.check import parse_size

from accuracy import assert_bits_equal, assert_bytes_equal
from engine.models import (
    can_go_on,
    linear,
    nothing_left,
    python,
    read_folder,
    tensors,
    ties,
    write_file,
    write_folder,
)

TASK_VECTORS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


def merge(config: dict[str, Any], out: Path, **options: Any) -> mk.Manifest:
    return merge_checkpoints(config, out, progress=False, **options)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Three model folders: one file, shards, pickled shards."""
    return [
        write_folder(tmp_path / "base", tensors(0)),
        write_folder(tmp_path / "a", tensors(1), shards=3),
        write_folder(tmp_path / "b", tensors(2), shards=2, suffix=".bin"),
    ]


@pytest.fixture
def no_new_threads() -> Any:
    """Fails if the test leaves threads of the engine behind."""
    yield
    left = [t.name for t in threading.enumerate() if t.name.startswith("mergekern-")]
    assert not left


@pytest.fixture
def deadline() -> Any:
    """Fails a run that hangs, instead of hanging with it."""

    def late(*_: Any) -> None:
        raise AssertionError("the run hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---- results ---------------------------------------------------------------------------------


def same_as_state_dicts(
    out: Path, states: list[dict[str, torch.Tensor]], method: str, **options: Any
) -> None:
    want = mk.merge_state_dicts(states, method, **options)
    got = read_folder(out)
    assert set(got) == set(want)
    for key, x in want.items():
        assert_bits_equal(got[key], x)


def test_linear_of_mixed_layouts_is_the_merge_of_the_state_dicts(
    models: list[Path], tmp_path: Path
) -> None:
    done = merge(linear(*models, weights=(1, 2, 3)), tmp_path / "out")
    states = [tensors(i) for i in range(3)]
    same_as_state_dicts(tmp_path / "out", states, "linear", weight=[1, 2, 3])
    assert (done.merged, done.copied, done.dropped) == (len(states[0]) - 1, 1, ())
    assert done.weights == ("model.safetensors",)
    size = sum(x.nbytes for x in states[0].values())
    buffer = states[0]["embeddings.position_ids"].nbytes
    assert done.bytes_written == size
    assert done.bytes_read in (3 * size, 3 * size - 2 * buffer)


@pytest.mark.parametrize("method", TASK_VECTORS)
def test_task_vectors_are_the_merge_of_the_state_dicts(
    models: list[Path], tmp_path: Path, method: str
) -> None:
    base, a, b = models
    config = ties(base, a, b, method=method, density=0.4, **{"lambda": 0.7})
    merge(config, tmp_path / "out", seed=3)
    options = {"base": tensors(0), "weight": 1.0, "density": 0.4, "lambda_": 0.7, "seed": 3}
    same_as_state_dicts(tmp_path / "out", [tensors(1), tensors(2)], method, **options)


def test_slerp_with_its_base_listed_last(models: list[Path], tmp_path: Path) -> None:
    config = {
        "merge_method": "slerp",
        "base_model": str(models[0]),
        "models": [{"model": str(models[1])}, {"model": str(models[0])}],
        "parameters": {"t": 0.2},
    }
    merge(config, tmp_path / "out")
    same_as_state_dicts(tmp_path / "out", [tensors(0), tensors(1)], "slerp", t=0.2)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
@pytest.mark.parametrize("base", ["none", "apart", "listed"])
def test_an_optional_base_is_subtracted_if_given(
    models: list[Path], tmp_path: Path, method: str, base: str
) -> None:
    entries = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models[1:], (1, 3))]
    config: dict[str, Any] = {"merge_method": method, "models": entries}
    if base != "none":
        config["base_model"] = str(models[0])
    if base == "listed":
        entries.insert(1, {"model": str(models[0])})
    done = merge(config, tmp_path / "out")
    origin = None if base == "none" else tensors(0)
    options = {"base": origin, "weight": [1, 3]}
    same_as_state_dicts(tmp_path / "out", [tensors(1), tensors(2)], method, **options)
    assert done.merged == len(tensors(0)) - 1


@pytest.mark.parametrize(
    ("method", "base", "given"),
    [
        ("karcher", None, {"max_iter": 3}),
        ("model_stock", 0, {"filter_wise": True}),
        ("nuslerp", 0, {"weight": 1, "nuslerp_flatten": False}),
    ],
)
def test_geometry_is_the_merge_of_the_state_dicts(
    models: list[Path], tmp_path: Path, method: str, base: int | None, given: dict[str, Any]
) -> None:
    config = {
        "merge_method": method,
        "base_model": None if base is None else str(models[base]),
        "models": [{"model": str(m)} for m in models[1:]],
        "parameters": given,
    }
    merge(config, tmp_path / "out")
    origin = None if base is None else tensors(base)
    states = [tensors(1), tensors(2)]
    same_as_state_dicts(tmp_path / "out", states, method, base=origin, **given)


def test_directions_that_cancel_are_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    x = {"layer.weight": torch.ones(3)}
    states = [x, {k: -v for k, v in x.items()}, {k: 0 * v for k, v in x.items()}]
    paths = [write_folder(tmp_path / str(i), s) for i, s in enumerate(states)]
    config = {
        "merge_method": "multislerp",
        "models": [{"model": str(p)} for p in paths],
        "parameters": {"weight": 1},
    }
    with pytest.raises(ArgumentError, match=r"directions of layer\.weight cancel"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gradients_and_filters_reach_each_tensor(models: list[Path], tmp_path: Path) -> None:
    t = [{"filter": "bias", "value": [0, 1]}, {"filter": "encoder", "value": 0.25}, {"value": 0.5}]
    config = {
        "merge_method": "slerp",
        "models": [{"model": str(m)} for m in models[:2]],
        "parameters": {"t": t},
    }
    merge(config, tmp_path / "out")
    got = read_folder(tmp_path / "out")
    a, b = tensors(0), tensors(1)
    for key, x in got.items():
        if x.is_floating_point():
            layer = int(key.split(".")[2]) if key.startswith("encoder") else 0
            share = layer / 3 if "bias" in key else 0.25 if "encoder" in key else 0.5
            assert_bits_equal(x, mk.merge_tensors([a[key], b[key]], "slerp", t=share))


def test_mixed_dtypes_are_promoted_and_out_dtype_rounds_once(tmp_path: Path) -> None:
    kinds = (torch.float16, torch.bfloat16)
    states = [tensors(i, d) for i, d in enumerate(kinds)]
    paths = [write_file(tmp_path / f"{i}.safetensors", s) for i, s in enumerate(states)]
    merge(linear(*paths), tmp_path / "wide")
    same_as_state_dicts(tmp_path / "wide", states, "linear", weight=1)
    assert read_folder(tmp_path / "wide")["head.weight"].dtype == torch.float32
    merge(linear(*paths, out_dtype="bfloat16"), tmp_path / "narrow")
    same_as_state_dicts(tmp_path / "narrow", states, "linear", weight=1, out_dtype=torch.bfloat16)


def test_dtype_float64_computes_in_float64(tmp_path: Path) -> None:
    states = [tensors(i) for i in range(3)]
    paths = [write_file(tmp_path / f"{i}.safetensors", s) for i, s in enumerate(states)]
    merge(linear(*paths, dtype="float64", out_dtype="float32"), tmp_path / "out")
    wide = [{k: v.double() if v.is_floating_point() else v for k, v in s.items()} for s in states]
    same_as_state_dicts(tmp_path / "out", wide, "linear", weight=1, out_dtype=torch.float32)


def test_identical_models_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m", tensors())
    merge(linear(path, path), tmp_path / "linear")
    copies = [write_folder(tmp_path / name, tensors()) for name in "ab"]
    merge(ties(path, *copies, density=0.3), tmp_path / "ties")
    for out in ("linear", "ties"):
        got = read_folder(tmp_path / out)
        assert set(got) == set(tensors())
        for key, x in tensors().items():
            assert_bits_equal(got[key], x)


# ---- shards ----------------------------------------------------------------------------------


def test_sharded_output(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = merge(linear(*models[:2]), out, shard_size=600)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted({p.name for p in out.glob("*.safetensors")})
    assert len(names) > 2
    assert names == [
        f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)
    ]
    assert sorted(done.weights) == names == sorted(set(index["weight_map"].values()))
    held = {name: load_file(out / name) for name in names}
    for key, file in index["weight_map"].items():
        assert key in held[file]
    assert sum(map(len, held.values())) == len(index["weight_map"])
    sizes = {name: sum(x.nbytes for x in part.values()) for name, part in held.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values()) == done.bytes_written
    assert all(size <= 600 or len(held[name]) == 1 for name, size in sizes.items())
    with safe_open(out / names[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    same_as_state_dicts(out, [tensors(0), tensors(1)], "linear", weight=1)


def test_a_sharded_result_can_be_merged_again(models: list[Path], tmp_path: Path) -> None:
    merge(linear(*models[:2]), tmp_path / "once", shard_size=600)
    merge(linear(tmp_path / "once"), tmp_path / "twice")
    want = read_folder(tmp_path / "once")
    for key, x in read_folder(tmp_path / "twice").items():
        assert_bits_equal(x, want[key])


@pytest.mark.parametrize("method", ["linear", "dare_ties"])
def test_bytes_depend_on_no_option_of_the_run(
    models: list[Path], tmp_path: Path, method: str
) -> None:
    config = linear(*models) if method == "linear" else ties(*models, method=method, density=0.5)
    merge(config, tmp_path / "plain")
    want = read_folder(tmp_path / "plain")
    largest = 4 * max(x.nbytes for x in want.values())
    for i, options in enumerate(
        ({"memory": largest}, {"shard_size": 300}, {"memory": largest + 100, "shard_size": "1KB"})
    ):
        merge(config, tmp_path / str(i), **options)
        got = read_folder(tmp_path / str(i))
        assert set(got) == set(want)
        for key, x in want.items():
            assert_bytes_equal(got[key], x)


def test_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        content = {"w": torch.randn(3 << 18, generator=g), "v": torch.randn(1000, generator=g)}
        write_file(tmp_path / f"{name}.safetensors", content)
    config = ties(*(tmp_path / f"{n}.safetensors" for n in ("base", "a", "b")), method="dare_ties")
    config["parameters"] = {"density": 0.3}
    (tmp_path / "merge.yml").write_text(json.dumps(config))
    files = []
    for threads in ("1", "3"):
        out = tmp_path / threads
        done = python(
            "import sys, mergekern; mergekern.merge_checkpoints(*sys.argv[1:], progress=False)",
            tmp_path / "merge.yml",
            out,
            MERGEKERN_THREADS=threads,
        )
        assert done.returncode == 0, done.stderr
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_thousands_of_tiny_tensors(tmp_path: Path) -> None:
    paths = []
    for value in (1.0, 3.0):
        content = {f"layer.{i}.p": torch.full((i % 3,), value) for i in range(4000)}
        paths.append(write_file(tmp_path / f"{value}.safetensors", content))
    done = merge(linear(*paths), tmp_path / "out", memory="1KiB")
    assert done.merged == 4000
    got = read_folder(tmp_path / "out")
    assert all(torch.equal(x, torch.full_like(x, 2.0)) for x in got.values())
    assert len(got) == 4000


# ---- the folder ------------------------------------------------------------------------------


def test_sentence_transformers_folder(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        root = write_folder(tmp_path / name, tensors(i))
        (root / "modules.json").write_text("[]")
        (root / "README.md").write_text("of a user")
        (root / "tokenizer.json").write_text("{}")
        (root / "1_Pooling").mkdir()
        (root / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
        write_folder(root / "2_Dense", {"linear.weight": torch.full((2, 3), float(i))})
        write_file(root / "pytorch_model.bin", tensors(9))
        write_file(root / "onnx" / "model.onnx_data.safetensors", tensors(9))
        (root / "tf_model.h5").touch()
        torch.save({}, root / "training_args.bin")
    out = tmp_path / "out"
    done = merge(linear(tmp_path / "a", tmp_path / "b"), out)
    dense = load_file(out / "2_Dense" / "model.safetensors")
    assert_bits_equal(dense["linear.weight"], torch.full((2, 3), 0.5))
    same_as_state_dicts(out, [tensors(0), tensors(1)], "linear", weight=1)
    for name in ("config.json", "modules.json", "tokenizer.json", "1_Pooling/config.json"):
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert set(done.carried) == {
        "config.json",
        "modules.json",
        "tokenizer.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
    }
    assert set(done.left_out) == {
        "README.md",
        "pytorch_model.bin",
        "onnx/",
        "tf_model.h5",
        "training_args.bin",
    }
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    made = {
        "README.md",
        "mergekern_config.yml",
        "mergekern_manifest.json",
        "model.safetensors",
        "2_Dense/model.safetensors",
    }
    assert written == set(done.carried) | made
    assert "of a user" not in (out / "README.md").read_text()


def test_card_and_configuration(models: list[Path], tmp_path: Path) -> None:
    text = f"# mine\nmerge_method: ties\nbase_model: {models[0]}\nmodels:\n" + "".join(
        f"- {{model: {m}, parameters: {{weight: 1}}}}\n" for m in models[1:]
    )
    (tmp_path / "merge.yml").write_text(text)
    merge_checkpoints(tmp_path / "merge.yml", tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "mergekern_config.yml").read_text() == text
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("---\ntags:", "`ties`", *(f"`{m}`" for m in models), text.strip()):
        assert part in card
    merge_checkpoints(tmp_path / "out" / "mergekern_config.yml", tmp_path / "2", progress=False)
    for key, x in read_folder(tmp_path / "2").items():
        assert_bits_equal(x, read_folder(tmp_path / "out")[key])


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_files_come_from_the_base_wherever_it_is_listed(
    models: list[Path], tmp_path: Path, method: str
) -> None:
    """In linear the base is a model among the others, here the last, and still gives the files."""
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(models[1]),
        "models": [{"model": str(models[0])}],
        "parameters": {"t": 0.5} if method == "slerp" else {"weight": 1},
    }
    merge(config, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"from": "a"}


def test_output_folder_has_usual_permissions(models: list[Path], tmp_path: Path) -> None:
    merge(linear(models[0]), tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_inputs_are_untouched(models: list[Path], tmp_path: Path) -> None:
    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for m in models for p in m.rglob("*") if p.is_file()}

    before = content()
    merge(ties(*models), tmp_path / "out")
    assert content() == before


def test_out_may_be_an_empty_folder_or_a_new_path_below(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    merge(linear(models[0]), tmp_path / "empty")
    merge(linear(models[0]), tmp_path / "x" / "y" / "z")
    for out in ("empty", "x/y/z"):
        assert (tmp_path / out / "model.safetensors").is_file()


# ---- misfits and exceptions ------------------------------------------------------------------


@pytest.fixture
def misfits(tmp_path: Path) -> list[Path]:
    first = {
        "fine": torch.ones(2),
        "only_a": torch.ones(2),
        "shape": torch.ones(2, 3),
        "kind": torch.ones(2),
        "count": torch.tensor(3),
    }
    second = {
        "fine": 3 * torch.ones(2),
        "only_b": 5 * torch.ones(2),
        "shape": torch.ones(3, 2),
        "kind": torch.ones(2, dtype=torch.int32),
        "count": torch.tensor(4),
    }
    return [
        write_file(tmp_path / "a.safetensors", first),
        write_file(tmp_path / "b.safetensors", second),
    ]


def test_all_misfits_are_in_one_error(misfits: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        merge(linear(*misfits), tmp_path / "out")
    text = str(caught.value)
    a, b = misfits
    assert "5 tensors do not fit" in text
    for part in (
        f"only_a: missing from {b}",
        f"only_b: missing from {a}",
        f"shape: shape differs: [2, 3] in {a}, [3, 2] in {b}",
        f"kind: dtype differs: floating in {a}, int32 in {b}",
        f"count: int64 values differ in {b}",
    ):
        assert part in text
    assert "fine" not in text
    assert nothing_left(tmp_path, "out")


def rule(filter: str, action: str, **more: Any) -> dict[str, Any]:
    return {"filter": filter, "action": action, **more}


def test_exceptions_settle_every_misfit(misfits: list[Path], tmp_path: Path) -> None:
    a, b = misfits
    rules = [
        rule("only_", "present"),
        rule("shape", "copy", **{"from": str(b)}),
        rule("kind", "drop"),
        rule("count", "copy", **{"from": str(a)}),
    ]
    done = merge(linear(a, b, exceptions=rules), tmp_path / "out")
    got = read_folder(tmp_path / "out")
    assert set(got) == {"fine", "only_a", "only_b", "shape", "count"}
    assert_bits_equal(got["fine"], torch.full((2,), 2.0))
    assert_bits_equal(got["only_a"], torch.ones(2))
    assert_bits_equal(got["only_b"], 5 * torch.ones(2))
    assert got["shape"].shape == (3, 2)
    assert got["count"] == 3
    assert done.dropped == ("kind",)


def test_the_first_fitting_exception_counts(misfits: list[Path], tmp_path: Path) -> None:
    rest = rule("", "copy", **{"from": str(misfits[0])})  # an empty filter fits everything
    rules = [rule("only_a", "present"), rule("_", "drop"), rest]
    done = merge(linear(*misfits, exceptions=rules), tmp_path / "out")
    assert done.dropped == ("only_b",)
    assert set(read_folder(tmp_path / "out")) == {"fine", "only_a", "shape", "kind", "count"}


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ([rule("typo", "drop")], "exception 'typo' fits no tensor"),
        ([rule("shape", "present")], "shape: shape differs"),
        ([rule("kind", "present")], "kind: dtype differs"),
        ([rule("count", "present")], "count: int64 values differ"),
        ([rule("only_b", "copy", **{"from": "A"})], "only_b: missing from"),
    ],
)
def test_exceptions_do_not_hide_what_they_do_not_settle(
    misfits: list[Path], tmp_path: Path, rules: list[dict[str, Any]], text: str
) -> None:
    rules = [{k: str(misfits[0]) if v == "A" else v for k, v in r.items()} for r in rules]
    with pytest.raises(CheckpointError) as caught:
        merge(linear(*misfits, exceptions=rules), tmp_path / "out")
    assert text in str(caught.value)


def test_present_with_too_few_models_is_listed_with_the_other_misfits(
    misfits: list[Path], tmp_path: Path
) -> None:
    config = linear(*misfits, exceptions=[rule("only_a", "present")])
    config |= {"merge_method": "slerp", "parameters": {"t": 0.5}}
    config["models"] = [{"model": str(p)} for p in misfits]
    with pytest.raises(CheckpointError) as caught:
        merge(config, tmp_path / "out")
    assert "only_a: slerp: wrong number of models" in str(caught.value)
    assert "5 tensors" in str(caught.value)


def test_present_needs_the_base_of_task_vectors(tmp_path: Path) -> None:
    base = write_file(tmp_path / "base.safetensors", {"w": torch.ones(2), "own": torch.ones(1)})
    x = {"w": torch.full((2,), 3.0), "new": torch.ones(1)}
    a = write_file(tmp_path / "a.safetensors", x)
    config = ties(base, a) | {"exceptions": [rule("new", "present"), rule("own", "present")]}
    with pytest.raises(CheckpointError, match="new: missing from the base"):
        merge(config, tmp_path / "out")
    config["exceptions"][0]["action"] = "drop"
    merge(config, tmp_path / "out")
    got = read_folder(tmp_path / "out")
    assert_bits_equal(got["own"], torch.ones(1))  # of the base alone
    assert_bits_equal(got["w"], x["w"])


def test_present_integers_of_some_models_are_copied(tmp_path: Path) -> None:
    ids = torch.arange(3)
    contents = [{"w": torch.ones(1)}, {"w": torch.ones(1), "ids": ids}]
    paths = [write_file(tmp_path / f"{i}.safetensors", c) for i, c in enumerate(contents)]
    merge(linear(*paths, exceptions=[rule("ids", "present")]), tmp_path / "out")
    assert_bytes_equal(read_folder(tmp_path / "out")["ids"], ids)


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_output_that_exists(models: list[Path], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "keep").write_text("mine")
    else:
        out.write_text("mine")
    with pytest.raises(CheckpointError, match="out: output exists already"):
        merge(linear(models[0]), out)
    assert (out / "keep" if kind == "folder" else out).read_text() == "mine"
    assert [p.name for p in tmp_path.glob(".out*")] == []


def test_parent_that_is_a_file(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="out: cannot be written"):
        merge(linear(models[0]), tmp_path / "file" / "out")


def test_parent_that_refuses(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(Permission denied\)"):
        merge(linear(models[0]), tmp_path / "out")


def test_disk_that_is_too_small_is_known_before(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match=r"the result needs .* GB, the disk has 0\.00 GB"):
        merge(linear(models[0]), tmp_path / "out")
    assert nothing_left(tmp_path, "out")


def test_memory_that_is_too_small_names_the_largest_tensor_and_its_need(tmp_path: Path) -> None:
    content = {"small": torch.zeros(3 << 18), "large": torch.zeros(5 << 18), "tiny": torch.zeros(1)}
    path = write_file(tmp_path / "m.safetensors", content)
    with pytest.raises(CheckpointError) as caught:
        merge(linear(path, path), tmp_path / "out", memory="14MiB")
    assert "tensor large needs 15 MiB" in str(caught.value)
    assert "14.0 MiB" in str(caught.value)
    merge(linear(path, path), tmp_path / "out", memory="15MiB")


@pytest.mark.parametrize("size", ["", "0", "-1GB", "many", "1.2.3GB", "5PB", "GB", 0, -3, None])
@pytest.mark.parametrize("option", ["memory", "shard_size"])
def test_size_that_is_none(models: list[Path], tmp_path: Path, option: str, size: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{option}: no size"):
        merge(linear(models[0]), tmp_path / "out", **{option: size})


def test_sizes() -> None:
    texts = {"1": 1, "5B": 5, "1k": 1024, "1KB": 1000, "1KiB": 1024, "2.5 GB": 2_500_000_000}
    texts |= {
        "4G": 4 << 30,
        "4GiB": 4 << 30,
        "1TiB": 1 << 40,
        "64MB": 64_000_000,
        " 7 MiB ": 7 << 20,
    }
    assert {text: parse_size("x", text) for text in texts} == texts
    assert parse_size("x", 10**12) == 10**12


@pytest.mark.parametrize("device", ["gpu", "meta", "mps", "cuda:99", ""])
def test_device_that_is_none(models: list[Path], tmp_path: Path, device: str) -> None:
    with pytest.raises(ArgumentError, match="device"):
        merge(linear(models[0]), tmp_path / "out", device=device)


def test_backend_that_is_none(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(mk.BackendError, match="no such backend"):
        merge(linear(models[0]), tmp_path / "out", backend="fast")
    assert nothing_left(tmp_path, "out")


def test_missing_parameter_is_found_before_anything_is_written(
    models: list[Path], tmp_path: Path
) -> None:
    config = linear(*models)
    config["models"][1]["parameters"] = {"weight": [{"filter": "encoder", "value": 1}]}
    with pytest.raises(ConfigError, match="'weight' is required"):
        merge(config, tmp_path / "out")
    assert nothing_left(tmp_path, "out")


# ---- failures midway -------------------------------------------------------------------------


@pytest.fixture
def blocks(tmp_path: Path) -> list[Path]:
    """Two models of 12 tensors of 1 MiB."""
    paths = []
    for i in range(2):
        content = {f"layer.{n}.w": torch.full((1 << 18,), float(i + n)) for n in range(12)}
        paths.append(write_file(tmp_path / f"{i}.safetensors", content))
    return paths


@pytest.mark.usefixtures("no_new_threads", "deadline")
@pytest.mark.parametrize("memory", ["3MiB", "7MiB", "1GiB"])
@pytest.mark.parametrize("writes", [0, 1, 3, 8])
def test_disk_that_fills_up_midway(
    blocks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str, writes: int
) -> None:
    """With memory for one tensor the reader waits for the writer, and must not do so for ever."""
    real, calls = os.pwritev, [0]

    def full(fd: int, data: Any, offset: int) -> int:
        calls[0] += 1
        if calls[0] > writes:
            time.sleep(0.02)  # the computing thread is back at its queue by now
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwritev", full)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=r"out: writing failed \(No space left on device\)"):
        merge(linear(*blocks), tmp_path / "out", memory=memory, shard_size="3MiB")
    assert (can_go_on if writes else nothing_left)(tmp_path, "out")
    assert set(os.listdir("/proc/self/fd")) <= before


def test_short_writes_are_continued(
    blocks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, run, at: real(fd, [run[0][:99_991]], at))
    merge(linear(*blocks), tmp_path / "out")
    for n in range(12):
        got = read_folder(tmp_path / "out")[f"layer.{n}.w"]
        assert_bits_equal(got, torch.full((1 << 18,), n + 0.5))


def test_sync_or_rename_that_fails(
    blocks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for owner, name in ((os, "fsync"), (Path, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(CheckpointError, match="writing failed"):
                merge(linear(*blocks), tmp_path / "out")
        assert can_go_on(tmp_path, "out")
    merge(linear(*blocks), tmp_path / "out")


def test_everything_written_is_synced(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file and folder under its last content, before the result gets its name."""
    synced: list[str] = []
    real = os.fsync

    def spy(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    write_folder(models[0] / "2_Dense", {"x": torch.ones(1)})
    monkeypatch.setattr(os, "fsync", spy)
    merge(linear(models[0]), tmp_path / "out", shard_size=600)
    staging = f"{tmp_path}/.out.mergekern/out"
    inside = {Path(p).relative_to(staging).as_posix() for p in synced if p.startswith(staging)}
    made = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert inside == made | {"."}
    assert synced[-1] == str(tmp_path)


@pytest.mark.usefixtures("no_new_threads", "deadline")
@pytest.mark.parametrize("memory", ["4MiB", "1GiB"])
def test_parameter_found_bad_midway(blocks: list[Path], tmp_path: Path, memory: str) -> None:
    density = [{"filter": "layer.9.", "value": 1.5}, {"value": 0.5}]
    with pytest.raises(ConfigError, match=r"density.*1\.5"):
        merge(ties(*blocks, density=density), tmp_path / "out", memory=memory)
    assert nothing_left(tmp_path, "out")


@pytest.mark.usefixtures("no_new_threads", "deadline")
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_error_while_computing_or_reading(
    blocks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type
) -> None:
    from mergekern.engine.computing import Computing
    from mergekern.engine.output import Output
    from mergekern.engine.reading import Reader

    for owner, name, after in (
        (Computing, "_compute", 4),
        (Reader, "load", 9),
        (Output, "write", 5),
    ):
        real, calls = getattr(owner, name), [0]

        def fail(*a: Any, real: Any = real, calls: list = calls, after: int = after) -> Any:
            calls[0] += 1
            if calls[0] > after:
                raise error("by hand")
            return real(*a)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(error, match="by hand"):
                merge(linear(*blocks), tmp_path / "out", memory="4MiB", resume=False)
        assert can_go_on(tmp_path, "out")
    merge(linear(*blocks), tmp_path / "out")


# ---- other processes -------------------------------------------------------------------------

RUN = "import sys, mergekern; mergekern.merge_checkpoints(sys.argv[1], sys.argv[2], progress=False)"
SLOW = """
import os, sys, time
real = os.pwritev
def slow(*a):
    print("writing", flush=True)
    time.sleep(0.05)
    return real(*a)
os.pwritev = slow
"""


def start(tmp_path: Path, blocks: list[Path]) -> subprocess.Popen[str]:
    """A merge that is writing, slowly."""
    (tmp_path / "merge.yml").write_text(json.dumps(linear(*blocks)))
    command = [sys.executable, "-c", SLOW + RUN, tmp_path / "merge.yml", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "writing\n"
    return process


def test_killed_midway_leaves_nothing_under_the_name(blocks: list[Path], tmp_path: Path) -> None:
    process = start(tmp_path, blocks)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    merge(linear(*blocks), tmp_path / "out")  # what the dead one left does not hinder


def test_interrupted_midway_can_go_on(blocks: list[Path], tmp_path: Path) -> None:
    process = start(tmp_path, blocks)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert can_go_on(tmp_path, "out")


def test_file_size_limit_of_the_system(blocks: list[Path], tmp_path: Path) -> None:
    """A real refusal by the kernel (EFBIG) in the middle of the run."""
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, resource.RLIM_INFINITY))\n"
    (tmp_path / "merge.yml").write_text(json.dumps(linear(*blocks)))
    done = python(limited + RUN, tmp_path / "merge.yml", tmp_path / "out")
    assert done.returncode == 1
    assert "out: writing failed (File too large)" in done.stderr
    assert nothing_left(tmp_path, "out")


PEAK = """
import re, sys
import mergekern, torch
from mergekern.engine import run
mergekern.merge_checkpoints(sys.argv[1], sys.argv[2] + ".warm", progress=False)  # pools, imports
def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = status("VmRSS")
mergekern.merge_checkpoints(sys.argv[3], sys.argv[2], memory=sys.argv[4], progress=False)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
def test_memory_stays_within_the_window(tmp_path: Path, method: str) -> None:
    """240 MB of inputs and 80 MB of output pass through 40 MB."""
    size, count, limit = 1 << 20, 20, 40 << 20
    paths = []
    for i in range(3):
        content = {f"layer.{n}.w": torch.full((size,), i + n / 7) for n in range(count)}
        paths.append(write_file(tmp_path / f"{i}.safetensors", content))
    small = [write_file(tmp_path / f"s{i}.safetensors", {"w": torch.ones(99)}) for i in range(3)]
    for name, three in (("merge.yml", paths), ("warm.yml", small)):
        parameters = {} if method == "linear" else {"density": 0.5}
        made = ties(*three, method=method, **parameters)
        if method == "linear":
            made = linear(*three)
        (tmp_path / name).write_text(json.dumps(made))
    # glibc keeps freed blocks of up to 32 MiB for itself unless told not to.
    done = python(
        PEAK,
        *(tmp_path / name for name in ("warm.yml", "out", "merge.yml")),
        limit,
        MALLOC_MMAP_THRESHOLD_="65536",
    )
    assert done.returncode == 0, done.stderr
    # Beside the window: stacks and scratch of the threads, and candidates of a trim (a buffer of
    # a chunk of 256 Ki elements each); far less than the 320 MB that pass through.
    assert int(done.stdout) < limit + (8 << 20)
