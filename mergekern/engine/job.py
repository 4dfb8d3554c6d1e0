"""One merge, or one sweep: inputs opened and planned, run, put in place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .config import MergeConfig
from .control import Control, check_space, check_target, forget, held, writing_failed
from .folder import carry, write_card
from .journal import Entries, Journal, read_journals
from .manifest import Manifest, describe, read_manifest, write_manifest
from .output import Output
from .plan import make_plan
from .progress import Bar
from .reading import Reader
from .resume import finished, head_of, intact, require_same_inputs, require_unwritten
from .stream import Settings, Stream
from .studies import Studies


@dataclass(frozen=True)
class Options:
    """How a merge runs; of these only shard_size, seed and host change what comes out."""

    memory: int
    shard_size: int
    device: str = "cpu"
    seed: int = 0
    backend: str = "auto"
    host: str | None = None
    resume: bool = True
    statistics: Path | None = None  # where those of earlier merges lie


class Job:
    """Configurations by point (subfolder of the output), alike but for parameters, and a plan."""

    def __init__(self, configs: Mapping[str, MergeConfig], options: Options) -> None:
        self.configs, self.options = dict(configs), options
        self.config = next(iter(self.configs.values()))
        self.checkpoints: list[Checkpoint] = []
        try:
            for path, naming in zip(self.config.paths, self.config.namings, strict=True):
                self.checkpoints.append(Checkpoint(path, naming))
            self.plan = make_plan(
                self.configs,
                self.checkpoints,
                options.memory,
                options.shard_size,
                host=options.host,
                seed=options.seed,
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for checkpoint in self.checkpoints:
            checkpoint.close()

    def settings(self, bar: Bar) -> Settings:
        o = self.options
        return Settings(self.config, o.device, o.seed, o.backend, o.host, o.memory, bar)

    def run(self, target: Path, bar: Bar) -> list[Manifest]:
        """Makes the output, or finds it complete already. What it did, for each point."""
        started = time.perf_counter()
        points = self.plan.points
        abouts = [read_manifest(target / point) for point in points]
        done = [about for about in abouts if about and about.get("plan") == self.plan.digest]
        if len(done) == len(points):
            forget(target)
            return [self._outcome(target / p, d, 0, 0.0) for p, d in zip(points, done, strict=True)]
        check_target(target)
        bar.plan(
            tensors=len(self.plan.tasks),
            bytes_read=self.plan.bytes_read,
            bytes_written=self.plan.bytes_written,
        )
        with held(target) as control:
            made, read = self._make(control, self.settings(bar))
        seconds = time.perf_counter() - started
        return [
            self._outcome(target / p, about, read, seconds)
            for p, about in zip(points, made, strict=True)
        ]

    def _make(self, control: Control, settings: Settings) -> tuple[list[dict[str, Any]], int]:
        """All slices that are not there yet, the files beside them, the commit.

        An error leaves the control folder, so that another run can go on, if a slice is in it.
        """
        plan, checkpoints = self.plan, self.checkpoints
        reader = Reader(plan, checkpoints)
        head = head_of(plan, checkpoints)
        folder = self.options.statistics
        studies = Studies(folder, plan, checkpoints, self.config.method, head["stamps"])
        stream = Stream(plan, reader, settings, studies)
        begun = False
        try:
            if not self.options.resume:
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
            journal = Journal(control.folder, head)
            try:
                entries.update(stream.merge(output, journal, entries))
            finally:
                journal.close()
            studies.check({key: e.inputs for key, e in entries.items()}, control.target)
            made = self._finish(control, output, entries)
        except OSError as error:
            raise writing_failed(control.target, error) from error
        finally:
            if not begun and not read_journals(control.folder)[1]:
                control.remove()
        return made, stream.bytes_read

    def _finish(self, control: Control, output: Output, entries: Entries) -> list[dict[str, Any]]:
        """What lies beside the weights; then the output takes its name. The manifests."""
        require_unwritten(self.checkpoints, control.target)
        home = self.checkpoints[self.config.paths.index(self.config.home)]
        output.clear_rest()
        output.write_indices()
        abouts = []
        for i, (point, config) in enumerate(self.configs.items()):
            folder = control.out / point
            carried, left_out = carry(home, folder, config.out_dtype or config.dtype)
            write_card(config, folder)
            about = describe(self.plan, config, entries, i, folder, carried, left_out)
            abouts.append(about)
            write_manifest(folder, about)
        control.commit()
        control.remove()
        return abouts

    def _outcome(
        self, out: Path, about: Mapping[str, Any], bytes_read: int, seconds: float
    ) -> Manifest:
        tasks = self.plan.tasks
        merged = sum(t.arguments is not None for t in tasks)
        written = self.plan.bytes_written // len(self.plan.points)
        return Manifest(
            out=out,
            method=self.plan.method,
            merged=merged,
            copied=len(tasks) - merged,
            dropped=self.plan.dropped,
            bytes_read=bytes_read,
            bytes_written=written if seconds else 0,
            seconds=seconds,
            weights=tuple(s.path for s in self.plan.shards),
            carried=tuple(about["carried"]),
            left_out=tuple(about["left_out"]),
        )
