"""Batches that are read once or several times."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..errors import ArgumentError

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


def reading(op: str, batches: Batches, passes: int) -> Iterable[Any]:
    """The batches once more, of as many passes.

    Raises: ArgumentError for what can be read once only, where that is not enough.
    """
    source = batches() if callable(batches) else batches
    if iter(source) is source and not callable(batches) and passes > 1:
        what = f"batches can be read once only, and memory asks for {passes} passes"
        expected = "a list, a DataLoader or a callable that returns an iterator, or more memory"
        raise ArgumentError.of(op, what, type(source).__name__, expected)
    return source
