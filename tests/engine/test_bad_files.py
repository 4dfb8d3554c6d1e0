"""Broken and odd weight files: an error that names the file, or the right tensors; no crash."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekern import CheckpointError, MergekernError, merge_checkpoints
from mergekern.engine.checkpoint import Checkpoint

from accuracy import assert_bits_equal, assert_bytes_equal
from engine.models import (
    linear,
    nothing_left,
    raw_safetensors,
    read_folder,
    tensors,
    write_file,
    write_folder,
)

EIGHT = torch.arange(2.0).numpy().tobytes()


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "0 bytes": b"",
    "3 bytes": b"abc",
    "only a length": (100).to_bytes(8, "little"),
    "header longer than the file": raw_safetensors({"w": entry()}, EIGHT, length=10_000),
    "header length 2**63": raw_safetensors({"w": entry()}, EIGHT, length=1 << 63),
    "header length 2**64 - 1": b"\xff" * 8 + b"{}",
    "header length 0": raw_safetensors({"w": entry()}, EIGHT, length=0),
    "garbage header": raw_safetensors(b"\x93NUMPY garbage!!!", EIGHT),
    "half a header": raw_safetensors(b'{"w": {"dtype": "F32", "sha', EIGHT),
    "header is a list": raw_safetensors([1, 2], EIGHT),
    "not utf-8": raw_safetensors(b'{"\xff\xfe": 1}', EIGHT),
    "entry is a number": raw_safetensors({"w": 1}, EIGHT),
    "no offsets": raw_safetensors({"w": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "truncated data": raw_safetensors({"w": entry()}, EIGHT[:5]),
    "no data": raw_safetensors({"w": entry()}),
    "data beyond the last tensor": raw_safetensors({"w": entry()}, EIGHT * 2),
    "overlap": raw_safetensors({"v": entry(), "w": entry(offsets=(4, 12))}, EIGHT + EIGHT[:4]),
    "same place": raw_safetensors({"v": entry(), "w": entry()}, EIGHT),
    "hole": raw_safetensors({"v": entry(), "w": entry(offsets=(12, 20))}, EIGHT * 2 + EIGHT[:4]),
    "offsets backwards": raw_safetensors({"w": entry(offsets=(8, 0))}, EIGHT),
    "offsets beyond": raw_safetensors({"w": entry(offsets=(800, 808))}, EIGHT),
    "negative offset": raw_safetensors({"w": entry(offsets=(-8, 0))}, EIGHT),
    "shape too large": raw_safetensors({"w": entry(shape=(3,))}, EIGHT),
    "shape overflows": raw_safetensors({"w": entry(shape=(1 << 62, 1 << 62))}, EIGHT),
    "negative shape": raw_safetensors({"w": entry(shape=(-2,))}, EIGHT),
    "unknown dtype": raw_safetensors({"w": entry("F33")}, EIGHT),
    "block scales": raw_safetensors({"w": entry("F8_E8M0", (8,))}, EIGHT),
    "metadata of numbers": raw_safetensors({"__metadata__": {"a": 1}, "w": entry()}, EIGHT),
    "a zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_safetensors(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_truncated_at_any_place(tmp_path: Path, suffix: str) -> None:
    whole = write_file(tmp_path / f"whole{suffix}", tensors()).read_bytes()
    path = tmp_path / f"m{suffix}"
    rng = random.Random(0)
    for size in {0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(25))}:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(path)
        assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")  # on odd pickle protocols
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".old.bin"])
def test_garbled_bytes_end_in_our_error_or_in_tensors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    if suffix == ".old.bin":
        torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    else:
        write_file(path, tensors())
    whole = path.read_bytes()
    rng = random.Random(1)
    refused = 0
    for _ in range(120):
        garbled = bytearray(whole)
        for _ in range(rng.randrange(1, 20)):
            garbled[rng.randrange(min(len(garbled), 1500))] = rng.randrange(256)
        path.write_bytes(garbled)
        try:
            found = Checkpoint(path)
            for key in found.signatures:
                found.read(key)
        except MergekernError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 40


def test_pages_of_zeros(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(bytes(5000))
    with pytest.raises(CheckpointError, match=r"m\.bin"):
        Checkpoint(path)


# ---- odd but valid ---------------------------------------------------------------------------


@pytest.mark.parametrize("pad", range(8))
@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16"])
def test_header_of_any_length(tmp_path: Path, pad: int, dtype: str) -> None:
    """The format does not ask for aligned data; the kernels do."""
    kinds = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16}
    x = torch.arange(1.0, 41.0).to(kinds[dtype])
    data = x.view(torch.uint8).numpy().tobytes()
    header = {"w": entry(dtype, (40,), (0, len(data)))}
    for i in range(2):
        (tmp_path / f"{i}.safetensors").write_bytes(raw_safetensors(header, data, pad=pad))
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    assert_bytes_equal(Checkpoint(paths[0]).read("w"), x)
    merge_checkpoints(linear(*paths), tmp_path / "out", progress=False)
    assert_bits_equal(read_folder(tmp_path / "out")["w"], x)


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_ties"])
def test_scalars_and_no_elements(tmp_path: Path, method: str) -> None:
    content = {"scalar": torch.tensor(2.0), "none": torch.zeros(0), "hole": torch.zeros(3, 0, 2)}
    paths = [write_file(tmp_path / f"{i}.safetensors", content) for i in range(2)]
    config = linear(*paths) | {"merge_method": method}
    if method == "slerp":
        config["models"] = [{"model": str(p)} for p in paths]
        config["parameters"] = {"t": 0.5}
    elif method != "linear":
        base = write_file(tmp_path / "base.safetensors", content)
        config |= {"base_model": str(base), "parameters": {"density": 0.5}}
    merge_checkpoints(config, tmp_path / "out", progress=False)
    for key, x in read_folder(tmp_path / "out").items():
        assert_bits_equal(x, content[key])


def test_file_without_tensors(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.safetensors", {})
    with pytest.raises(CheckpointError, match="no weights found"):
        Checkpoint(path)


# ---- indices ---------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def rewrite(folder: Path, **changes: str | None) -> None:
    """Changes entries of the weight map; None removes one."""
    index = json.loads((folder / INDEX).read_text())
    where = index["weight_map"] | changes
    index["weight_map"] = {k: v for k, v in where.items() if v is not None}
    (folder / INDEX).write_text(json.dumps(index))


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m", tensors(), shards=3)
    gone = root / "model-00002-of-00003.safetensors"
    gone.unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(root)
    assert str(gone) in str(caught.value)
    assert "names this shard" in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"ghost": "model-00001-of-00003.safetensors"}, {"head.weight": None}]
)
def test_index_and_shard_disagree(tmp_path: Path, changes: dict[str, str | None]) -> None:
    root = write_folder(tmp_path / "m", tensors(), shards=3)
    rewrite(root, **changes)
    with pytest.raises(CheckpointError, match=f"disagree about 1 tensors: {next(iter(changes))}"):
        Checkpoint(root)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xff",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 5}}',
        b'{"weight_map": {"a": ["b"]}}',
        b'{"weight_map": {"a": null}}',
        b'{"weight_map": {"a": "../outside.safetensors"}}',
        b'{"weight_map": {"a": "/etc/passwd"}}',
        b'{"weight_map": {"a": ".."}}',
        b'{"weight_map": {"a": ""}}',
        b'{"weight_map": {"a": "."}}',
        b'{"weight_map": {"a": "sub/inside.safetensors"}}',
        b'{"weight_map": {"a": "x/../../outside.safetensors"}}',
        b'{"weight_map": {"a": "..\\\\outside.safetensors"}}',
        b'{"weight_map": {"a": "outside.safetensors\\u0000"}}',
        b'{"weight_map": {"a": "out\\nside.safetensors"}}',
        b"[" * 100_000,
    ],
)
def test_index_that_cannot_be_read(tmp_path: Path, text: bytes) -> None:
    root = write_folder(tmp_path / "m", tensors(), shards=2)
    for path in (tmp_path / "outside.safetensors", root / "sub" / "inside.safetensors"):
        write_file(path, {"a": torch.ones(1)})
    (root / INDEX).write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(root)
    assert str(caught.value).startswith(f"{root / INDEX}: no readable index")
    assert "\n" not in str(caught.value)


def test_one_broken_shard_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m", tensors(), shards=3)
    broken = root / "model-00003-of-00003.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="model-00003-of-00003"):
        merge_checkpoints(linear(root, root), tmp_path / "out", progress=False)
    assert nothing_left(tmp_path, "out")
