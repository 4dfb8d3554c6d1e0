"""merge_checkpoints: configuration -> plan -> stream, into a folder that appears when complete."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..check import parse_size
from ..errors import ArgumentError, ConfigWarning
from .checkpoint import Checkpoint
from .config import MergeConfig, load_config
from .control import Control, check_space, check_target, held, writing_failed
from .folder import carry, write_card
from .journal import Entries, Journal, read_journals
from .manifest import Manifest, describe, read_manifest, write_manifest
from .output import Output
from .parameters import idle
from .plan import Plan, make_plan
from .progress import bar
from .reading import Reader
from .resume import finished, head_of, intact, require_same_inputs
from .stream import Settings, Stream

DEFAULT_MEMORY = "4GiB"
DEFAULT_SHARD_SIZE = "5GB"


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
    resume: bool = True,
    progress: bool = True,
) -> Manifest:
    """Merges the checkpoints of a configuration (mergekit's YAML) into the folder `out`.

    Tensors are merged one by one: reading, computing and writing overlap while the bytes of the
    tensors under way stay within `memory` (beside what the process holds anyway). Names are
    preserved; a tensor that one input lacks, or has in another shape or class of dtype, is an
    error that lists all of them. Integer buffers are copied if equal. Files that are no weights
    are copied from the base model (or the first); a model card and the configuration are added.
    `out` appears, complete and synced to disk, or not at all.

    dtype in the configuration only sets the dtype of the result (out_dtype goes before it):
    inputs are never rounded, the result is, once. float64 computes in float64.
    host: reproduce that tool's selection, rounding and sign rules, as in `merge_tensors`; with
    "mergekit" the inputs are rounded to dtype first, the result to it and then to out_dtype, and
    random masks are drawn from torch's generator, seeded with `seed`.
    Warns: ConfigWarning, once, of filters that fit no tensor and gradients over no layers.

    Raises: ConfigError, CheckpointError, ArgumentError; OSError where the disk refuses.
    Source: mergekit `mergekit-yaml`, `mergekit-pytorch`.
    """
    started = time.perf_counter()
    parsed = load_config(config)
    parsed.method.check_host(host)
    target = Path(out)
    check_device(device)
    limit, largest = parse_size("memory", memory), parse_size("shard_size", shard_size)
    with contextlib.ExitStack() as stack:
        checkpoints = []
        for path in parsed.paths:
            checkpoints.append(Checkpoint(path))
            stack.callback(checkpoints[-1].close)
        plan = make_plan({"": parsed}, checkpoints, limit, largest, host=host, seed=seed)
        _warn_of_idle(parsed, plan)
        outcome = functools.partial(_outcome, target, plan, started)
        if _is_complete(target, plan):
            return outcome(read_manifest(target) or {}, 0)
        check_target(target)
        control = stack.enter_context(held(target))
        shown = stack.enter_context(bar(shown=progress))
        settings = Settings(parsed, device, seed, backend, host, limit, shown)
        about, bytes_read = _make(plan, checkpoints, control, settings, resume)
    return outcome(about, bytes_read)


def _outcome(
    target: Path, plan: Plan, started: float, about: Mapping[str, Any], bytes_read: int
) -> Manifest:
    merged = sum(t.arguments is not None for t in plan.tasks)
    return Manifest(
        out=target,
        method=plan.method,
        merged=merged,
        copied=len(plan.tasks) - merged,
        dropped=plan.dropped,
        bytes_read=bytes_read,
        bytes_written=plan.bytes_written if bytes_read else 0,
        seconds=time.perf_counter() - started,
        weights=tuple(s.path for s in plan.shards),
        carried=tuple(about["carried"]),
        left_out=tuple(about["left_out"]),
    )


def _is_complete(target: Path, plan: Plan) -> bool:
    """Whether the output is there, made by this plan."""
    found = read_manifest(target / plan.points[0])
    return found is not None and found.get("plan") == plan.digest


def _warn_of_idle(config: MergeConfig, plan: Plan) -> None:
    merged = [t.key for t in plan.tasks if t.arguments is not None]
    if without_effect := idle(config, merged):
        lines = "".join(f"\n  {what}" for what in without_effect)
        warnings.warn(f"config: without effect:{lines}", ConfigWarning, stacklevel=3)


def _make(
    plan: Plan,
    checkpoints: Sequence[Checkpoint],
    control: Control,
    settings: Settings,
    resume: bool,
) -> tuple[dict[str, Any], int]:
    """All slices that are not there yet, the files beside them, the commit.

    An error leaves the control folder, so that another run can go on, if there is a slice in it.
    """
    reader = Reader(plan, checkpoints)
    stream = Stream(plan, checkpoints, reader, settings)
    entries: Entries = {}
    begun = False
    try:
        if not resume:
            control.clear()
        entries, stamped_anew = finished(plan, checkpoints, control)
        begun = bool(entries)
        if not begun:
            control.clear()
            check_space(control.target, plan.bytes_written)
        output = Output(plan, control.out)
        if stamped_anew:
            require_same_inputs(plan, reader, entries, control.target)
        entries = intact(output, plan, entries)
        journal = Journal(control.folder, head_of(plan, checkpoints))
        try:
            made = stream.merge(output, journal, entries)
        finally:
            journal.close()
        about = _finish(plan, checkpoints, control, settings.config, output, {**entries, **made})
    except OSError as error:
        raise writing_failed(control.target, error) from error
    finally:
        if not begun and not read_journals(control.folder)[1]:
            control.remove()
    return about, stream.bytes_read


def _finish(
    plan: Plan,
    checkpoints: Sequence[Checkpoint],
    control: Control,
    config: MergeConfig,
    output: Output,
    entries: Entries,
) -> dict[str, Any]:
    """What lies beside the weights; then the output takes its name. The manifest of the first."""
    home = checkpoints[config.paths.index(config.home)]
    output.write_indices()
    first: dict[str, Any] = {}
    for i, point in enumerate(plan.points):
        folder = control.out / point
        carried, left_out = carry(home, folder, config.out_dtype or config.dtype)
        write_card(config, folder)
        files = {name: folder / name for name in carried}
        about = describe(plan, config, entries, i, files, left_out)
        write_manifest(folder, about)
        first = first or about
    control.commit()
    control.remove()
    return first


def check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ArgumentError(f"device: unknown; got {device!r}; expected cpu or cuda") from None
    if kind not in ("cpu", "cuda"):
        raise ArgumentError(f"device: not served; got {device!r}; expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device: torch sees no CUDA GPU; got {device!r}; expected cpu")
