"""What a merge did: in the output as JSON, with the digests to check it by, and as a value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..check import name_of
from ..methods import slices
from ..version import __version__
from .config import MergeConfig
from .journal import Entries, digest_of, joined
from .plan import FORMAT, Plan

MANIFEST = "mergekern_manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a merge did. `left_out` are files of the model folder that were not carried along.

    bytes_read is 0 where the output was complete already.
    """

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


def describe(
    plan: Plan,
    config: MergeConfig,
    entries: Entries,
    point: int,
    folder: Path,
    carried: Sequence[str],
    left_out: Sequence[str],
) -> dict[str, Any]:
    """The manifest of one output: the same for every machine, memory, number of threads.

    folder: the output, which has everything but the manifest.
    """
    shards = {shard.path for shard in plan.shards}
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    models: list[dict[str, Any]] = [
        {"path": path, "commit": m.commit, **vars(m.naming), "files": []}
        for path, m in zip(config.paths, plan.models, strict=True)
    ]
    for source in plan.sources:
        about = {"name": source.name, "size": source.size, "layout": source.layout}
        models[source.checkpoint]["files"].append(about)
    return {
        "format": FORMAT,
        "mergekern": __version__,
        "plan": plan.digest,
        "point": plan.points[point],
        "method": plan.method,
        "host": plan.host,
        "seed": plan.seed,
        "config": config.text,
        "swept": config.swept,
        "models": models,
        "slice": slices.SLICE,
        "tensors": _tensors(plan, entries, point),
        "weights": [shard.path for shard in plan.shards],
        "files": {
            name: digest_of(path.read_bytes())
            for name, path in sorted(found.items())
            if name not in shards
        },
        "carried": list(carried),
        "dropped": list(plan.dropped),
        "left_out": list(left_out),
    }


def _tensors(plan: Plan, entries: Entries, point: int) -> dict[str, Any]:
    where = {k: (s.path, name) for s in plan.shards for k, name in s.names.items()}
    found = {}
    for i, task in enumerate(plan.tasks):
        each = [entries[i, j] for j in range(len(task.slices))]
        inputs = [joined(e.inputs[k] for e in each) for k in range(len(task.sources))]
        file, name = where[task.key]
        found[task.key] = {
            "file": file,
            "name": name,
            "dtype": name_of(task.result),
            "shape": list(task.shape),
            "cut": task.cut,
            "digest": joined(e.results[point] for e in each),
            "inputs": dict(zip(map(str, task.sources), inputs, strict=True)),
            "arguments": None if task.arguments is None else task.arguments[point],
        }
    return found


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """JSON, a line for each tensor (whole lines at a time: json is slow where it indents)."""
    lines = []
    for key, value in about.items():
        if key == "tensors":
            each = ",\n".join(f"  {_json(name)}: {_json(t)}" for name, t in value.items())
            lines.append(f" {_json(key)}: {{\n{each}\n }}")
        else:
            lines.append(f" {_json(key)}: {_json(value)}")
    text = ",\n".join(lines)
    (folder / MANIFEST).write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, default=repr)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none that can be read."""
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None
