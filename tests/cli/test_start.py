"""The command line starts at once: what needs no tensor loads no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli.calls import Run

import mergekern as mk
from mergekern.cli import app

CODE = """
import sys
from mergekern.cli import run
code = run(sys.argv[1:])
print("loaded", *sys.modules, file=sys.stderr)
sys.exit(code)
"""
HEAVY = {"torch", "numpy", "scipy", "yaml", "mergekern.check", "mergekern.engine.run"}
COMMANDS = [command.name for command in app.registered_commands]


def loading(*arguments: str) -> tuple[int, set[str]]:
    """The exit code and the modules that a fresh Python holds after that command."""
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], 0),
        (["--version"], 0),
        *[([name, "--help"], 0) for name in COMMANDS],
        ([], 2),
        (["merge"], 2),
        (["merge", "a.yml", "b", "--nonsense"], 2),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_nothing_heavy_is_loaded(arguments: list[str], expected: int) -> None:
    code, modules = loading(*arguments)
    assert code == expected
    assert "mergekern.cli" in modules
    assert not HEAVY & modules


def test_every_command_is_looked_at() -> None:
    assert COMMANDS == [
        "merge",
        "zip",
        "adapters",
        "verify",
        "inspect",
        "doctor",
        "demo",
        "hook",
        "bench",
    ]


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"mergekern {mk.__version__}\n", "")


@pytest.mark.parametrize("columns", [80, 120])
def test_help_is_whole(run: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Every option in full, in its group, and the exit codes, at the width of a terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    _, printed, _ = run("merge", "--help")
    assert max(map(len, printed.splitlines())) <= columns
    assert "…" not in printed
    places = [printed.index(text) for text in ("Memory and device", "Result", "What is shown")]
    for group, options in zip(
        places,
        (
            ("--memory", "--device", "--backend"),
            ("--shard-size", "--seed", "--host", "--resume"),
            ("--dry-run", "--quiet", "--verbose", "--json"),
        ),
        strict=True,
    ):
        end = min((p for p in places if p > group), default=len(printed))
        assert all(group < printed.index(f"{option} ") < end for option in options)
    _, printed, _ = run("--help")
    said = " ".join(printed.split())
    for code in ("0 done", "1 a ", "2 an error", "130 stopped by Ctrl-C", "143 stopped by SIGTERM"):
        assert code in said
