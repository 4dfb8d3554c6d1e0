"""Statistics of earlier merges: what surveys and measures found, kept for the next one.

A file for each, named by the digest of all that it depends on: the input files by path, size,
layout and stamp, the tensors, the method with those parameters that matter. It holds the digest of
what was read, too; the merge reads the same again, and fails if that has changed, so a stamp that
lies cannot spoil a result.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, CheckpointError
from ..methods.found import dump, load
from ..methods.registry import Method
from ..version import __version__
from .checkpoint import Checkpoint
from .journal import digest_of, joined
from .plan import Plan

FOLDER = ".mergekern_statistics"  # beside the output
_FORMAT = 1

Digests = Mapping[tuple[int, int], Sequence[str]]  # (task, slice) -> of each source


class Studies:
    """The statistics of one plan. folder None: nothing is kept."""

    def __init__(
        self,
        folder: Path | None,
        plan: Plan,
        checkpoints: Sequence[Checkpoint],
        method: Method,
        stamps: Sequence[Any],
    ) -> None:
        self._folder, self._plan, self._method = folder, plan, method
        paths = [os.path.realpath(checkpoints[s.checkpoint].path) for s in plan.sources]
        self._inputs = [
            [path, s.name, s.size, s.layout, stamp]
            for path, s, stamp in zip(paths, plan.sources, stamps, strict=True)
        ]
        self._relied: dict[Path, tuple[Sequence[int], str]] = {}

    def recall(self, tasks: Sequence[int], point: int) -> tuple[bool, Any]:
        """Whether these tasks have been studied with the arguments of the point; what was found."""
        path = self._path(tasks, point)
        if path is None or not path.is_file():
            return False, None
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            found = load(about["found"])
        except (ValueError, KeyError, TypeError, ArgumentError):
            path.unlink()  # cut short, or by another hand
            return False, None
        self._relied[path] = tasks, about["content"]
        return True, found

    def remember(self, tasks: Sequence[int], point: int, found: Any, digests: Digests) -> None:
        path = self._path(tasks, point)
        if path is None:
            return
        about = {"content": self._content(tasks, digests), "found": dump(found)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.NamedTemporaryFile(
                "w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8", delete=False
            ) as file,
            contextlib.ExitStack() as failed,
        ):
            failed.callback(os.unlink, file.name)
            json.dump(about, file)
            file.close()
            os.replace(file.name, path)
            failed.pop_all()

    def check(self, digests: Digests, target: Path) -> None:
        """Whether the merge has read what the statistics that it recalled were taken of."""
        for path, (tasks, content) in self._relied.items():
            if self._content(tasks, digests) != content:
                path.unlink(missing_ok=True)
                raise CheckpointError(
                    f"{target}: an input has changed since the statistics in {path.parent} were "
                    "taken, though its file looks the same; they are removed, run it again with "
                    "--no-resume"
                )

    def _content(self, tasks: Sequence[int], digests: Digests) -> str:
        slices = [(t, i) for t in tasks for i in range(len(self._plan.tasks[t].slices))]
        return joined(digest_of("".join(digests[key])) for key in slices)

    def _path(self, tasks: Sequence[int], point: int) -> Path | None:
        if self._folder is None or not tasks:
            return None
        plan = self._plan
        each = []
        for t in (plan.tasks[i] for i in tasks):
            given = (t.arguments or ({},) * len(plan.points))[point]
            if self._method.studied is not None:
                given = {k: v for k, v in given.items() if k in self._method.studied}
            each.append([t.key, t.shape, t.sources, t.slices[:2], str(t.compute), repr(given)])
        who = [_FORMAT, __version__, self._method.name, plan.host, plan.seed, repr(plan.models)]
        about = [who, self._inputs, each]
        return self._folder / f"{self._method.name}-{digest_of(json.dumps(about))}.json"
