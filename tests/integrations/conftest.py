"""What several files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mergekern.integrations import peft


@pytest.fixture
def peft_counters() -> Iterator[None]:
    """The PEFT drop-in with empty counters, and taken back afterwards."""
    peft.served.clear()
    peft.fallbacks.clear()
    yield
    peft.uninstall()
