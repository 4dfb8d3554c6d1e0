"""What MERGEKERN_REQUIRE names must not be skipped for want of."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import pytest

REQUIRED = frozenset(os.environ.get("MERGEKERN_REQUIRE", "").replace(",", " ").split())


def peer(name: str, package: str) -> ModuleType:
    """The module; without it its tests skip, or fail where MERGEKERN_REQUIRE names peers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "peers" in REQUIRED:
            return importlib.import_module(name)
        reason = f"{package}: not installed (pip install 'mergekern[peers]')"
        return pytest.importorskip(name, reason=reason)
