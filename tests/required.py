"""What MERGEKERN_REQUIRE names must not be skipped for want of."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType
from typing import NoReturn

import pytest

REQUIRED = frozenset(os.environ.get("MERGEKERN_REQUIRE", "").replace(",", " ").split())


def unavailable(backend: str, reason: str) -> NoReturn:
    """Ends the test for want of a backend: a skip, or a failure where it is required."""
    if backend in REQUIRED:
        pytest.fail(f"MERGEKERN_REQUIRE names {backend}, but {reason}")
    pytest.skip(reason)


def peer(name: str, package: str) -> ModuleType:
    """The module; without it its tests skip, or fail where MERGEKERN_REQUIRE names peers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "peers" in REQUIRED:
            return importlib.import_module(name)
        reason = f"{package}: not installed (pip install 'mergekern[peers]')"
        return pytest.importorskip(name, reason=reason)
