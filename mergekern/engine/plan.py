"""From names and shapes to tasks: what is read, what is done with it, where it is written."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..check import name_of
from ..errors import CheckpointError
from ..methods.compat import Signature
from ..methods.merge import common_dtype
from ..methods.slices import slices
from ..version import __version__
from .checkpoint import Checkpoint
from .config import ExceptionRule, MergeConfig
from .files import WeightFile, nbytes
from .fit import require_fit, rules_of
from .float8 import floating, widened
from .journal import digest_of
from .keys import Naming
from .parameters import arguments_of, layer_positions

FORMAT = 1  # of plans and journals: one of another number is not continued


@dataclass(frozen=True)
class Task:
    """One tensor of the result."""

    key: str
    shape: tuple[int, ...]
    sources: tuple[int, ...]  # checkpoints to read, the base first; one: it is copied
    stored: tuple[torch.dtype, ...]  # of each source
    arguments: tuple[dict[str, Any], ...] | None  # of the method, per point; None: copy
    compute: torch.dtype
    result: torch.dtype
    cut: str | None  # how it may be cut (`methods.slices`)
    slices: tuple[tuple[int, int], ...]  # ranges of elements, computed one by one
    measured: bool  # all slices must be seen before the first is merged
    element: int  # bytes in memory per element while a slice is under way
    scratch: int = 0  # and those that the method takes beside

    @property
    def extent(self) -> tuple[int, int]:
        return 0, math.prod(self.shape)

    @property
    def signature(self) -> Signature:
        return Signature(self.result, self.shape)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The elements of slices first to last - 1."""
        return self.slices[first][0], self.slices[last - 1][1]

    @property
    def bytes_read(self) -> int:
        return math.prod(self.shape) * sum(d.itemsize for d in self.stored)

    def cost(self, extent: tuple[int, int]) -> int:
        return (extent[1] - extent[0]) * self.element + self.scratch


@dataclass(frozen=True)
class Shard:
    """One output file."""

    path: str  # relative to the output folder
    names: dict[str, str]  # key -> name in the file


@dataclass(frozen=True)
class Model:
    """What the plan knows of an input, beside its files. `commit`: of one from a hub."""

    commit: str | None
    naming: Naming


@dataclass(frozen=True)
class Source:
    """What the plan knows of an input file; `layout` is the digest of its names and offsets."""

    checkpoint: int
    name: str
    size: int
    layout: str


@dataclass(frozen=True)
class Plan:
    """A merge as plain data. `points` are the subfolders of a sweep; ("",) of a single merge."""

    method: str
    host: str | None
    seed: int
    points: tuple[str, ...]
    tasks: tuple[Task, ...]
    shards: tuple[Shard, ...]
    models: tuple[Model, ...]
    sources: tuple[Source, ...]
    metadata: dict[str, str]  # of the output files
    dropped: tuple[str, ...]

    @property
    def bytes_read(self) -> int:
        """In the pass that merges; a survey reads what is merged once more per pass."""
        return sum(t.bytes_read for t in self.tasks)

    @property
    def bytes_written(self) -> int:
        return len(self.points) * sum(nbytes(t.signature) for t in self.tasks)

    @property
    def peak(self) -> int:
        """Bytes without which the plan cannot run: those of its largest slice."""
        return max((t.cost(s) for t in self.tasks for s in t.slices), default=0)

    def describe(self) -> dict[str, Any]:
        """All of it as JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(vars(self), default=_plain))
        return plain

    @functools.cached_property
    def digest(self) -> str:
        """Equal for plans that give the same bytes."""
        return digest_of(json.dumps([FORMAT, __version__, vars(self)], default=_plain))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return vars(value)
    return name_of(value) if isinstance(value, torch.dtype) else repr(value)


def make_plan(
    configs: Mapping[str, MergeConfig],
    checkpoints: Sequence[Checkpoint],
    memory: int,
    shard_size: int,
    *,
    host: str | None = None,
    seed: int = 0,
) -> Plan:
    """All tasks in the order of the first checkpoint's file; CheckpointError lists every misfit.

    configs: by point, alike but for parameters. host "mergekit": computed in the dtype of the
    configuration.
    """
    config = next(iter(configs.values()))
    rules = rules_of(config, checkpoints)
    keys = list(dict.fromkeys(key for c in checkpoints for key in c.signatures))
    positions = layer_positions(keys)
    require_fit(config, checkpoints, rules)
    asked = [arguments_of(c) for c in configs.values()]
    tasks = [
        _task(config, asked, checkpoints, key, rules.get(key), positions[key], host)
        for key in keys
        if not (key in rules and rules[key].action == "drop")
    ]
    plan = Plan(
        method=config.method.name,
        host=host,
        seed=seed,
        points=tuple(configs),
        tasks=tuple(tasks),
        shards=tuple(_shards(tasks, checkpoints, shard_size)),
        models=tuple(Model(c.commit, c.naming) for c in checkpoints),
        sources=tuple(_sources(checkpoints)),
        metadata={"format": "pt", **checkpoints[0].metadata},
        dropped=tuple(key for key, rule in rules.items() if rule.action == "drop"),
    )
    if plan.peak > memory:
        task = max(tasks, key=lambda t: max(map(t.cost, t.slices)))
        whole = "" if len(task.slices) > 1 else " and cannot be cut into slices"
        raise CheckpointError(
            f"tensor {task.key} needs {-(-plan.peak // 2**20)} MiB for its inputs"
            f"{', scratch' if task.scratch else ''} and result{whole}, more than the memory limit "
            f"of {memory / 2**20:.1f} MiB; raise it with --memory"
        )
    return plan


def _sources(checkpoints: Sequence[Checkpoint]) -> Iterator[Source]:
    for i, c in enumerate(checkpoints):
        for file in c.files:
            yield Source(i, c.name_of(file), file.opened.st_size, layout_of(file))


def layout_of(file: WeightFile) -> str:
    """The digest of names, types, shapes and places of the tensors of a file."""
    entries = [[k, name_of(d), list(s)] for k, (d, s) in file.signatures.items()]
    about = [entries, dict(file.ranges), dict(file.metadata)]
    return digest_of(json.dumps(about, sort_keys=True))


def _task(
    config: MergeConfig,  # the first of those of the points, alike but for parameters
    asked: Sequence[Callable[..., dict[str, Any]]],  # arguments, for each point
    checkpoints: Sequence[Checkpoint],
    key: str,
    rule: ExceptionRule | None,
    position: float,
    host: str | None,
) -> Task:
    method = config.method
    having = [i for i, c in enumerate(checkpoints) if key in c.signatures]
    if rule is not None and rule.action == "copy":
        having = [config.paths.index(str(rule.source))]
    signatures = [checkpoints[i].signatures[key] for i in having]
    number = floating(signatures[0].dtype)
    models = [i - config.base_apart for i in having if i >= config.base_apart]
    merged = number and not (rule is not None and rule.action == "copy") and bool(models)
    if not merged:
        having, signatures = having[:1], signatures[:1]

    stored = signatures[0].dtype
    if merged:
        stored = common_dtype([widened(s.dtype) for s in signatures])
    cast = number and (config.dtype == torch.float64 or host == "mergekit")
    compute = (config.dtype or stored) if cast else stored
    result = (config.out_dtype or config.dtype or stored) if number else stored
    given = None
    cut: str | None = "elements"
    if merged:
        method.check_count(len(models), config.base_apart)
        given = tuple(each(key, position, models) for each in asked)
        cuts = {method.cut(each, signatures[0].shape, host) for each in given}
        cut = cuts.pop() if len(cuts) == 1 else None
    shape = signatures[0].shape
    ranges = tuple(slices(shape, cut))
    element = sum(s.dtype.itemsize for s in signatures) + len(asked) * result.itemsize
    element += sum(compute.itemsize for s in signatures if s.dtype != compute)
    if host == "mergekit" and compute != result:  # which rounds twice
        element += len(asked) * compute.itemsize
    return Task(
        key=key,
        shape=tuple(shape),
        sources=tuple(having),
        stored=tuple(s.dtype for s in signatures),
        arguments=given,
        compute=compute,
        result=result,
        cut=cut,
        slices=ranges,
        measured=method.measure is not None
        and len(ranges) > 1
        and any(method.needs(each, shape, host) for each in given or ()),
        element=element,
        scratch=max((method.scratch(each, shape) for each in given or ()), default=0),
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
        size = nbytes(task.signature)
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
