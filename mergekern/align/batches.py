"""Batches that are read once or several times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import ArgumentError

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


def passes_of(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in order, as many in each pass over the batches as fit the limit.

    >>> passes_of({"a": 2, "b": 2, "c": 3}, 4)
    [['a', 'b'], ['c']]
    """
    passes: list[list[str]] = [[]]
    left = limit
    for name, size in sizes.items():
        if size > left:
            passes.append([])
            left = limit
        passes[-1].append(name)
        left -= size
    return passes


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
