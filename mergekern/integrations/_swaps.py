"""Attributes of objects of the host, replaced so that all can be put back as they were."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

ABSENT: Any = object()


class Swaps:
    """Replacements in order. As a context manager it takes them back if the block raises."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def __enter__(self) -> Swaps:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.take_back()

    def attribute(self, owner: Any, name: str, new: Any) -> Any:
        """Set owner.name, of a class or of an object, frozen or not."""
        old = vars(owner).get(name, ABSENT)
        self._undo.callback(_restore, owner, name, new, old)
        _set(owner, name, new)
        return old

    def item(self, owner: dict[str, Any], key: str, new: Any) -> None:
        """Set owner[key], which exists."""
        self._undo.callback(_restore_item, owner, key, new, owner[key])
        owner[key] = new

    def take_back(self) -> None:
        """Put everything back, last first."""
        self._undo.close()


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        setattr(owner, name, value)
    else:
        object.__setattr__(owner, name, value)


def _restore(owner: Any, name: str, new: Any, old: Any) -> None:
    if vars(owner).get(name, ABSENT) is not new:
        return  # replaced again by somebody else since: theirs stays
    if old is ABSENT:
        object.__delattr__(owner, name)
    else:
        _set(owner, name, old)


def _restore_item(owner: dict[str, Any], key: str, new: Any, old: Any) -> None:
    if owner.get(key) is new:
        owner[key] = old
