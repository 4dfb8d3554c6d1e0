"""Is an output still what its manifest says, are the inputs, and do these still give that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml

from ..check import name_of, parse_size
from ..errors import CheckpointError
from ..methods import REGISTRY, slices
from ..methods.compat import Signature
from .checkpoint import Checkpoint
from .config import load_config
from .files import SafetensorsFile, WeightFile, nbytes
from .files.formats import bytes_of
from .folder import CARD
from .job import Job, Options
from .journal import Entries, Entry, digest_of, joined
from .keys import Naming
from .manifest import MANIFEST, read_manifest
from .plan import FORMAT, layout_of
from .progress import Bar, bar
from .reading import Reader
from .stream import Slice, Stream


@dataclass(frozen=True)
class Verification:
    """What was compared, and all that is not as recorded, a line each."""

    out: Path
    tensors: int
    files: int
    inputs: int  # tensors of the inputs that were read again
    replayed: int  # tensors that were computed again
    problems: tuple[str, ...]
    notes: tuple[str, ...]  # what is no fault, but worth knowing


def verify(
    out: str | PathLike[str],
    *,
    inputs: bool = False,
    replay: Sequence[str] = (),
    memory: int | str = "4GiB",
    progress: bool = True,
) -> Verification:
    """Compares an output of `merge_checkpoints` with the digests in its manifest.

    Always: every tensor and every file of the output, and the sizes and names in the input files
    that are still there. inputs: every tensor that was read of them, too. replay: tensors whose
    name fits one of these patterns ("*", "*.attn.*") are merged again from the inputs, in
    `memory`, and compared.
    Result: see `Verification`; no problems means equal, as far as XXH3 of 128 bits can tell.
    Cost: reads the output; with inputs or replay, what these read.
    Raises: CheckpointError where there is no manifest, or a replay finds no inputs.

    >>> verify("nowhere")
    Traceback (most recent call last):
    mergekern.errors.CheckpointError: nowhere: holds no mergekern_manifest.json
    """
    root = Path(out)
    about = read_manifest(root)
    if about is None:
        raise CheckpointError(f"{root}: holds no {MANIFEST}")
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"{root}: {MANIFEST} has format {about.get('format')!r}; this version reads {FORMAT}"
        )
    problems: list[str] = []
    notes: list[str] = []
    with bar(shown=progress, doing="verifying") as shown:
        shown.expect(sum(nbytes(_signature(t)) for t in about["tensors"].values()))
        problems += _weights(root, about, shown)
        problems += _files(root, about, notes)
        again = _inputs(about, shown, problems, notes) if inputs else 0
        if not inputs:
            _layouts(about, problems, notes)
        replayed = _replay(about, replay, parse_size("memory", memory), shown, problems)
    return Verification(
        out=root,
        tensors=len(about["tensors"]),
        files=len(about["files"]),
        inputs=again,
        replayed=replayed,
        problems=tuple(problems),
        notes=tuple(notes),
    )


# ---- the output ------------------------------------------------------------------------------


def _signature(tensor: Mapping[str, Any]) -> Signature:
    return Signature(getattr(torch, tensor["dtype"]), tuple(tensor["shape"]))


def _weights(root: Path, about: Mapping[str, Any], shown: Bar) -> Iterator[str]:
    for path in about["weights"]:
        here = {k: t for k, t in about["tensors"].items() if t["file"] == path}
        try:
            with contextlib.closing(SafetensorsFile(root / path)) as file:
                yield from _tensors(file, path, here, about["slice"], shown)
        except CheckpointError as error:
            yield str(error)


def _tensors(
    file: WeightFile, path: str, here: Mapping[str, Any], size: int, shown: Bar
) -> Iterator[str]:
    for name in set(file.signatures) - {t["name"] for t in here.values()}:
        yield f"{path}: holds tensor {name}, which the merge did not write"
    for key, tensor in here.items():
        signature = _signature(tensor)
        if file.signatures.get(tensor["name"]) != signature:
            yield f"{path}: tensor {key} is missing, or of another shape or dtype"
        elif digest(file, tensor["name"], tensor["cut"], size) != tensor["digest"]:
            yield f"{path}: tensor {key} is not what was written"
        shown.advance(nbytes(signature))


def digest(file: WeightFile, name: str, cut: str | None, size: int) -> str:
    """The digest of a tensor as a file holds it now."""
    dtype, shape = file.signatures[name]
    found = []
    for begin, end in slices.slices(shape, cut, size):
        data = bytes_of(torch.empty((end - begin) * dtype.itemsize, dtype=torch.uint8))
        if data:
            file.read_into(name, begin * dtype.itemsize, data)
        found.append(digest_of(data))
    return joined(found)


def _files(root: Path, about: Mapping[str, Any], notes: list[str]) -> Iterator[str]:
    known = {*about["files"], *about["weights"], MANIFEST}
    for name, recorded in about["files"].items():
        path = root / name
        if not path.is_file():
            yield f"{name}: is not there any more"
        elif digest_of(path.read_bytes()) != recorded:
            if name == CARD:  # which may be edited
                notes.append(f"{name}: edited since")
            else:
                yield f"{name}: is not what was written"
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and name not in known:
            notes.append(f"{name}: not part of the merge")


# ---- the inputs ------------------------------------------------------------------------------


def _layouts(about: Mapping[str, Any], problems: list[str], notes: list[str]) -> None:
    """Sizes, names and offsets of the input files that are there."""
    for i in range(len(about["models"])):
        with _opened(about, i, problems, notes):
            pass


@contextlib.contextmanager
def _opened(
    about: Mapping[str, Any], i: int, problems: list[str], notes: list[str]
) -> Iterator[Checkpoint | None]:
    """An input, if it is there and its files are those of the merge."""
    model = about["models"][i]
    try:
        checkpoint = Checkpoint(model["path"], Naming.of(model), model["commit"])
    except CheckpointError as error:
        notes.append(f"input {error}")
        yield None
        return
    with contextlib.closing(checkpoint):
        recorded = {f["name"]: (f["size"], f["layout"]) for f in model["files"]}
        found = {checkpoint.name_of(f): (f.opened.st_size, layout_of(f)) for f in checkpoint.files}
        changed = [name for name in recorded if found.get(name) != recorded[name]]
        problems += [
            f"input {model['path']}: {name} is another file than was read" for name in changed
        ]
        yield None if changed else checkpoint


def _inputs(about: Mapping[str, Any], shown: Bar, problems: list[str], notes: list[str]) -> int:
    """Every tensor that was read of every input; how many were compared."""
    count = 0
    for i in range(len(about["models"])):
        with _opened(about, i, problems, notes) as checkpoint:
            if checkpoint is None:
                continue
            read = {k: t for k, t in about["tensors"].items() if str(i) in t["inputs"]}
            shown.expect(sum(nbytes(checkpoint.signatures[k]) for k in read))
            for key, tensor in read.items():
                file, name = checkpoint.locate(key)
                if digest(file, name, tensor["cut"], about["slice"]) != tensor["inputs"][str(i)]:
                    problems.append(f"input {file.path}: tensor {key} is not what was read")
                shown.advance(nbytes(checkpoint.signatures[key]))
                count += 1
    return count


# ---- again -----------------------------------------------------------------------------------


class _Nowhere:
    """Takes results and entries, and keeps none."""

    def write(self, point: int, results: Sequence[Slice]) -> None:
        """Digests are all that is compared."""

    def add(self, entries: Sequence[Entry]) -> None:
        """So are entries, which the stream returns."""


def _replay(
    about: Mapping[str, Any],
    patterns: Sequence[str],
    memory: int,
    shown: Bar,
    problems: list[str],
) -> int:
    keys = {k for k in about["tensors"] if any(fnmatchcase(k, p) for p in patterns)}
    unfit = [p for p in patterns if not any(fnmatchcase(k, p) for k in about["tensors"])]
    if unfit:
        raise CheckpointError(f"replay: pattern {unfit[0]!r} fits no tensor of the output")
    if not keys:
        return 0
    if about["slice"] != slices.SLICE:
        raise CheckpointError(
            f"replay: made by slices of {about['slice']} elements; this version has {slices.SLICE}"
        )
    if about["method"] not in REGISTRY:
        raise CheckpointError(
            f"replay: what {about['method']} added to the base is not in the output; "
            "make it again, as its configuration says, and compare"
        )
    config = load_config(yaml.safe_load(about["config"])).with_parameters(about["swept"])
    options = Options(memory, 1 << 62, seed=about["seed"], host=about["host"])
    commits = [model["commit"] for model in about["models"]]
    with Job({"": config}, options, commits) as job:
        plan = job.plan
        skipped: Entries = {
            (i, j): Entry(i, j, (), ())
            for i, task in enumerate(plan.tasks)
            for j in range(len(task.slices))
            if task.key not in keys
        }
        stream = Stream(plan, Reader(plan, job.checkpoints), job.settings(shown))
        made = stream.merge(_Nowhere(), _Nowhere(), skipped)
        for i, task in enumerate(plan.tasks):
            if task.key not in keys:
                continue
            digests = [made[i, j].results[0] for j in range(len(task.slices))]
            recorded = about["tensors"][task.key]
            if joined(digests) != recorded["digest"] or name_of(task.result) != recorded["dtype"]:
                problems.append(f"tensor {task.key}: merged again, it comes out differently")
    return len(keys)
