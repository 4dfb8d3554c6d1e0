"""merge_checkpoints and merge_sweep: configuration -> plan -> stream -> a folder, when complete."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..check import parse_size
from ..errors import ArgumentError, ConfigWarning
from .collector import paused
from .config import MergeConfig, load_config
from .defaults import DEFAULT_MEMORY, DEFAULT_SHARD_SIZE
from .job import Job, Options
from .manifest import Manifest
from .outlook import Outlook, outlook
from .parameters import idle
from .plan import Plan
from .progress import Bar, bar
from .ranks import ALONE, Ranks, joined, own_device
from .report.page import check_report
from .studies import FOLDER


def merge_checkpoints(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    memory: int | str = DEFAULT_MEMORY,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    device: str = "cpu",
    seed: int = 0,
    backend: str = "auto",
    host: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    resume: bool = True,
    statistics: str | Path | bool = True,
    report: str | None = None,
    progress: bool | Bar = True,
    distributed: bool = False,
) -> Manifest:
    """Merges the checkpoints of a configuration (mergekit's YAML) into the folder `out`.

    Tensors are cut into slices wherever the method allows: reading, computing and writing overlap
    while the bytes of the slices under way stay within `memory` (beside what the process holds
    anyway). The result does not depend on it. Names are preserved; a tensor that one input lacks,
    or has in another shape or class of dtype, is an error that lists all of them. Integer buffers
    are copied if equal. Files that are no weights are copied from the base model (or the first); a
    model card, the configuration and a manifest with checksums are added.
    `out` appears, complete and synced to disk, or not at all. A run that ended early leaves
    `.NAME.mergekern` beside it, and the same call goes on from there (resume=False begins anew);
    if `out` is complete already, by the same plan, nothing is done.

    dtype in the configuration only sets the dtype of the result (out_dtype goes before it):
    inputs are never rounded, the result is, once. float64 computes in float64.
    host: reproduce that tool's selection, rounding and sign rules, as in `merge_tensors`; with
    "mergekit" the inputs are rounded to dtype first, the result to it and then to out_dtype, and
    random masks are drawn from torch's generator, seeded with `seed`.
    statistics: where thresholds and dot products that take a pass of their own are kept for the
    next merge of these inputs, which then skips the pass: a folder, True for one beside `out`
    (".mergekern_statistics"), or False.
    report: "html" or "png" puts a page of figures into the output, of norms and cosines of the task
    vectors and of what is kept and in conflict, made of numbers taken while merging.
    progress: a bar on stderr, lines where that is no terminal; or a `Bar` of your own.
    only, skip: patterns of names, as the keys of the configuration: what does not fit `only`, or
    fits `skip`, is copied from the base model (or the first).
    distributed: every process that `torchrun` started makes this same call, merges a part of the
    slices and returns the same; `memory` is that of each. All must see the models, and `out` on one
    file system. The result does not depend on how many there are, nor need a run that goes on have
    as many. Without RANK and WORLD_SIZE in the environment there is one.
    Warns: ConfigWarning, once, of filters that fit no tensor and gradients over no layers.

    Raises: ConfigError, CheckpointError, ArgumentError; RankError where another rank fails or dies.
    Source: mergekit `mergekit-yaml`, `mergekit-pytorch`.
    """
    device = own_device(device) if distributed else device
    options = _options(memory, shard_size, device, seed, backend, host, resume)
    options = replace(options, statistics=_folder(statistics, out), report=_report(report))
    points = {"": load_config(config, only=only, skip=skip)}
    with (
        joined(distributed) as ranks,
        _job(points, options, ranks) as job,
        _bar(progress, ranks) as shown,
    ):
        return job.run(Path(out), shown, ranks)[0]


def merge_sweep(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    sweep: Mapping[str, Sequence[Any]],
    *,
    memory: int | str = DEFAULT_MEMORY,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    device: str = "cpu",
    seed: int = 0,
    backend: str = "auto",
    host: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    resume: bool = True,
    statistics: str | Path | bool = True,
    report: str | None = None,
    progress: bool | Bar = True,
    distributed: bool = False,
) -> dict[str, Manifest]:
    """Many merges from one read of the inputs: every combination of the values in `sweep`.

    sweep: parameter of the method -> its values, in place of what the configuration says of it,
    for all models. Each result goes to a folder of its own in `out`, named after its values, such
    as "density=0.2,lambda=1"; it is what `merge_checkpoints` makes with them, to the bit.
    Result: the manifest of each folder, by name. Memory: one result per combination is held of
    each slice. Otherwise as `merge_checkpoints`.
    Raises: as it does; ArgumentError for parameters that the method lacks.
    """
    device = own_device(device) if distributed else device
    options = _options(memory, shard_size, device, seed, backend, host, resume)
    options = replace(options, statistics=_folder(statistics, out), report=_report(report))
    points = swept(load_config(config, only=only, skip=skip), sweep)
    with (
        joined(distributed) as ranks,
        _job(points, options, ranks) as job,
        _bar(progress, ranks) as shown,
    ):
        return dict(zip(points, job.run(Path(out), shown, ranks), strict=True))


def plan_merge(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    memory: int | str = DEFAULT_MEMORY,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    device: str = "cpu",
    seed: int = 0,
    backend: str = "auto",
    host: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> tuple[Plan, Outlook]:
    """What `merge_checkpoints` (with sweep, `merge_sweep`) would do, and how long it would take.

    Nothing is merged or left behind; for the rates, one slice is read and computed, and a file
    without a name is written where `out` would be.
    Result: the plan, whose `describe()` is JSON, and the `Outlook`.
    Raises: as the merge would, as far as can be known before it begins.
    """
    parsed = load_config(config, only=only, skip=skip)
    points = {"": parsed} if sweep is None else swept(parsed, sweep)
    with _job(points, _options(memory, shard_size, device, seed, backend, host, True)) as job:
        return job.plan, outlook(job, Path(out))


def swept(config: MergeConfig, sweep: Mapping[str, Sequence[Any]]) -> dict[str, MergeConfig]:
    """The configuration of each combination, by the name of its folder."""
    names = [config.method.parameter(name).name for name in sweep]
    for name, values in zip(names, sweep.values(), strict=True):
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ArgumentError.of(
                "merge_sweep", f"no values of {name}", repr(values), "a list of at least one"
            )
    if not names or len(set(names)) < len(names):
        got = ", ".join(sweep) or "none"
        raise ArgumentError.of("merge_sweep", "no parameters to sweep", got, "each once")
    points = {}
    for values in itertools.product(*sweep.values()):
        chosen = dict(zip(names, values, strict=True))
        label = ",".join(f"{name}={value}" for name, value in chosen.items()).replace("/", "_")
        points[label] = config.with_parameters(chosen)
    return points


def _options(
    memory: int | str,
    shard_size: int | str,
    device: str,
    seed: int,
    backend: str,
    host: str | None,
    resume: bool,
) -> Options:
    check_device(device)
    limit, largest = parse_size("memory", memory), parse_size("shard_size", shard_size)
    return Options(limit, largest, device, seed, backend, host, resume)


def _job(points: Mapping[str, MergeConfig], options: Options, ranks: Ranks = ALONE) -> Job:
    """Opened and planned, with a warning of settings that have no effect."""
    config = next(iter(points.values()))
    config.method.check_host(options.host)
    with paused():
        job = Job(points, options)
        merged = [t.key for t in job.plan.tasks if t.arguments is not None]
        without_effect = idle(config, merged) if ranks.rank == 0 else []
    if without_effect:
        lines = "".join(f"\n  {what}" for what in without_effect)
        warnings.warn(f"config: without effect:{lines}", ConfigWarning, stacklevel=3)
    return job


def _bar(progress: bool | Bar, ranks: Ranks) -> Bar:
    """Rank 0 shows one; whoever gives one counts with it."""
    return bar(shown=progress if ranks.rank == 0 or isinstance(progress, Bar) else False)


def _folder(statistics: str | Path | bool, out: str | Path) -> Path | None:
    if isinstance(statistics, bool):
        return Path(out).absolute().parent / FOLDER if statistics else None
    return Path(statistics)


def _report(kind: str | None) -> str | None:
    if kind is None:
        return None
    name = f"report.{kind}"
    check_report(name)
    return name


def check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ArgumentError(f"device: unknown; got {device!r}; expected cpu or cuda") from None
    if kind not in ("cpu", "cuda"):
        raise ArgumentError(f"device: not served; got {device!r}; expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device: torch sees no CUDA GPU; got {device!r}; expected cpu")
