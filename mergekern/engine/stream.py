"""Read, compute and write, each in its own thread, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import queue
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from ..methods.found import dump
from ..methods.passes import Study
from .ahead import Ahead, Arrived
from .computing import Computed, Computing, Settings
from .files.formats import bytes_of
from .journal import Entries, Entry, digest_of
from .memory import window
from .place import place_of
from .plan import Plan
from .ranks import ALONE, Ranks
from .reading import Reader
from .shares import stretches
from .studies import Studies
from .units import Apart, Unit, merge_units, slice_units, visit_units

Places = Container[tuple[int, int]]  # task and index of slices
Slice = tuple[int, int, memoryview]  # task, index, bytes of the result


class Sink(Protocol):
    """Where results go."""

    def write(self, point: int, results: Sequence[Slice]) -> None: ...


class Record(Protocol):
    """Where what is done is noted."""

    def add(self, entries: Sequence[Entry]) -> None: ...


class Stream:
    """The work of one plan: `merge` it, with the passes before that its method needs."""

    def __init__(
        self, plan: Plan, reader: Reader, settings: Settings, studies: Studies | None = None
    ) -> None:
        self._plan, self._settings = plan, settings
        self._studies = studies
        self._method = settings.config.method
        self._place = place_of(settings.device)
        self._computing = Computing(plan, settings, self._place)
        self._limit = self._place.window(window(settings.memory), plan.peak)
        self._ahead = Ahead(plan, reader, self._place, self._limit, settings.bar)

    @property
    def bytes_read(self) -> int:
        return self._ahead.bytes_read

    # ---- the passes --------------------------------------------------------------------------

    def merge(
        self,
        output: Sink,
        journal: Record,
        done: Entries,
        others: Places = frozenset(),
    ) -> Entries:
        """Everything that is not done, and not what other ranks do; the entries of it."""
        tasks = self._plan.tasks
        units = self._units(done, others)
        if not units and self._settings.ranks.size == 1:  # other ranks' surveys need this one
            return {}
        left = [u for u in units if isinstance(u, Unit)]
        for apart in (u for u in units if isinstance(u, Apart)):
            left += slice_units(tasks, apart.task, self._pending(apart, done, others))
        self._settings.bar.expect(sum(map(self._moved, left)))
        found = self._surveys()
        if self._method.survey is not None:
            units = self._units(_of_the_same(found, done), others)
        made: Entries = {}
        with contextlib.ExitStack() as draws:
            if self._settings.host is not None:  # hosts draw masks from torch's own generator
                draws.enter_context(torch.random.fork_rng(devices=[]))
                torch.manual_seed(self._settings.seed)
            together: list[Unit] = []
            for unit in units:
                if isinstance(unit, Unit):
                    together.append(unit)
                    continue
                self._merge_units(together, found, output, journal, made)
                together = []
                here = self._measures(unit)
                pending = self._pending(unit, _of_the_same(here, done), others)
                slices = list(slice_units(tasks, unit.task, pending))
                self._merge_units(slices, here, output, journal, made)
            self._merge_units(together, found, output, journal, made)
        return made

    def _units(self, done: Places, others: Places) -> list[Unit | Apart]:
        tasks = self._plan.tasks
        return list(
            merge_units(tasks, self._limit, lambda i, j: (i, j) in done or (i, j) in others)
        )

    def _pending(self, apart: Apart, done: Places, others: Places) -> list[int]:
        places = [(apart.task, j) for j in range(len(self._plan.tasks[apart.task].slices))]
        return [j for _, j in (p for p in places if p not in done and p not in others)]

    def _surveys(self) -> list[Any]:
        """What the method's survey of the whole model finds, for each point.

        Each rank visits a part, and gathers what it counts with the others.
        """
        if self._method.survey is None:
            return [None] * len(self._plan.points)
        ranks = self._settings.ranks
        mine = stretches(self._plan, ranks.size)[ranks.rank]
        visited = visit_units(self._plan.tasks, lambda i, j: (i, j) in mine)
        units = [u for u in visited if isinstance(u, Unit)]
        merged = [i for i, t in enumerate(self._plan.tasks) if t.arguments is not None]
        return self._study(self._method.survey, units, merged, ranks)

    def _measures(self, apart: Apart) -> list[Any]:
        """What the method measures of one tensor, for each point."""
        assert self._method.measure is not None
        tasks = self._plan.tasks
        units = list(slice_units(tasks, apart.task, range(len(tasks[apart.task].slices))))
        return self._study(self._method.measure, units, [apart.task])

    def _study(
        self, study: Study, units: Sequence[Unit], tasks: Sequence[int], ranks: Ranks = ALONE
    ) -> list[Any]:
        """For each point what is known from an earlier merge, or what the passes find."""
        points = range(len(self._plan.points))
        known = ranks.lead(
            lambda: {p: f for p in points for there, f in [self._recall(tasks, p)] if there}
        )
        left = [p for p in points if p not in known]
        if left:
            digests: dict[tuple[int, int], tuple[str, ...]] = {}
            found = study.sweep(self._visit(units, left, digests), len(left), ranks.gather)
            for theirs in ranks.gather(dict(digests)):
                digests.update(theirs)
            for p, each in zip(left, found, strict=True):
                known[p] = each
                if self._studies is not None and ranks.rank == 0:
                    self._studies.remember(tasks, p, each, digests)
        return [known[p] for p in points]

    def _recall(self, tasks: Sequence[int], point: int) -> tuple[bool, Any]:
        return (False, None) if self._studies is None else self._studies.recall(tasks, point)

    def _visit(
        self,
        units: Sequence[Unit],
        points: Sequence[int],
        digests: dict[tuple[int, int], tuple[str, ...]],
    ) -> Callable[[Callable[..., None]], None]:
        """Calls f(inputs, i, **arguments) for the i-th of the points, of all that units hold.

        The digests of what is read come out, too.
        """

        def visit(visitor: Callable[..., None]) -> None:
            self._settings.bar.expect(sum(map(self._ahead.size, units)))
            with self._ahead.units(units) as (ready, under_way):
                for arrived in ready:
                    for each, sent in zip(arrived.loaded, arrived.sent, strict=True):
                        inputs = self._computing.inputs(each.part, self._place.receive(sent))
                        given = self._plan.tasks[each.part.task].arguments or ()
                        for i, point in enumerate(points):
                            visitor(inputs, i, **given[point])
                        for i, read in enumerate(each.digests, each.part.first):
                            digests[each.part.task, i] = read
                        sent.wait()  # its buffers will be read into again
                        del inputs
                    under_way.give(arrived.unit.cost, arrived.buffers)
                    del arrived, sent

        return visit

    def _merge_units(
        self,
        units: Sequence[Unit],
        found: Sequence[Any],
        output: Sink,
        journal: Record,
        made: Entries,
    ) -> None:
        """Reader and writer threads around the computing one; any error ends all three."""
        if not units:
            return
        of = _token(found)

        def write(arrived: Arrived, results: list[Computed]) -> None:
            with contextlib.ExitStack() as failed:
                failed.callback(under_way.close)  # else the others wait for bytes for ever
                entries = [e._replace(found=of) for e in self._write(arrived, results, output)]
                results.clear()
                journal.add(entries)
                made.update({(e.task, e.slice): e for e in entries})
                under_way.give(arrived.unit.cost, arrived.buffers)
                failed.pop_all()

        with (
            self._ahead.units(units) as (ready, under_way),
            ThreadPoolExecutor(1, "mergekern-write") as writer,
        ):
            writing: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()
            for arrived in ready:
                results = self._computing.unit(arrived, found)
                writing.put(writer.submit(write, arrived, results))
                del results, arrived
                while not writing.empty():  # raises what the writer raised
                    done = writing.get()
                    if not done.done():
                        writing.put(done)
                        break
                    done.result()
            while not writing.empty():
                writing.get().result()

    # ---- one unit ----------------------------------------------------------------------------

    def _written(self, unit: Unit) -> int:
        """Bytes of the results of a unit."""
        return len(self._plan.points) * sum(
            (end - begin) * task.result.itemsize
            for part in unit.parts
            for task in [self._plan.tasks[part.task]]
            for begin, end in [task.span(part.first, part.last)]
        )

    def _moved(self, unit: Unit) -> int:
        return self._ahead.size(unit) + self._written(unit)

    def _write(self, arrived: Arrived, computed: list[Computed], output: Sink) -> list[Entry]:
        entries = []
        pieces: list[list[Slice]] = [[] for _ in self._plan.points]
        for each, (results, rows) in zip(arrived.loaded, computed, strict=True):
            part, size = each.part, self._plan.tasks[each.part.task].result.itemsize
            data = [bytes_of(x) for x in results.wait()]
            origin = self._computing.slices(part)[0][0]
            for i, (begin, end) in enumerate(self._computing.slices(part)):
                here = [x[(begin - origin) * size : (end - origin) * size] for x in data]
                for point, result in enumerate(here):
                    pieces[point].append((part.task, part.first + i, result))
                digests = tuple(map(digest_of, here))
                numbers = [row[i] for row in rows]
                entries.append(
                    Entry(part.task, part.first + i, digests, each.digests[i], numbers=numbers)
                )
        for point, made in enumerate(pieces):
            output.write(point, made)
        self._settings.bar.advance(self._written(arrived.unit))
        return entries


def _token(found: Sequence[Any]) -> str:
    """What results that depend on it are recorded with; empty if nothing was found."""
    known = any(each is not None for each in found)
    return digest_of(json.dumps([dump(each) for each in found])) if known else ""


def _of_the_same(found: Sequence[Any], done: Entries) -> Entries:
    """What is done on the same findings. They differ where an input has changed meanwhile."""
    of = _token(found)
    return {key: entry for key, entry in done.items() if entry.found == of}
