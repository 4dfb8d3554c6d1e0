"""What of a merge is done and when it will be, shown as a bar, as plain lines or as JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

# The rate is that of the last third of the time, or of these seconds: it forgets the first reads,
# which only fill the memory, and passes that read alone, but no disk that pauses now and then.
_SHARE, _SECONDS = 1 / 3, 5.0


class Bar:
    """What is to be done and what is done, in bytes read and written. Shows nothing by itself.

    All calls may come from any thread. `expect` as much as is known before the first `advance`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, doing: str = "merging") -> None:
        self.doing = doing
        self.total = self.done = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._marks: deque[tuple[float, int]] = deque()  # (seconds, done): what the rate rests on
        self._start = self._now = 0.0
        self._shown = (0.0, 0)  # (seconds, done) when `_show` was last called

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def plan(self, **figures: int) -> None:
        """The figures of what is going to be done."""

    def expect(self, size: int) -> None:
        """So many bytes more will be read or written."""
        with self._lock:
            self.total += size
            if not self._marks:
                self._start = self._now = self._clock()
                self._marks.append((self._now, self.done))
                self._shown = (self._now, self.done)

    def advance(self, size: int) -> None:
        """So many bytes more are read or written."""
        with self._lock:
            self.done += size
            self._now = self._clock()
            window = max(_SECONDS, _SHARE * (self._now - self._start))
            if self._now - self._marks[-1][0] >= window / 100:
                self._marks.append((self._now, self.done))
            while len(self._marks) > 1 and self._marks[1][0] <= self._now - window:
                self._marks.popleft()
            if self._due(self._now - self._shown[0], self.done - self._shown[1]):
                self._shown = (self._now, self.done)
                self._show()

    @property
    def rate(self) -> float:
        """Bytes a second of late; 0 while that is unknown."""
        if not self._marks or self._now <= self._marks[0][0]:
            return 0.0
        return (self.done - self._marks[0][1]) / (self._now - self._marks[0][0])

    @property
    def left(self) -> float | None:
        """Seconds to go; None while that is unknown."""
        return (self.total - self.done) / self.rate if self.rate else None

    @property
    def share(self) -> str:
        """How much of how much.

        >>> bar = Bar()
        >>> bar.expect(4_000_000_000)
        >>> bar.advance(1_230_000_000)
        >>> bar.share
        '1.23 of 4.00 GB'
        """
        unit, name = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        return f"{self.done / unit:.2f} of {self.total / unit:.2f} {name}"

    def _due(self, seconds: float, done: int) -> bool:
        """Whether to show something so many seconds and bytes after the last time."""
        return False

    def _show(self) -> None:
        pass

    def _figures(self) -> str:
        to_go = "" if self.left is None else f", {timedelta(seconds=round(self.left))} left"
        return f"{self.share}, {self.rate / 1e9:.2f} GB/s{to_go}"


class _Terminal(Bar):
    """One bar, on a terminal."""

    _progress: Progress

    def __enter__(self) -> Bar:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn(self.doing), BarColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
        self._task = self._progress.add_task("", total=None)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        self._progress.stop()

    def _due(self, seconds: float, done: int) -> bool:
        return seconds >= 0.1

    def _show(self) -> None:
        self._progress.update(
            self._task, total=self.total, completed=self.done, description=self._figures()
        )


class _Lines(Bar):
    """A line every 10 seconds or 10 %, one a second at the most: for logs."""

    def _due(self, seconds: float, done: int) -> bool:
        return seconds >= 10 or (seconds >= 1 and 10 * done >= self.total)

    def _show(self) -> None:
        percent = 100 * self.done // max(1, self.total)
        print(f"{self.doing}: {percent} %, {self._figures()}", file=sys.stderr, flush=True)


class JsonLines(Bar):
    """Events on stdout, one JSON object a line, "event" being the first key; for programs.

    plan: figures of what will be done. progress, at most two a second: bytes_done, bytes_total,
    bytes_per_second, seconds_left (null while unknown). done: the manifest. error: kind, message.
    """

    def plan(self, **figures: int) -> None:
        self.event("plan", **figures)

    def event(self, name: str, **values: object) -> None:
        # Paths are told as text.
        print(json.dumps({"event": name, **values}, default=str), flush=True)

    def _due(self, seconds: float, done: int) -> bool:
        return seconds >= 0.5

    def _show(self) -> None:
        left = None if self.left is None else round(self.left, 1)
        self.event(
            "progress",
            bytes_done=self.done,
            bytes_total=self.total,
            bytes_per_second=round(self.rate),
            seconds_left=left,
        )


def bar(*, shown: bool | Bar, doing: str = "merging") -> Bar:
    """The bar for stderr, a terminal or not; one that shows nothing; or the one that is given."""
    if isinstance(shown, Bar):
        return shown
    if not shown:
        return Bar()
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return (_Terminal if terminal else _Lines)(doing=doing)
