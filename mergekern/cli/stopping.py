"""Ctrl-C and SIGTERM end a command in order: files are closed, one line says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_USUAL = (signal.SIG_DFL, signal.default_int_handler)  # any other handler is its owner's wish


class Stopped(SystemExit):
    """A signal asked the command to end. A command adds to `text` what its user should know."""

    code: int

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)  # the exit code that shells give to that end
        self.text = "interrupted" if number == signal.SIGINT else "terminated"


@contextmanager
def stoppable() -> Iterator[None]:
    """The first SIGINT or SIGTERM raises Stopped; a second one, while that is under way, kills."""
    before: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for each in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(each) in _USUAL:
                before[each] = signal.signal(each, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
