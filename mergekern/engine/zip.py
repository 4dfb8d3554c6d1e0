"""zip_checkpoints: networks on disk -> spaces -> statistics -> match -> one network in a folder."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from .checkpoint import Checkpoint
from .control import staged
from .defaults import DEFAULT_MEMORY
from .files import SafetensorsFile
from .folder import carry
from .network import Network
from .run import check_device
from .samples import Batches, Pixels, open_samples
from .zip_folder import describe_inputs, write_zip
from .zip_manifest import ZipManifest, fitted

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
        inputs = list(inspect.signature(model.forward).parameters)
        samples = open_samples(self.data, inputs, dtype, self.pixels, network.folder)
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
        if self.statistics is not None and not self.statistics.absolute().parent.is_dir():
            folder = self.statistics.parent
            raise ArgumentError.of(_OP, "no folder for statistics", str(folder), "one that exists")

    def reads(self, model: nn.Module, picture: bool) -> bool:
        """Whether activations are needed."""
        rescaled = self.repair == "auto" and not has_norms(model)
        return self.method != "weights" or picture or rescaled or self.statistics is not None


def discover(source: Source) -> Spaces:
    """The spaces of the architecture; no weights are read."""
    network = Network(source.model)
    model = network.new().to(source.device)
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
    clock, shown = _Clock(), _Shown(picture, progress)
    with staged(out, 0) as staging:
        with clock.step("load"):
            network = Network(source.model)
            models = [network.load(path).to(source.device) for path in weights]
            batches = source.batches(network, models[0])
        with clock.step("trace"):
            spaces = source.spaces(models[0], batches)
            _require_moving(spaces, zip.until)
        stats, found, merged = _zipped(zip, source.seed, models, batches, spaces, clock, shown)
        left_out = (*batches.samples.left_out, *_carried(weights[0], staging, merged))
        if picture and stats is not None:
            with clock.step("picture"):
                draw(stats, found, staging / PICTURE, until=zip.until)
        done = ZipManifest(
            out=out,
            method=zip.method,
            until=zip.until,
            models=len(models),
            samples=len(batches.rows),
            spaces=fitted(found, merged),
            seconds=clock.seconds,
            left_out=left_out,
        )
        with clock.step("write"):
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


class _Shown(NamedTuple):
    """What is drawn, and whether bars are."""

    picture: bool
    progress: bool


def _zipped(
    zip: Zip,
    seed: int,
    models: list[nn.Module],
    batches: Batches,
    spaces: Spaces,
    clock: _Clock,
    shown: _Shown,
) -> tuple[Statistics | None, Match, nn.Module]:
    """The steps of `zip_models`, each by the clock."""
    stats = None
    if zip.reads(models[0], shown.picture):
        with clock.step("statistics"):
            stats = _statistics(zip, models, batches, spaces, shown.progress)
    with clock.step("match"):
        found = _match(zip, models, spaces if stats is None else stats, seed)
    with clock.step("merge"):
        merged = apply(models, found, until=zip.until)
    if zip.repair == "auto":
        with clock.step("repair"):
            again = partial(_barred, batches, shown.progress)
            repair(merged, again, match=found, statistics=stats)
    return stats, found, merged


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


def _barred(batches: Batches, progress: bool) -> Iterable[Any]:
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
    (staging / PICTURE).unlink(missing_ok=True)  # of an earlier zip
    return left_out


def _about(
    source: Source,
    zip: Zip,
    weights: Sequence[Path],
    network: Network,
    batches: Batches,
    done: ZipManifest,
) -> dict[str, Any]:
    """The manifest, with what `load_zip` needs to trace the model."""
    read = [p for path in weights for p in sorted(Checkpoint(path).weight_files)]
    read += [path for path in (network.file, zip.statistics) if path is not None]
    arguments = asdict(source) | asdict(zip) | {"weights": list(weights)}
    inputs = describe_inputs(next(iter(batches)))
    about = done.about(arguments, read, batches.files())
    return about | {"inputs": inputs, "outputs": source.outputs}
