"""Reading models: files, folders, shards, subfolders, pickles; what is refused, by name."""

from __future__ import annotations

import json
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekern import CheckpointError, merge_checkpoints
from mergekern.engine.checkpoint import Checkpoint
from mergekern.engine.files import DTYPES, SafetensorsFile, SafetensorsWriter
from mergekern.methods.compat import Signature

from accuracy import assert_bytes_equal
from engine.models import tensors, write_file, write_folder


def same(path: Path, content: dict[str, torch.Tensor]) -> Checkpoint:
    """The checkpoint at `path`, which holds exactly `content`."""
    found = Checkpoint(path)
    assert set(found.signatures) == set(content)
    for key, x in content.items():
        assert found.signatures[key] == (x.dtype, tuple(x.shape))
        assert_bytes_equal(found.read(key), x)
    return found


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth", ".ckpt"])
def test_single_file(tmp_path: Path, suffix: str) -> None:
    content = tensors()
    found = same(write_file(tmp_path / f"m{suffix}", content), content)
    assert found.folder is None
    found.close()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_folder(tmp_path: Path, suffix: str, shards: int) -> None:
    content = tensors(dtype=torch.bfloat16)
    found = same(write_folder(tmp_path / "m", content, shards=shards, suffix=suffix), content)
    assert len(found.weight_files) == (shards if shards == 1 else shards + 1)
    assert found.stems == {"": "model"}


def test_sentence_transformers_folder(tmp_path: Path) -> None:
    encoder, dense = tensors(0), {"linear.weight": torch.ones(2, 3)}
    root = write_folder(tmp_path / "m", encoder)
    write_folder(root / "1_Pooling", {}, shards=1)
    (root / "1_Pooling" / "model.safetensors").unlink()
    write_folder(root / "2_Dense", dense)
    found = same(root, encoder | {"2_Dense/linear.weight": dense["linear.weight"]})
    assert found.split("2_Dense/linear.weight") == ("2_Dense/", "linear.weight")
    assert found.split("head.weight") == ("", "head.weight")


def test_safetensors_goes_before_bin_and_exports_are_not_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m", tensors(0))
    write_file(root / "pytorch_model.bin", tensors(1))
    write_file(root / "model.fp16.safetensors", tensors(2))
    torch.save({"lr": torch.zeros(1)}, root / "training_args.bin")
    write_file(root / "onnx" / "model.safetensors", tensors(3))
    write_file(root / ".cache" / "x" / "model.safetensors", tensors(3))
    same(root, tensors(0))


def test_pickle_with_state_dict_inside_and_parameters(tmp_path: Path) -> None:
    content = tensors()
    wrapped = {k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in content.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "m.ckpt")
    found = same(tmp_path / "m.ckpt", content)
    assert not any(found.read(k).requires_grad for k in content)


def test_pickle_of_old_torch(tmp_path: Path) -> None:
    """The format before zip files, in which much of the hub still is; it cannot be mapped."""
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    same(path, tensors())


def test_tied_weights_of_a_pickle(tmp_path: Path) -> None:
    x = torch.randn(4, 4)
    torch.save({"a": x, "b": x, "c": x.T, "d": x[1]}, tmp_path / "m.bin")
    same(tmp_path / "m.bin", {"a": x, "b": x, "c": x.T, "d": x[1]})


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    root = tmp_path / "model"
    root.mkdir()
    path = root / "pytorch_model.bin"
    torch.save({"w": torch.ones(2), "evil": _Trap(trap)}, path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(root)
    assert str(path) in str(caught.value)
    assert "weights_only" in str(caught.value)
    assert "trust" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"a": 3}, {0: torch.ones(2)}, torch.ones(2), {"a": {"b": torch.ones(2)}}],
    ids=["list", "number", "number as name", "tensor", "nested"],
)
def test_pickle_of_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match="holds no plain mapping"):
        Checkpoint(tmp_path / "m.bin")


def test_refused_paths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none: no such file or folder"):
        Checkpoint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: no weights found"):
        Checkpoint(tmp_path / "empty")
    (tmp_path / "m.gguf").touch()
    with pytest.raises(CheckpointError, match=r"m\.gguf: no weight file; expected one of"):
        Checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("where", [".", "nested"])
def test_adapter_folder_is_refused(tmp_path: Path, where: str) -> None:
    root = write_folder(tmp_path / "m", tensors())
    folder = root / where
    write_file(folder / "adapter_model.safetensors", {"lora_A": torch.ones(2, 2)})
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a LoRA adapter"):
        Checkpoint(root)


def test_several_weight_files_without_index(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        write_file(tmp_path / name, tensors())
    with pytest.raises(CheckpointError, match=r"no index: one\.safetensors, two\.safetensors"):
        Checkpoint(tmp_path)


def test_one_weight_file_of_any_name(tmp_path: Path) -> None:
    write_file(tmp_path / "weights.safetensors", tensors())
    same(tmp_path, tensors())


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "open_clip_model"])
def test_other_stems_keep_their_name(tmp_path: Path, stem: str) -> None:
    write_file(tmp_path / f"{stem}.safetensors", tensors())
    assert same(tmp_path, tensors()).stems == {"": stem}


def test_close_while_a_tensor_is_held(tmp_path: Path) -> None:
    found = Checkpoint(write_file(tmp_path / "m.safetensors", {"w": torch.ones(5)}))
    x = found.read("w")
    found.close()
    assert_bytes_equal(x, torch.ones(5))


def test_the_file_is_never_written_through_the_map(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.safetensors", {"w": torch.ones(5)})
    before = path.read_bytes()
    file = SafetensorsFile(path)
    file.read("w").zero_()
    file.close()
    assert path.read_bytes() == before


# ---- the writer ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_written_files_load_with_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    bytes_of = torch.arange(64, dtype=torch.uint8)
    x = (bytes_of & 1).bool() if dtype == torch.bool else bytes_of.view(dtype)
    content = {"odd": torch.ones(3, dtype=torch.uint8), "x": x, "empty": x[:0], "one": x[0]}
    path = tmp_path / "m.safetensors"
    writer = _writer(path, content)
    for key in reversed(content):
        writer.write(key, content[key])
    loaded = load_file(path)
    for key, want in content.items():
        assert_bytes_equal(loaded[key], want)
    same(path, content)


def _writer(path: Path, content: dict[str, torch.Tensor]) -> SafetensorsWriter:
    return SafetensorsWriter(path, {k: Signature.of(v) for k, v in content.items()}, {})


def test_written_tensors_are_aligned(tmp_path: Path) -> None:
    content = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5).half(), "c": torch.ones(7)}
    path = tmp_path / "m.safetensors"
    _writer(path, content)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    for key, x in content.items():
        assert (8 + size + header[key]["data_offsets"][0]) % x.element_size() == 0


def test_strided_tensors_are_written_in_order(tmp_path: Path) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    writer = _writer(tmp_path / "m.safetensors", {"x": x.T})
    writer.write("x", x.T)
    assert_bytes_equal(load_file(tmp_path / "m.safetensors")["x"], x.T)


def test_writer_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(FileExistsError):
        _writer(path, {"x": torch.ones(1)})


# ---- folders ---------------------------------------------------------------------------------


def test_a_linked_subfolder_is_merged_and_carried_once(tmp_path: Path) -> None:
    """Weights and files of a link belong together; a link back to a parent ends the walk."""
    for model in "ab":
        write_file(tmp_path / model / "model.safetensors", {"w": torch.ones(2)})
        write_file(tmp_path / f"dense_{model}" / "model.safetensors", {"v": torch.ones(3)})
        (tmp_path / f"dense_{model}" / "config.json").write_text("{}")
        (tmp_path / model / "2_Dense").symlink_to(tmp_path / f"dense_{model}")
        (tmp_path / model / "loop").symlink_to(tmp_path / model)
    manifest = merge_checkpoints(
        {
            "merge_method": "linear",
            "models": [{"model": tmp_path / m} for m in "ab"],
            "parameters": {"weight": 1.0},
        },
        tmp_path / "out",
        progress=False,
    )
    assert manifest.carried == ("2_Dense/config.json",)
    assert manifest.left_out == ("loop/",)
    assert set(manifest.weights) == {"model.safetensors", "2_Dense/model.safetensors"}


def test_hidden_folders_are_no_part_of_a_model(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {"w": torch.ones(2)})
    write_file(tmp_path / ".out.k3j" / "model.safetensors", {"w": torch.ones(2)})
    found = Checkpoint(tmp_path)
    assert list(found.signatures) == ["w"]
    found.close()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_json_names_the_dtype_of_the_result(tmp_path: Path, key: str) -> None:
    for model in "ab":
        write_file(tmp_path / model / "model.safetensors", {"w": torch.ones(2)})
        (tmp_path / model / "config.json").write_text(json.dumps({key: "float32", "size": 3}))
    config = {
        "merge_method": "linear",
        "models": [{"model": tmp_path / m} for m in "ab"],
        "parameters": {"weight": 1.0},
    }
    merge_checkpoints(config, tmp_path / "same", progress=False)
    merge_checkpoints({**config, "out_dtype": "bfloat16"}, tmp_path / "bf16", progress=False)
    assert (tmp_path / "same/config.json").read_bytes() == (tmp_path / "a/config.json").read_bytes()
    assert json.loads((tmp_path / "bf16/config.json").read_text()) == {key: "bfloat16", "size": 3}


def test_thousands_of_shards_need_no_descriptor_each(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    content = {f"w{i}": torch.full((4,), float(i)) for i in range(300)}
    for model in "ab":
        write_file(tmp_path / model / "model.safetensors", content)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        merge_checkpoints(
            {
                "merge_method": "linear",
                "models": [{"model": tmp_path / m} for m in "ab"],
                "parameters": {"weight": 1.0},
            },
            tmp_path / "out",
            shard_size=16,
            progress=False,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list((tmp_path / "out").glob("model-*-of-00300.safetensors"))) == 300
