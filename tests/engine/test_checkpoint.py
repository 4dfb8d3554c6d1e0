"""Reading models: files, folders, shards, subfolders, pickles; what is refused, by name."""

from __future__ import annotations

import json
import os
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekern import CheckpointError, merge_checkpoints
from mergekern.engine.checkpoint import Checkpoint
from mergekern.engine.files import DTYPES, SafetensorsFile, SafetensorsWriter, TorchFile
from mergekern.methods.compat import Signature

from accuracy import assert_bytes_equal
from engine.models import linear, tensors, write_file, write_folder
from refusal import refused


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
    [
        [torch.ones(2)],
        {"a": 3},
        {0: torch.ones(2)},
        torch.ones(2),
        {"a": {"b": {"c": torch.ones(2)}}},
        {"a": {"b": torch.ones(2)}, "w": torch.ones(2)},
        {"a": {"b": torch.ones(2), "c": None}},
        {"a": {}},
    ],
)
def test_pickle_of_something_else(tmp_path: Path, content: object) -> None:
    path = tmp_path / "m.bin"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert str(caught.value) == f"{path}: holds no plain mapping of names to tensors"


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module", "net"])
@pytest.mark.parametrize("old", [True, False])
def test_training_checkpoint(tmp_path: Path, key: str, old: bool) -> None:
    """The one mapping in it; not the state of its optimizer, which has tensors by name as well."""
    content = tensors()
    weights = [torch.nn.Parameter(torch.ones(3, 8))]
    optimizer = torch.optim.AdamW(weights)
    weights[0].grad = torch.ones(3, 8)
    optimizer.step()
    data = {"epoch": 3, "best": torch.tensor(0.5), "name": "m", "scheduler": {"last": 3}}
    data |= {"optimizer": optimizer.state_dict(), key: tensors()}
    torch.save(data, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
    same(tmp_path / "m.pt", content)


def test_training_checkpoint_of_several_models(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save({"model": tensors(), "optimizer": {}, "model_ema": tensors(1), "epoch": 1}, path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert str(caught.value) == (
        f"{path}: holds several mappings of names to tensors; got 'model', 'model_ema'; "
        "expected one (save the one to merge in a file of its own)"
    )


# ---- byte ranges of pickles --------------------------------------------------------------------


def test_a_pickle_is_read_by_ranges_but_for_what_is_strided(tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(4, 6)
    content = {"w": x, "tied": x, "part": x[1:3], "empty": x[:0], "one": x[2, 3], "half": x.half()}
    strided = {"turned": x.T, "columns": x[:, ::2], "repeated": x[0].expand(3, 6)}
    path = write_file(tmp_path / "m.bin", content | strided)
    file = TorchFile(path)
    assert file.ranges.keys() == content.keys()
    assert file.ranges["w"] == file.ranges["tied"]
    raw = path.read_bytes()
    for name, (begin, end) in file.ranges.items():
        assert raw[begin:end] == content[name].numpy().tobytes()
    for name, want in (content | strided).items():
        assert_bytes_equal(file.read(name), want.contiguous())
        data = bytearray(want.nbytes)
        for i in range(0, want.nbytes, 7):  # any part, also of what is held
            file.read_into(name, i, memoryview(data)[i : i + 7])
        assert bytes(data) == want.contiguous().numpy().tobytes()


def test_conjugate_tensors_are_resolved(tmp_path: Path) -> None:
    x, y = torch.randn(2, 3, dtype=torch.complex64)
    path = write_file(tmp_path / "m.bin", {"c": x.conj(), "n": y.clone().conj().imag})
    same(path, {"c": x.conj().resolve_conj(), "n": -y.imag})


def rezipped(path: Path, target: Path, compression: int, pad: bytes = b"x") -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        names = old.namelist()
        for name in [*names[:-1], names[0].replace("data.pkl", "extra"), names[-1]]:
            new.writestr(name, old.read(name) if name in names else pad)
    return target


def test_an_archive_of_another_layout_is_read_whole(tmp_path: Path) -> None:
    """torch.load works out where storages lie from the order it writes them in."""
    path = write_file(tmp_path / "m.bin", tensors())
    same(rezipped(path, tmp_path / "n.bin", zipfile.ZIP_STORED, b"abc"), tensors())


def test_an_archive_whose_storage_is_cut_short(tmp_path: Path) -> None:
    """On "meta", torch.load would make the storage as large as its tensors ask."""
    path = write_file(tmp_path / "m.bin", {"w": torch.ones(100)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "n.bin", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[: 40 if name.endswith("data/0") else None])
    with pytest.raises(CheckpointError, match="refuses it"):
        Checkpoint(tmp_path / "n.bin")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.bin", tensors())
    with pytest.raises(CheckpointError, match="is compressed"):
        Checkpoint(rezipped(path, tmp_path / "n.bin", zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("size", [2**20, 2**50])
def test_a_pickle_of_one_number_repeated(tmp_path: Path, size: int) -> None:
    path = write_file(tmp_path / "m.bin", {"w": torch.ones(1).expand(size)})
    with pytest.raises(CheckpointError, match=f"w is larger than its file; got {4 * size} bytes"):
        Checkpoint(path)


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.bin", {"w": torch.eye(3).to_sparse()})
    with pytest.raises(CheckpointError, match=str(path)):
        Checkpoint(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_that_becomes_shorter_is_named(tmp_path: Path, suffix: str) -> None:
    """A map would end the process (SIGBUS)."""
    path = write_file(tmp_path / f"m{suffix}", {"w": torch.ones(100_000)})
    found = Checkpoint(path)
    os.truncate(path, 5000)
    with pytest.raises(CheckpointError) as caught:
        found.read("w")
    assert str(caught.value) == (
        f"{path}: tensor w ends early; the file has become shorter since it was opened"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_that_is_replaced_stays_what_was_opened(tmp_path: Path, suffix: str) -> None:
    path = write_file(tmp_path / f"m{suffix}", tensors(0))
    found = Checkpoint(path)
    write_file(tmp_path / f"n{suffix}", tensors(1)).rename(path)
    for key, x in tensors(0).items():
        assert_bytes_equal(found.read(key), x)


@pytest.mark.parametrize(("begin", "size"), [(-1, 4), (0, 21), (17, 4), (40, 1)])
def test_bytes_beside_a_tensor_are_not_given(tmp_path: Path, begin: int, size: int) -> None:
    path = write_file(tmp_path / "m.safetensors", {"v": torch.ones(5), "w": torch.ones(5)})
    with refused("read_into", "not in v", "0 to 20"):
        SafetensorsFile(path).read_into("v", begin, memoryview(bytearray(size)))


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
        write_file(tmp_path / model / ".parts" / "model.safetensors", {"v": torch.ones(3)})
        (tmp_path / model / ".parts" / "config.json").write_text("{}")
        (tmp_path / model / "2_Dense").symlink_to(tmp_path / model / ".parts")
        (tmp_path / model / "loop").symlink_to(tmp_path / model)
    manifest = merge_checkpoints(
        linear(tmp_path / "a", tmp_path / "b"), tmp_path / "out", progress=False
    )
    assert manifest.carried == ("2_Dense/config.json",)
    assert manifest.left_out == (".parts/", "loop/")
    assert set(manifest.weights) == {"model.safetensors", "2_Dense/model.safetensors"}


LINKS = ["model.safetensors", "config.json", "model.safetensors.index.json", "2_Dense", "2_Dense/v"]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str, relative: bool) -> None:
    """Also to a folder that begins with the same text, and through a folder of its own."""
    root = write_folder(tmp_path / "m", tensors())
    outside = write_folder(tmp_path / "mine", tensors())
    write_file(outside / "2_Dense" / "v", {})
    (root / "2_Dense").mkdir() if "/" in name else None
    (root / name).unlink(missing_ok=True)
    target = outside / name
    (root / name).symlink_to(os.path.relpath(target, (root / name).parent) if relative else target)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(root)
    assert str(caught.value) == (
        f"{root / name}: a link that leads out of the model's folder; got {target}; "
        "expected a copy, or its own path as the model"
    )


def test_a_link_to_the_whole_disk_is_not_walked(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m", tensors())
    (root / "0").symlink_to("/")
    with pytest.raises(CheckpointError, match="m/0: a link that leads out"):
        Checkpoint(root)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>, of this repository only."""
    repository = tmp_path / "hub" / "models--org--m"
    written = write_folder(tmp_path / "written", tensors(), shards=2)
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(written.iterdir()):
        path.rename(repository / "blobs" / f"hash{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{i}")
    same(snapshot, tensors())
    (tmp_path / "by_name").symlink_to(snapshot)
    same(tmp_path / "by_name", tensors())
    other = write_folder(tmp_path / "hub" / "models--org--secret", tensors())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(other / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: a link that leads out"):
        Checkpoint(snapshot)


def test_a_path_that_the_user_gives_may_be_a_link(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m", tensors())
    (tmp_path / "folder").symlink_to(root)
    (tmp_path / "file.safetensors").symlink_to(root / "model.safetensors")
    same(tmp_path / "folder", tensors())
    same(tmp_path / "file.safetensors", tensors())


NAMES = ["../x", "a/../b", "..", "/etc/passwd", "a\\b", "a\0b", "a\nb", "\u2028", "a\x7f"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_names_of_tensors_that_would_be_paths(tmp_path: Path, name: str, suffix: str) -> None:
    """And those that would break the one line of an error."""
    path = write_file(tmp_path / f"m{suffix}", {"w": torch.ones(1), name: torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert str(caught.value) == (
        f"{path}: a tensor has a name that leads out of a folder or cannot be printed; "
        f"got {name!a}; expected such as encoder.layer.0.weight"
    )


@pytest.mark.parametrize("name", ["a/b", "..a", "a..b", "...", "ä.weight", "a b", "~", "C:", ""])
def test_names_of_tensors_that_are_only_odd(tmp_path: Path, name: str) -> None:
    content = {name: torch.ones(2)}
    path = write_file(tmp_path / "m.safetensors", content)
    merge_checkpoints(linear(path, path), tmp_path / "out", progress=False)
    assert_bytes_equal(load_file(tmp_path / "out" / "model.safetensors")[name], content[name])


def test_one_name_in_two_files(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m", {"2_Dense/w": torch.ones(2)})
    write_file(root / "2_Dense" / "model.safetensors", {"w": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"tensor 2_Dense/w is also in .*m/model"):
        Checkpoint(root)


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
