"""merge_checkpoints: configuration -> plan -> stream, into a folder that appears when complete."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..check import parse_size
from ..errors import ArgumentError, ConfigWarning
from .checkpoint import Checkpoint
from .config import load_config
from .folder import carry, staged, write_card
from .parameters import idle
from .plan import make_plan
from .progress import bar
from .stream import Settings, stream

DEFAULT_MEMORY = "4GiB"
DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Manifest:
    """What a merge did. `left_out` are files of the model folder that were not carried along."""

    out: Path
    method: str
    merged: int
    copied: int
    dropped: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    weights: tuple[str, ...]
    carried: tuple[str, ...]
    left_out: tuple[str, ...]


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
    only, skip: patterns of names, as the keys of the configuration: what does not fit `only`, or
    fits `skip`, is copied from the base model (or the first).
    Warns: ConfigWarning, once, of filters that fit no tensor and gradients over no layers.

    Raises: ConfigError, CheckpointError, ArgumentError; OSError where the disk refuses.
    Source: mergekit `mergekit-yaml`, `mergekit-pytorch`.
    """
    started = time.perf_counter()
    parsed = load_config(config, only=only, skip=skip)
    parsed.method.check_host(host)
    target = Path(out)
    check_device(device)
    limit, largest = parse_size("memory", memory), parse_size("shard_size", shard_size)
    with contextlib.ExitStack() as stack:
        checkpoints = []
        for path, naming in zip(parsed.paths, parsed.namings, strict=True):
            checkpoints.append(Checkpoint(path, naming))
            stack.callback(checkpoints[-1].close)
        plan = make_plan(parsed, checkpoints, limit, largest, host)
        if without_effect := idle(parsed, [t.key for t in plan.tasks if t.arguments is not None]):
            lines = "".join(f"\n  {what}" for what in without_effect)
            warnings.warn(f"config: without effect:{lines}", ConfigWarning, stacklevel=2)
        staging = stack.enter_context(staged(target, plan.bytes_written))
        home = checkpoints[parsed.paths.index(parsed.home)]
        carried, left_out = carry(home, staging, parsed.out_dtype or parsed.dtype)
        write_card(parsed, staging)
        with bar(shown=progress) as shown:
            settings = Settings(parsed, device, seed, backend, host, limit, shown)
            bytes_read = stream(plan, checkpoints, staging, settings)
    merged = sum(t.arguments is not None for t in plan.tasks)
    return Manifest(
        out=target,
        method=parsed.method.name,
        merged=merged,
        copied=len(plan.tasks) - merged,
        dropped=plan.dropped,
        bytes_read=bytes_read,
        bytes_written=plan.bytes_written,
        seconds=time.perf_counter() - started,
        weights=tuple(s.path for s in plan.shards),
        carried=tuple(carried),
        left_out=tuple(left_out),
    )


def check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ArgumentError(f"device: unknown; got {device!r}; expected cpu or cuda") from None
    if kind not in ("cpu", "cuda"):
        raise ArgumentError(f"device: not served; got {device!r}; expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device: torch sees no CUDA GPU; got {device!r}; expected cpu")
