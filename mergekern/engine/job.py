"""One merge, or one sweep: inputs opened and planned, run, put in place."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ArgumentError
from .checkpoint import Checkpoint
from .collector import paused, spared
from .computing import Settings
from .config import MergeConfig
from .control import Control, check_space, check_target, forget, held, shared, writing_failed
from .folder import CARD, CONFIG_NAME, carry
from .journal import Entries, Entry, Journal, digest_of, read_journals
from .manifest import Manifest, describe, read_manifest, write_manifest
from .output import Output
from .plan import Plan, make_plan
from .progress import Bar
from .ranks import ALONE, Ranks
from .reading import Reader
from .report.card import card, library_of
from .report.numbers import Row, added
from .report.page import page
from .resume import finished, head_of, intact, require_same_inputs, require_unwritten
from .shares import shares
from .stream import Stream
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
    report: str | None = None  # name of the file in the output


class _Begin(NamedTuple):
    """What rank 0 tells the others before they merge."""

    word: str  # which lets them into the control folder
    head: dict[str, Any]  # of all journals
    entries: Entries  # of earlier runs
    stamped_anew: bool  # whether the inputs were written to since


class Job:
    """Configurations by point (subfolder of the output), alike but for parameters, and a plan."""

    def __init__(
        self,
        configs: Mapping[str, MergeConfig],
        options: Options,
        commits: Iterable[str | None] = (),  # of models of the hub, when they are to be the same
    ) -> None:
        self.configs, self.options = dict(configs), options
        self.config = next(iter(self.configs.values()))
        self.checkpoints: list[Checkpoint] = []
        try:
            models = zip(self.config.paths, self.config.namings, strict=True)
            for (path, naming), commit in zip(models, chain(commits, repeat(None))):
                self.checkpoints.append(Checkpoint(path, naming, commit))
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

    def settings(self, bar: Bar, ranks: Ranks = ALONE) -> Settings:
        o = self.options
        return Settings(
            self.config,
            o.device,
            o.seed,
            o.backend,
            o.host,
            o.memory,
            bar,
            ranks,
            report=o.report is not None,
        )

    def run(self, target: Path, bar: Bar, ranks: Ranks = ALONE) -> list[Manifest]:
        """Makes the output, or finds it complete already. What it did, for each point.

        All ranks call it and return the same; each merges a part.
        """
        with spared():
            return self._run(target, bar, ranks)

    def _run(self, target: Path, bar: Bar, ranks: Ranks) -> list[Manifest]:
        started = time.perf_counter()
        self._require_divisible(ranks)
        points = self.plan.points
        if (done := ranks.lead(lambda: self._complete(target))) is not None:
            return [self._outcome(target / p, d, 0, 0.0) for p, d in zip(points, done, strict=True)]
        bar.plan(
            tensors=len(self.plan.tasks),
            bytes_read=self.plan.bytes_read,
            bytes_written=self.plan.bytes_written,
        )
        ranks.show(bar)
        with contextlib.ExitStack() as stack:
            if ranks.rank == 0:
                check_target(target)
                control = stack.enter_context(held(target))
                begin = ranks.gather(self._begin(control, ranks))[0]
            else:
                begin = ranks.gather(None)[0]
                control = stack.enter_context(shared(target, begin.word))
            made, read = self._merge(control, begin, self.settings(bar, ranks))
        seconds = time.perf_counter() - started
        return [
            self._outcome(target / p, about, read, seconds)
            for p, about in zip(points, made, strict=True)
        ]

    @property
    def _draws(self) -> bool:
        """Whether what a tensor gets depends on those before it."""
        return self.options.host in self.config.method.draws

    def _require_divisible(self, ranks: Ranks) -> None:
        if ranks.size > 1 and self._draws:
            what = f"host {self.options.host!r} draws masks for one tensor after the other"
            raise ArgumentError.of(self.plan.method, what, f"{ranks.size} ranks", "one process")
        digests = ranks.gather(self.plan.digest)
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                expected = f"{digests[0]}: the same configuration, options, models and version"
                what = f"rank {rank} has another plan than rank 0"
                raise ArgumentError.of("ranks", what, digest, expected)

    def _complete(self, target: Path) -> list[dict[str, Any]] | None:
        """The manifests of an output of this plan that is there already."""
        abouts = [read_manifest(target / point) for point in self.plan.points]
        done = [about for about in abouts if about and about.get("plan") == self.plan.digest]
        report = self.options.report
        if report is not None:
            done = [about for about in done if report in about["files"]]
        if len(done) < len(abouts):
            return None
        forget(target)
        return done

    @paused()
    def _begin(self, control: Control, ranks: Ranks) -> _Begin:
        """What an earlier run has done; files of their final size for all that is not."""
        with _writing(control, keep=False):
            if not self.options.resume:
                control.clear()
            entries, stamped_anew = finished(self.plan, self.checkpoints, control)
            if self._draws:
                entries = {}
            if not entries:
                control.clear()
                check_space(control.target, self.plan.bytes_written)
            Output(self.plan, control.out)
            word = control.share() if ranks.size > 1 else ""
            return _Begin(word, head_of(self.plan, self.checkpoints), entries, stamped_anew)

    def _merge(
        self, control: Control, begin: _Begin, settings: Settings
    ) -> tuple[list[dict[str, Any]], int]:
        """All slices that are not there yet, the files beside them, the commit."""
        plan, ranks = self.plan, settings.ranks
        reader = Reader(plan, self.checkpoints)
        folder, stamps = self.options.statistics, begin.head["stamps"]
        studies = Studies(folder, plan, self.checkpoints, self.config.method, stamps)
        stream = Stream(plan, reader, settings, studies)
        # What other ranks hold on to must stay in place.
        with _writing(control, keep=ranks.size > 1):
            output = Output(plan, control.out)
            mine = dict(list(begin.entries.items())[ranks.rank :: ranks.size])
            if begin.stamped_anew:
                require_same_inputs(plan, reader, mine, control.target)
            good = intact(output, plan, mine)
            if settings.report:  # an earlier run may not have taken the numbers
                good = {k: e for k, e in good.items() if e.numbers or _is_copy(plan, e)}
            entries = _together(ranks.gather(good))
            parts = shares(plan, entries, ranks.size)
            made: Entries = {}
            if any(parts):
                theirs = (part for rank, part in enumerate(parts) if rank != ranks.rank)
                others = frozenset().union(*theirs)
                journal = Journal(control.folder, begin.head, ranks.rank)
                try:
                    made = stream.merge(output, journal, entries, others)
                finally:
                    journal.close()
            if ranks.size > 1:
                output.sync()
            entries = _together([entries, *ranks.gather(made)])
            studies.check({place: e.inputs for place, e in entries.items()}, control.target)
            read = sum(ranks.gather(stream.bytes_read))
            return ranks.lead(lambda: self._finish(control, output, entries)), read

    @paused()
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
            (folder / CONFIG_NAME).write_text(config.text, encoding="utf-8")
            if self.options.report is not None:
                self._report(folder / self.options.report, entries, i)
            about = describe(self.plan, config, entries, i, folder, carried, left_out)
            library, report = library_of(folder), self.options.report
            text = card(about, library=library, report=report, method=config.method)
            (folder / CARD).write_text(text, encoding="utf-8")
            about["files"][CARD] = digest_of(text)
            abouts.append(about)
            write_manifest(folder, about)
        control.commit()
        control.remove()
        return abouts

    def _report(self, path: Path, entries: Entries, point: int) -> None:
        rows: dict[str, Row] = {}
        for i, task in enumerate(self.plan.tasks):
            if task.arguments is not None:
                each = (entries[i, j].numbers[point] for j in range(len(task.slices)))
                rows[task.key] = functools.reduce(added, map(dict, each))
        names = [model.path for model in self.config.models]
        label = self.plan.points[point]
        title = f"{self.plan.method}, {label}" if label else self.plan.method
        page(rows, path, models=names, title=title)

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


def _together(each: Iterable[Entries]) -> Entries:
    return {place: entry for entries in each for place, entry in entries.items()}


@contextlib.contextmanager
def _writing(control: Control, *, keep: bool) -> Iterator[None]:
    """An error leaves the control folder, so that another run can go on, if a slice is in it."""
    try:
        yield
    except BaseException as error:
        if not keep and not read_journals(control.folder)[1]:
            control.remove()
        if isinstance(error, OSError):
            raise writing_failed(control.target, error) from error
        raise


def _is_copy(plan: Plan, entry: Entry) -> bool:
    return plan.tasks[entry.task].arguments is None
