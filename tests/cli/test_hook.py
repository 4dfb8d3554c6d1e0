"""mergekern hook on|off|status"""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekern.cli import run
from mergekern.integrations.mergekit import hook


def test_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hook.sysconfig, "get_path", lambda _: str(tmp_path))
    said = []
    for arguments in ([], ["on"], ["on"], [], ["off"], ["off"]):
        assert run(["hook", *arguments]) == 0
        said.append(capsys.readouterr().out.splitlines()[0].removeprefix(f"{hook.path()}: "))
    assert said == ["not there", "there", "there", "there", "not there", "not there"]
    assert not list(tmp_path.iterdir())
    assert run(["hook", "sideways"]) == 2
