"""What an earlier run left: does it belong to this merge, and which of its slices are good."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .control import Control
from .journal import Entries, digest_of, read_journals
from .output import Output
from .plan import Plan
from .reading import Reader

_ADVICE = "run it again with --no-resume to begin anew"


def head_of(plan: Plan, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """What a journal says of the merge it belongs to."""
    stamps = [_stamp(file.opened) for c in checkpoints for file in c.files]
    sources = [list(vars(s).values()) for s in plan.sources]
    return {"plan": plan.digest, "sources": sources, "stamps": stamps}


def _stamp(status: os.stat_result) -> list[int]:
    """A file whose stamp is the same has not been written to."""
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def finished(
    plan: Plan, checkpoints: Sequence[Checkpoint], control: Control
) -> tuple[Entries, bool]:
    """Slices that an earlier run of this plan has recorded; whether its inputs have new stamps.

    Raises: CheckpointError where the control folder belongs to another merge, or an input is
    another file than it was.
    """
    heads, entries = read_journals(control.folder)
    if not entries:
        return {}, False  # nothing is lost whatever it was
    now = head_of(plan, checkpoints)
    for head in heads:
        if head["plan"] == now["plan"]:
            continue
        for then, is_now in zip(head["sources"], now["sources"], strict=False):
            if then[:2] == is_now[:2] and then != is_now:
                path = checkpoints[then[0]].path
                raise CheckpointError(
                    f"{control.target}: {_file(path, then[1])} has changed since this merge was "
                    f"begun; put it back, or {_ADVICE}"
                )
        raise CheckpointError(
            f"{control.target}: {control.folder.name} holds an unfinished merge of another "
            f"configuration; finish that, or {_ADVICE}"
        )
    return entries, any(head["stamps"] != now["stamps"] for head in heads)


def _file(path: os.PathLike[str], name: str) -> str:
    return os.path.join(path, name) if os.path.isdir(path) else str(path)


def require_unwritten(checkpoints: Sequence[Checkpoint], target: object) -> None:
    """Whether the inputs stayed as they were while they were read."""
    for checkpoint in checkpoints:
        for file in checkpoint.files:
            if file.written_to():
                raise CheckpointError(
                    f"{target}: {file.path} was written to while it was read; when that has ended, "
                    f"{_ADVICE}"
                )


def intact(output: Output, plan: Plan, entries: Entries) -> Entries:
    """Those slices whose bytes in the output have the checksum that was recorded."""
    good: Entries = {}
    for (task, index), entry in entries.items():
        digests = [digest_of(output.read(p, task, index)) for p in range(len(plan.points))]
        if digests == list(entry.results):
            good[task, index] = entry
    return good


def require_same_inputs(plan: Plan, reader: Reader, entries: Entries, target: object) -> None:
    """Whether what was read for these slices is still what the inputs hold."""
    for entry in entries.values():
        for source, digest in enumerate(entry.inputs):
            if digest_of(reader.slice_bytes(entry.task, entry.slice, source)) != digest:
                raise CheckpointError(
                    f"{target}: tensor {plan.tasks[entry.task].key} of "
                    f"{reader.file_of(entry.task, source)} has changed since this merge was begun; "
                    f"put it back, or {_ADVICE}"
                )
