"""Attributes of objects of the host, replaced so that all can be put back as they were."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from ..errors import BackendError

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


@contextmanager
def within(
    installed: Sized, install: Callable[[], None], uninstall: Callable[[], None]
) -> Iterator[None]:
    """Installed inside the block, as it was before afterwards, whatever happens inside."""
    before = bool(installed)
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


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


# ---- what a checkout of a host has -------------------------------------------------------------


def host_module(host: str, name: str) -> ModuleType:
    """A module of a tool that is no package, from its checkout on sys.path."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(
            f"{host.lower()}: {name} does not import; got {error}; expected a checkout of {host}, "
            "and what it needs, on sys.path"
        ) from None


def require_parameters(host: str, owner: Any, name: str, new: Any) -> None:
    """Whether owner.name is what `new` replaces. Of a class, its `update` tells."""

    def parameters(f: Any) -> list[str]:
        return [*inspect.signature(getattr(f, "update", f)).parameters]

    theirs = getattr(owner, name, None)
    if theirs is None or parameters(theirs) != parameters(new):
        got = "nothing" if theirs is None else f"parameters {parameters(theirs)}"
        where = getattr(owner, "__name__", host)
        raise BackendError(
            f"{host.lower()}: {where}.{name} is not what this drop-in replaces; got {got}; "
            f"expected parameters {parameters(new)}"
        )
