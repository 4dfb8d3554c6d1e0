"""Git Re-Basin's PyTorch port, from a checkout that MERGEKERN_REBASIN points to."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

AT_HAND = "MERGEKERN_REBASIN" in os.environ


def port() -> ModuleType:
    """Its `utils.weight_matching`; skips the test where there is no checkout."""
    folder = os.environ.get("MERGEKERN_REBASIN")
    if folder is None:
        pytest.skip("Git Re-Basin: MERGEKERN_REBASIN does not point to a checkout of its port")
    path = Path(folder) / "utils" / "weight_matching.py"
    spec = importlib.util.spec_from_file_location("rebasin_weight_matching", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
