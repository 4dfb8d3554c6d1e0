"""zip_checkpoints: networks on disk -> spaces -> statistics -> match -> one network in a folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import check
from ..align.discover import discover_spaces
from ..align.matching.match import METHODS, Match, match
from ..align.merging.apply import apply
from ..align.merging.partial import PartialZip
from ..align.merging.repair import has_norms, repair
from ..align.merging.split import split
from ..align.picture import draw, require_matplotlib
from ..align.spaces import Spaces
from ..align.statistics.collect import collect_statistics
from ..align.statistics.statistics import Statistics
from ..align.zip_models import REPAIRS
from ..errors import ArgumentError
from ..version import __version__
from .checkpoint import Checkpoint
from .files import SafetensorsFile
from .folder import carry, staged
from .inputs import Batches, Pixels, open_samples
from .network import Network
from .run import DEFAULT_MEMORY, check_device
from .zip_folder import describe_inputs, write_zip

PICTURE = "zip.png"
_OP = "zip"


@dataclass(frozen=True)
class Source:
    """The architecture, as `Network` takes it, and samples, as `open_samples` does.

    limit: how many samples are taken; the order is random, by `seed`.
    """

    model: str
    data: Path
    outputs: str | Sequence[str] = "fixed"
    batch_size: int = 64
    limit: int | None = None
    seed: int = 0
    pixels: Pixels = field(default_factory=Pixels)
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_device(self.device)
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError.of(_OP, f"{name} is too small", value, "at least 1")

    def batches(self, network: Network, model: nn.Module) -> Batches:
        dtype = next((x.dtype for x in model.parameters()), torch.float32)
        samples = open_samples(self.data, network.inputs, dtype, self.pixels, network.folder)
        return Batches(samples, self.batch_size, self.limit, self.seed, self.device)

    def spaces(self, model: nn.Module, batches: Batches) -> Spaces:
        return discover_spaces(model, next(iter(batches)), outputs=self.outputs)


@dataclass(frozen=True)
class Zip:
    """What is done, in the words of `zip_models`.

    statistics: a file that is read where it is there, else written: further zips of the same models
    need no pass for them.
    """

    method: str = "zip"
    until: str | None = None
    alpha: float = 0.3
    beta: float = 0.125
    mask: str | None = None
    repair: str = "auto"
    statistics: Path | None = None
    memory: int | str = DEFAULT_MEMORY

    def __post_init__(self) -> None:
        check.choice(_OP, "method", self.method, METHODS)
        check.choice(_OP, "repair", self.repair, REPAIRS)

    def reads(self, model: nn.Module, picture: bool) -> bool:
        """Whether activations are needed."""
        rescaled = self.repair == "auto" and not has_norms(model)
        return self.method != "weights" or picture or rescaled or self.statistics is not None


@dataclass(frozen=True)
class Fitted:
    """A space that moves, and how well it was matched (`Fit`), where activations were read.

    merged: whether it is in the result, or in the trunk of a partial one, rather than in the heads.
    """

    size: int
    heads: int
    merged: bool
    approximate: str | None
    before: float | None
    after: float | None
    merged_within: float | None


@dataclass(frozen=True)
class ZipManifest:
    """What a zip did. seconds: of each step. left_out: arrays, and files of the first model's
    folder, that were not used or carried along."""

    out: Path
    method: str
    until: str | None
    models: int
    samples: int
    spaces: Mapping[str, Fitted]
    seconds: Mapping[str, float]
    left_out: tuple[str, ...]


def discover(source: Source) -> Spaces:
    """The spaces of the architecture; no weights are read."""
    network = Network(source.model)
    model = network.model.to(source.device)
    return source.spaces(model, source.batches(network, model))


def zip_checkpoints(
    source: Source,
    weights: Sequence[Path],
    out: Path,
    zip: Zip,
    *,
    picture: bool = True,
    progress: bool = True,
) -> ZipManifest:
    """`zip_models` of checkpoints, into the folder `out`.

    Result: weights, labels of features, manifest and picture; beside a network that is merged whole
    the files of the first model's folder, beside a partial one nothing. `load_zip` reads either.
    `out` appears, complete and synced to disk, or not at all.
    Raises: ArgumentError, CheckpointError; OSError where the disk refuses.
    """
    if len(weights) < 2:
        raise ArgumentError.of(_OP, "there is nothing to zip", len(weights), "2 weights or more")
    if picture:
        require_matplotlib()
    clock = _Clock()
    with staged(out, 0) as staging:
        with clock.step("load"):
            network = Network(source.model)
            models = [network.load(path).to(source.device) for path in weights]
            batches = source.batches(network, models[0])
        with clock.step("trace"):
            spaces = source.spaces(models[0], batches)
            _require_moving(spaces, zip.until)
        stats = None
        if zip.reads(models[0], picture):
            with clock.step("statistics"):
                stats = _statistics(zip, models, batches, spaces, progress)
        with clock.step("match"):
            found = _match(zip, models, spaces if stats is None else stats, source.seed)
        with clock.step("merge"):
            merged = apply(models, found, until=zip.until)
        if zip.repair == "auto":
            with clock.step("repair"):
                shown = partial(_shown, batches, progress)
                repair(merged, shown, match=found, statistics=stats)
        if picture and stats is not None:
            with clock.step("picture"):
                draw(stats, found, staging / PICTURE, until=zip.until)
        with clock.step("write"):
            left_out = (*batches.samples.left_out, *_carried(weights[0], staging, merged))
            done = ZipManifest(
                out=out,
                method=zip.method,
                until=zip.until,
                models=len(models),
                samples=len(batches.rows),
                spaces=_fitted(found, merged),
                seconds=clock.seconds,
                left_out=left_out,
            )
            write_zip(staging, merged, found, _about(source, zip, weights, network, batches, done))
    return done


# ---- steps -----------------------------------------------------------------------------------


class _Clock:
    """Seconds of steps, by their names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _require_moving(spaces: Spaces, until: str | None) -> None:
    if not spaces.movable:
        expected = "at least one (a dry run says why not; outputs='free' may help)"
        raise ArgumentError.of(_OP, "no space moves", f"{len(spaces)} fixed ones", expected)
    if until is not None:
        split(_OP, spaces, until)  # refused before the passes


def _statistics(
    zip: Zip, models: list[nn.Module], batches: Batches, spaces: Spaces, progress: bool
) -> Statistics:
    path = zip.statistics
    if path is not None and path.exists():
        SafetensorsFile(path).close()  # refused here, in a sentence, where it is none
        return Statistics.load(path, spaces, models)
    stats = collect_statistics(
        models,
        batches,
        spaces,
        within=zip.method == "zip" or path is not None,
        mask=zip.mask,
        memory=zip.memory,
        progress=progress,
    )
    if path is not None:
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            stats.save(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return stats


def _match(zip: Zip, models: list[nn.Module], known: Statistics | Spaces, seed: int) -> Match:
    if zip.method == "weights":
        return match(known, "weights", models=models, seed=seed)
    return match(known, zip.method, alpha=zip.alpha, beta=zip.beta)


def _shown(batches: Batches, progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from rich.console import Console
    from rich.progress import track

    return track(batches, "repair", console=Console(stderr=True))


def _carried(first: Path, staging: Path, merged: nn.Module) -> list[str]:
    """Files of the first model go along with a whole network, which is loaded as that was."""
    if not first.is_dir() or isinstance(merged, PartialZip):
        return []
    checkpoint = Checkpoint(first)
    _, left_out = carry(checkpoint, staging, next(merged.parameters()).dtype)
    checkpoint.close()
    return left_out


# ---- manifest --------------------------------------------------------------------------------


def _fitted(found: Match, merged: nn.Module) -> dict[str, Fitted]:
    """The spaces of model order, with what the match says of them."""
    fitted, trunk = {}, None
    if isinstance(merged, PartialZip):
        aliases = found.spaces.program.architecture.aliases
        names = [n for n in merged.parts.trunk.names.values() if n in aliases]
        trunk = {alias for name in names for alias in aliases[name]}
    for name, space in found.spaces.movable.items():
        made = {p.name for p in space.places if p.role in ("produces", "both")}
        fit = found.correlations.get(name)
        numbers = [None if x is None or math.isnan(x) else x for x in fit or (None, None, None)]
        inside = trunk is None or not made.isdisjoint(trunk)
        fitted[name] = Fitted(space.size, space.heads, inside, space.approximate, *numbers)
    return fitted


def _about(
    source: Source,
    zip: Zip,
    weights: Sequence[Path],
    network: Network,
    batches: Batches,
    done: ZipManifest,
) -> dict[str, Any]:
    """What zip.json says: how the result was made and from what, and what `load_zip` needs."""
    read = [p for path in weights for p in sorted(Checkpoint(path).weight_files)]
    read += [path for path in (network.file, zip.statistics) if path is not None]
    data = hashlib.sha256("".join(map(_sha256, batches.files())).encode()).hexdigest()
    versions = {
        "mergekern": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    arguments = asdict(source) | asdict(zip) | {"weights": list(weights)}
    about = {
        "versions": versions,
        "arguments": arguments,
        "sha256": {str(path): _sha256(path) for path in read},
        "data": {"files": len(batches.files()), "sha256 of their sha256": data},
        "inputs": describe_inputs(next(iter(batches))),
        "outputs": source.outputs,
        **asdict(done),
    }
    return json.loads(json.dumps(about, default=str))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
