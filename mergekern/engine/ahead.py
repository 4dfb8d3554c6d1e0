"""Units in memory before they are asked for, read by a thread as far as the window goes."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor

from .memory import Window
from .place import Place, Sent
from .plan import Plan
from .progress import Bar
from .reading import Loaded, Reader
from .units import Unit


class Arrived(NamedTuple):
    """A unit that is in memory."""

    unit: Unit
    loaded: list[Loaded]
    sent: list[Sent]  # the tensors of each, where they are computed
    buffers: list[Tensor]


class Ahead:
    def __init__(self, plan: Plan, reader: Reader, place: Place, limit: int, bar: Bar) -> None:
        self._plan, self._reader, self._place = plan, reader, place
        self._limit, self._bar = limit, bar
        self.bytes_read = 0

    @contextlib.contextmanager
    def units(self, units: Iterable[Unit]) -> Iterator[tuple[Iterator[Arrived], Window]]:
        """Each when it is there. Who has done a unit gives its cost back to the window.

        Any error, here or there, ends both.
        """
        under_way = Window(self._limit, pinned=self._place.pinned)
        ready: queue.SimpleQueue[Arrived | None] = queue.SimpleQueue()

        def read() -> None:
            try:
                for unit in units:
                    buffers = under_way.take(unit.cost, self._reader.sizes(unit))
                    if buffers is None:
                        return
                    loaded = self._reader.load(unit, buffers)
                    ready.put(Arrived(unit, loaded, list(map(self._send, loaded)), buffers))
                    del buffers, loaded
                    size = self.size(unit)
                    self.bytes_read += size
                    self._bar.advance(size)
            finally:
                ready.put(None)

        with ThreadPoolExecutor(1, "mergekern-read") as reader:
            reading = reader.submit(read)
            try:
                yield iter(ready.get, None), under_way
                reading.result()
            finally:
                under_way.close()

    def size(self, unit: Unit) -> int:
        """Bytes of the inputs of a unit."""
        return sum(
            (end - begin) * dtype.itemsize
            for part in unit.parts
            for task in [self._plan.tasks[part.task]]
            for begin, end in [task.span(part.first, part.last)]
            for dtype in task.stored
        )

    def _send(self, each: Loaded) -> Sent:
        """What is copied stays here."""
        merged = self._plan.tasks[each.part.task].arguments is not None
        return self._place.send(each.tensors) if merged else Sent(each.tensors)
