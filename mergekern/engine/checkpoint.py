"""A model on disk: one weight file, or a folder with weights, shards, subfolders and the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..errors import CheckpointError
from ..methods.compat import Signature
from . import hub
from .files import WeightFile, open_file
from .keys import AS_STORED, Naming

# Preferred first. One of these, with its index if sharded, holds the weights of a folder.
STEMS = (
    "model",
    "pytorch_model",
    "diffusion_pytorch_model",
    "open_clip_model",
    "open_clip_pytorch_model",
)
# What a weight file of the result is called, after one that torch.save wrote.
RENAMED_STEMS = {"pytorch_model": "model", "open_clip_pytorch_model": "open_clip_model"}
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Weights in forms that are not read: never carried along, since the merge makes them stale.
FOREIGN = (".h5", ".msgpack", ".onnx", ".gguf", ".ggml", ".tflite", ".ot", ".onnx_data", ".pb")
IGNORED_FOLDERS = ("onnx", "openvino", "coreml", "__pycache__")
MOST_FOLDERS = 1000


class _Place(NamedTuple):
    """Where a tensor lies, and what it is called in the result."""

    file: WeightFile
    stored: str
    folder: str  # "" or "2_Dense/"
    name: str


class Checkpoint:
    """All tensors of a model by name; those of a subfolder are prefixed with "folder/".

    path: a file, a folder, or `org/name[@revision]` of the hub, where no such folder is; `commit`
    is what that was when it was downloaded. naming: of the tensors in each file.
    Files may be links as long as they stay in the model's folder, or in its repository in the
    cache of the Hugging Face hub, whose snapshots are links to its blobs.
    """

    def __init__(
        self, path: str | Path, naming: Naming = AS_STORED, commit: str | None = None
    ) -> None:
        self.path, self.commit = hub.local(str(path), commit)
        self.naming = naming
        if not os.path.exists(self.path):
            raise CheckpointError(
                f"{path}: no such file or folder (download it first, or name a model of the hub as "
                "org/name[@revision])"
            )
        self.folder = self.path if self.path.is_dir() else None
        self.weight_files: set[Path] = set()
        self._where: dict[str, _Place] = {}
        self.stems: dict[str, str] = {}  # subfolder prefix -> name its weight file goes by
        self.metadata: dict[str, str] = {}
        if self.folder is None:
            self._add("", self.path, None)
        else:
            for sub in folders(self.folder):
                _check_links(self.folder, sub)
                self._add_folder(sub)
        if not self._where:
            raise CheckpointError(f"{path}: no weights found (looked for *.safetensors, *.bin)")
        naming.check([place.stored for place in self._where.values()], path)
        self.signatures: dict[str, Signature] = {
            key: place.file.signatures[place.stored] for key, place in self._where.items()
        }

    def _add_folder(self, folder: Path) -> None:
        assert self.folder is not None
        prefix = "" if folder == self.folder else f"{folder.relative_to(self.folder).as_posix()}/"
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{folder}: a LoRA adapter; merging its factors would not merge their products. "
                "Fold it into its base first (mergekern adapters --into)"
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
                named = isinstance(file, str) and file and Path(file).name == file
                if not named or _leads_away(file):
                    raise ValueError(f"shard {file!a:.80} is no name of a file in its folder")
                by_file.setdefault(file, []).append(name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
        self.stems[prefix] = RENAMED_STEMS.get(stem, stem) if stem in STEMS else "model"
        self.metadata = self.metadata or dict(file.metadata)
        _check_names(path, file.signatures)
        if names is not None and set(names) != set(file.signatures):
            odd = sorted(set(names) ^ set(file.signatures))
            listed = ", ".join(f"{name!a}"[1:-1] for name in odd[:5])
            raise CheckpointError(
                f"{path}: index and shard disagree about {len(odd)} tensors: {listed}"
            )
        renamed = self.naming.names(file.signatures, path)
        _check_names(path, renamed.values())
        for stored, name in renamed.items():
            if prefix + name in self._where:
                other = self._where[prefix + name].file.path
                raise CheckpointError(f"{path}: tensor {prefix}{name} is also in {other}")
            self._where[prefix + name] = _Place(file, stored, prefix, name)

    @property
    def names(self) -> set[str]:
        """What the tensors are called, without the subfolder that they are in."""
        return {place.name for place in self._where.values()}

    def split(self, key: str) -> tuple[str, str]:
        """The prefix of the subfolder and the name inside its weight file."""
        return self._where[key].folder, self._where[key].name

    @property
    def files(self) -> list[WeightFile]:
        return list({id(place.file): place.file for place in self._where.values()}.values())

    def name_of(self, file: WeightFile) -> str:
        """Its path in the model's folder."""
        return file.path.relative_to(self.folder).as_posix() if self.folder else file.path.name

    def locate(self, key: str) -> tuple[WeightFile, str]:
        """The file that holds a tensor, and its name there."""
        return self._where[key].file, self._where[key].stored

    def read(self, key: str) -> Tensor:
        file, stored = self.locate(key)
        return file.read(stored)

    def close(self) -> None:
        for file in self.files:
            file.close()


def _leads_away(name: str) -> bool:
    """Whether a name, taken for a path, would leave its folder; nor may it break a line."""
    return name.startswith("/") or "\\" in name or ".." in name.split("/") or not name.isprintable()


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Names of tensors are data, yet other tools make files of them."""
    for name in names:
        if _leads_away(name):
            raise CheckpointError(
                f"{path}: a tensor has a name that leads out of a folder or cannot be printed; "
                f"got {name!a:.80}; expected such as encoder.layer.0.weight"
            )


def _check_links(root: Path, folder: Path) -> None:
    """The files of the folder that are read or carried along are in the model's folder.

    Or in its repository in the cache of the hub, `models--org--name`, whose snapshots are links to
    its blobs.
    """
    home = root.resolve()
    inside = next((p for p in home.parents if p.name.startswith("models--")), home)
    for path in sorted(folder.iterdir()):
        if not (path.is_dir() or path.suffix in FOREIGN):
            _check_link(path, inside)


def _check_link(path: Path, inside: Path) -> None:
    real = path.resolve()
    if not real.is_relative_to(inside):
        raise CheckpointError(
            f"{path}: a link that leads out of the model's folder; got {real}; "
            "expected a copy, or its own path as the model"
        )


def folders(root: Path) -> list[Path]:
    """The folder and all below it, links followed, but for hidden ones and other runtimes' exports.

    Hidden folders hold caches, version control and unfinished outputs.

    Raises: CheckpointError for a folder that cannot be read, a link to one elsewhere, which may be
    the whole disk, and for more folders than a model has.
    """

    def refuse(error: OSError) -> None:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})")

    home = root.resolve()
    found: list[Path] = []
    seen: set[str] = set()
    for path, below, _ in os.walk(root, followlinks=True, onerror=refuse):
        if len(found) == MOST_FOLDERS:
            raise CheckpointError(f"{root}: no model; got more than {MOST_FOLDERS} folders in it")
        real = os.path.realpath(path)
        _check_link(Path(path), home)
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
