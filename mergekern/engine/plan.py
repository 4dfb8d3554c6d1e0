"""From names and shapes to tasks: what is read, what is done with it, where it is written.

Nothing here touches weights but the integer buffers, which must be equal to be copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..check import FLOATS
from ..errors import ArgumentError, CheckpointError
from ..methods.compat import Signature, agree, identical
from ..methods.merge import common_dtype
from .checkpoint import Checkpoint
from .config import ExceptionRule, MergeConfig
from .files import nbytes
from .keys import AS_STORED, misnamed, select
from .parameters import arguments, layer_positions


@dataclass(frozen=True)
class Task:
    """One tensor of the result."""

    key: str
    sources: tuple[int, ...]  # checkpoints to read, the base first; one: it is copied
    arguments: dict[str, Any] | None  # of the method; None: copy
    compute: torch.dtype
    result: Signature
    read: int  # bytes in the files
    cost: int  # bytes in memory while the task runs


@dataclass(frozen=True)
class Shard:
    """One output file."""

    path: str  # relative to the output folder
    names: dict[str, str]  # key -> name in the file


@dataclass(frozen=True)
class Plan:
    tasks: tuple[Task, ...]
    shards: tuple[Shard, ...]
    dropped: tuple[str, ...]
    bytes_read: int
    bytes_written: int


def make_plan(
    config: MergeConfig,
    checkpoints: Sequence[Checkpoint],
    memory: int,
    shard_size: int,
    host: str | None = None,
) -> Plan:
    """All tasks in the order of the first checkpoint's file; CheckpointError lists every misfit.

    host "mergekit": computed in the dtype of the configuration.
    """
    rules = _rules(config, checkpoints)
    keys = list(dict.fromkeys(key for c in checkpoints for key in c.signatures))
    positions = layer_positions(keys)
    problems = _misfits(config, checkpoints, rules)
    if problems:
        raise CheckpointError(_misnamed(config, checkpoints) or _listing(problems))
    tasks = [
        _task(config, checkpoints, key, rules.get(key), positions[key], host)
        for key in keys
        if not (key in rules and rules[key].action == "drop")
    ]
    largest = max(tasks, key=lambda task: task.cost, default=None)
    if largest is not None and largest.cost > memory:
        raise CheckpointError(
            f"tensor {largest.key} needs {-(-largest.cost // 2**20)} MiB for its inputs and "
            f"result, more than the memory limit of {memory / 2**20:.1f} MiB; "
            "raise it with --memory"
        )
    return Plan(
        tasks=tuple(tasks),
        shards=tuple(_shards(tasks, checkpoints, shard_size)),
        dropped=tuple(key for key, rule in rules.items() if rule.action == "drop"),
        bytes_read=sum(t.read for t in tasks),
        bytes_written=sum(nbytes(t.result) for t in tasks),
    )


def _misnamed(config: MergeConfig, checkpoints: Sequence[Checkpoint]) -> str | None:
    """What is wrong with the names of models for which the configuration does not say it yet."""
    names = {
        path: c.names
        for path, c, naming in zip(config.paths, checkpoints, config.namings, strict=True)
        if c is checkpoints[0] or naming == AS_STORED
    }
    return misnamed(names)


def _listing(problems: dict[str, str]) -> str:
    lines = "".join(f"\n  {key}: {what}" for key, what in problems.items())
    noun = "tensor does" if len(problems) == 1 else "tensors do"
    return (
        f"{len(problems)} {noun} not fit; say in the configuration what to do with them "
        f"(exceptions: filter, action copy, drop or present):{lines}"
    )


def _rules(config: MergeConfig, checkpoints: Sequence[Checkpoint]) -> dict[str, ExceptionRule]:
    """Tensor -> the first exception whose filter it contains; else what `only` and `skip` say.

    A tensor that is not merged is that of the home model; if that lacks it, the result does.
    """
    keys = dict.fromkeys(key for c in checkpoints for key in c.signatures)
    rules: dict[str, ExceptionRule] = {}
    for rule in config.exceptions:
        fitting = [key for key in keys if rule.filter in key]
        if not fitting:
            raise CheckpointError(f"exception {rule.filter!r} fits no tensor")
        for key in fitting:
            rules.setdefault(key, rule)
    home = checkpoints[config.paths.index(config.home)]
    chosen = select(keys, config.only, config.skip)
    for key in keys:
        if key not in chosen:
            kept = key in home.signatures
            rule = ExceptionRule(key, "copy", config.home) if kept else ExceptionRule(key, "drop")
            rules.setdefault(key, rule)
    return rules


def _misfits(
    config: MergeConfig, checkpoints: Sequence[Checkpoint], rules: dict[str, ExceptionRule]
) -> dict[str, str]:
    labels = [str(c.path) for c in checkpoints]
    if len(set(labels)) < len(labels):  # the same checkpoint may be listed twice
        labels = [f"{label} (#{i})" for i, label in enumerate(labels)]
    problems = agree(
        {
            label: {k: s for k, s in c.signatures.items() if k not in rules}
            for label, c in zip(labels, checkpoints, strict=True)
        }
    )
    for key, rule in rules.items():
        having = [i for i, c in enumerate(checkpoints) if key in c.signatures]
        if rule.action == "copy" and config.paths.index(str(rule.source)) not in having:
            problems[key] = f"missing from {rule.source}, which it is to be copied from"
        elif rule.action == "present":
            if config.base_apart and 0 not in having:
                problems[key] = f"missing from the base {labels[0]}"
            some = {labels[i]: {key: checkpoints[i].signatures[key]} for i in having}
            problems.update(agree(some))
            models = len(having) - config.base_apart
            if key not in problems and models:
                try:
                    config.method.check_count(models, config.base_apart)
                except ArgumentError as error:
                    problems[key] = str(error)
    for key in dict.fromkeys(key for c in checkpoints for key in c.signatures):
        if key not in problems and (key not in rules or rules[key].action == "present"):
            having = [i for i, c in enumerate(checkpoints) if key in c.signatures]
            problems.update(_unequal(key, checkpoints, having, labels))
    return problems


def _unequal(
    key: str, checkpoints: Sequence[Checkpoint], having: list[int], labels: list[str]
) -> dict[str, str]:
    """What is wrong with a tensor that is copied where all have the same, but they do not."""
    signature = checkpoints[having[0]].signatures[key]
    if signature.dtype in FLOATS:
        return {}
    first = checkpoints[having[0]].read(key)
    other = [labels[i] for i in having[1:] if not identical(checkpoints[i].read(key), first)]
    for i in having:
        checkpoints[i].release(key)
    if not other:
        return {}
    kind = signature.dtype_class()
    return {key: f"{kind} values differ in {', '.join(other)}; they cannot be averaged"}


def _task(
    config: MergeConfig,
    checkpoints: Sequence[Checkpoint],
    key: str,
    rule: ExceptionRule | None,
    position: float,
    host: str | None,
) -> Task:
    having = [i for i, c in enumerate(checkpoints) if key in c.signatures]
    if rule is not None and rule.action == "copy":
        having = [config.paths.index(str(rule.source))]
    signatures = [checkpoints[i].signatures[key] for i in having]
    floating = signatures[0].dtype in FLOATS
    models = [i - config.base_apart for i in having if i >= config.base_apart]
    merged = floating and not (rule is not None and rule.action == "copy") and bool(models)
    if not merged:
        having, signatures = having[:1], signatures[:1]

    stored = common_dtype([s.dtype for s in signatures])
    cast = floating and (config.dtype == torch.float64 or host == "mergekit")
    compute = (config.dtype or stored) if cast else stored
    result = (config.out_dtype or config.dtype or stored) if floating else stored
    if merged:
        config.method.check_count(len(models), config.base_apart)
    shape = signatures[0].shape
    read = sum(map(nbytes, signatures))
    converted = sum(nbytes(Signature(compute, shape)) for s in signatures if s.dtype != compute)
    if host == "mergekit" and compute != result:  # which rounds twice
        converted += nbytes(Signature(compute, shape))
    return Task(
        key=key,
        sources=tuple(having),
        arguments=arguments(config, key, position, models) if merged else None,
        compute=compute,
        result=Signature(result, shape),
        read=read,
        cost=read + nbytes(Signature(result, shape)) + converted,
    )


def _shards(
    tasks: Sequence[Task], checkpoints: Sequence[Checkpoint], shard_size: int
) -> list[Shard]:
    """Files of at most `shard_size` bytes (or one tensor), per subfolder, in task order."""
    groups: dict[str, list[dict[str, str]]] = {}
    sizes: dict[str, int] = {}
    stems: dict[str, str] = {}
    for task in tasks:
        owner = checkpoints[task.sources[0]]
        prefix, name = owner.split(task.key)
        size = nbytes(task.result)
        files = groups.setdefault(prefix, [])
        if not files or sizes[prefix] + size > shard_size:
            files.append({})
            sizes[prefix] = 0
        files[-1][task.key] = name
        sizes[prefix] += size
        stems.setdefault(prefix, owner.stems[prefix])
    shards = []
    for prefix, files in groups.items():
        for i, names in enumerate(files, start=1):
            part = f"-{i:05d}-of-{len(files):05d}" if len(files) > 1 else ""
            shards.append(Shard(f"{prefix}{stems[prefix]}{part}.safetensors", names))
    return shards
