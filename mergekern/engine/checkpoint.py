"""A model on disk: one weight file, or a folder with weights, shards, subfolders and the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from ..methods.compat import Signature
from .files import WeightFile, open_file

# Preferred first. One of these, with its index if sharded, holds the weights of a folder.
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "open_clip_model")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Weights in forms that are not read: never carried along, since the merge makes them stale.
FOREIGN = (".h5", ".msgpack", ".onnx", ".gguf", ".ggml", ".tflite", ".ot", ".onnx_data", ".pb")
IGNORED_FOLDERS = ("onnx", "openvino", "coreml", "__pycache__")


class Checkpoint:
    """All tensors of a model by name; those of a subfolder are prefixed with "folder/"."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise CheckpointError(
                f"{path}: no such file or folder (models are read from disk; download it first)"
            )
        self.folder = self.path if self.path.is_dir() else None
        self.weight_files: set[Path] = set()
        self._where: dict[str, tuple[WeightFile, str]] = {}
        self.stems: dict[str, str] = {}  # subfolder prefix -> name its weight file goes by
        self.metadata: dict[str, str] = {}
        if self.folder is None:
            self._add("", self.path, None)
        else:
            for sub in folders(self.folder):
                self._add_folder(sub)
        if not self._where:
            raise CheckpointError(f"{path}: no weights found (looked for *.safetensors, *.bin)")
        self.signatures: dict[str, Signature] = {
            key: file.signatures[name] for key, (file, name) in self._where.items()
        }

    def _add_folder(self, folder: Path) -> None:
        assert self.folder is not None
        prefix = "" if folder == self.folder else f"{folder.relative_to(self.folder).as_posix()}/"
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{folder}: a LoRA adapter; merging its factors would not merge their products. "
                "Fold it into its base first"
            )
        index = _index_of(folder)
        if index is not None:
            self._add_shards(prefix, index)
            return
        for suffix in (".safetensors", ".bin"):
            files = sorted(p for p in folder.iterdir() if p.suffix == suffix and p.is_file())
            files = [p for p in files if p.name != "training_args.bin"]
            chosen = [p for stem in STEMS for p in files if p.stem == stem] or files
            if len(files) > 1 and chosen is files:
                listed = ", ".join(p.name for p in files)
                raise CheckpointError(f"{folder}: several weight files and no index: {listed}")
            if chosen:
                self._add(prefix, chosen[0], None)
                return

    def _add_shards(self, prefix: str, index: Path) -> None:
        try:
            shard_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            by_file: dict[str, list[str]] = {}
            for name, file in shard_of.items():
                if Path(file).name != file:
                    raise ValueError(f"{file!r} is no file name")
                by_file.setdefault(file, []).append(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: no readable index ({error})") from None
        self.weight_files.add(index)
        for file, names in by_file.items():
            self._add(prefix, index.parent / file, names)

    def _add(self, prefix: str, path: Path, names: list[str] | None) -> None:
        """The tensors of one file; with `names`, exactly those an index promises."""
        if path.suffix not in WEIGHTS:
            raise CheckpointError(f"{path}: no weight file; expected one of {', '.join(WEIGHTS)}")
        if not path.is_file():
            raise CheckpointError(f"{path}: the index names this shard, but it is not there")
        file = open_file(path)
        self.weight_files.add(path)
        stem = path.name.partition("-0")[0].partition(".")[0]
        self.stems[prefix] = stem if stem in STEMS and stem != "pytorch_model" else "model"
        self.metadata = self.metadata or dict(file.metadata)
        if names is not None and set(names) != set(file.signatures):
            odd = sorted(set(names) ^ set(file.signatures))
            raise CheckpointError(
                f"{path}: index and shard disagree about {len(odd)} tensors: {', '.join(odd[:5])}"
            )
        for name in file.signatures:
            self._where[prefix + name] = (file, name)

    def split(self, key: str) -> tuple[str, str]:
        """The prefix of the subfolder and the name inside its weight file."""
        name = self._where[key][1]
        return key[: len(key) - len(name)], name

    @property
    def files(self) -> list[WeightFile]:
        return list({id(f): f for f, _ in self._where.values()}.values())

    def name_of(self, file: WeightFile) -> str:
        """Its path in the model's folder."""
        return file.path.relative_to(self.folder).as_posix() if self.folder else file.path.name

    def locate(self, key: str) -> tuple[WeightFile, str]:
        """The file that holds a tensor, and its name there."""
        return self._where[key]

    def read(self, key: str) -> Tensor:
        file, name = self._where[key]
        return file.read(name)

    def close(self) -> None:
        for file in self.files:
            file.close()


def folders(root: Path) -> list[Path]:
    """The folder and all below it, links followed, but for hidden ones and other runtimes' exports.

    Hidden folders hold caches, version control and unfinished outputs.
    """
    found, seen = [], set()
    for path, below, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(path)
        below[:] = sorted(b for b in below if b not in IGNORED_FOLDERS and b[0] != ".")
        if real in seen:
            below.clear()  # a link to a folder that has been visited
            continue
        seen.add(real)
        found.append(Path(path))
    return found


def _index_of(folder: Path) -> Path | None:
    for suffix in (".safetensors", ".bin"):
        for stem in STEMS:
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                return index
        if (folder / f"model{suffix}").is_file():
            return None
    return None
