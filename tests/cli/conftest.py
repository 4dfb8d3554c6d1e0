"""The command line in this process."""

from __future__ import annotations

import pytest
from cli.calls import Run

from mergekern import cli


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.run([str(a) for a in arguments])
        return code, *capfd.readouterr()

    return call
