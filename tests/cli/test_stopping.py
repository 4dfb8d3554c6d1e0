"""Ctrl-C and SIGTERM: one line that says how to go on, and exit codes 130 and 143."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.calls import Run

from mergekern import cli
from mergekern.cli.stopping import Stopped, stoppable

from engine.models import linear, tensors, write_file

SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
GOES_ON = "; the same command continues where it stopped"
# A merge that says when it has reached its third tensor, and then takes for ever; with --slow-end
# the end of a stopped one takes for ever too.
SLOW = """
import dataclasses, sys, time
import mergekern.cli
from mergekern.engine import run
from mergekern.methods import REGISTRY
from mergekern.methods.registry import never

seen = []
def merge(inputs, **arguments):
    seen.append(inputs.name)
    if len(seen) == 3:
        try:
            print("ready", file=sys.stderr, flush=True)
            time.sleep(60)
        finally:
            if "--slow-end" in sys.argv:
                print("ending", file=sys.stderr, flush=True)
                time.sleep(60)
    return linear.merge(inputs, **arguments)

linear = REGISTRY["linear"]
REGISTRY["linear"] = dataclasses.replace(linear, merge=merge, joins=never)
sys.exit(mergekern.cli.run([a for a in sys.argv[1:] if a != "--slow-end"]))
"""


class Merging:
    """A merge in another process, in the middle of which it is held."""

    def __init__(self, folder: Path, *options: str) -> None:
        paths = [write_file(folder / f"{i}.safetensors", tensors(i)) for i in range(2)]
        (folder / "merge.yml").write_text(json.dumps(linear(*paths)))
        self.out = folder / "out"
        arguments = ["merge", folder / "merge.yml", self.out, "--quiet", *options]
        command = [sys.executable, "-c", SLOW, *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.wait_for("ready")

    def wait_for(self, line: str) -> None:
        assert self.process.stderr is not None
        assert self.process.stderr.readline() == f"{line}\n"

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        printed, errors = self.process.communicate(timeout=30)
        return self.process.returncode, printed, errors


@pytest.fixture
def merging(tmp_path: Path) -> Iterator[type[Merging]]:
    """Held merges, none of which outlives the test."""
    held = []

    def hold(*options: str) -> Merging:
        held.append(Merging(tmp_path, *options))
        return held[-1]

    yield hold
    for each in held:
        with contextlib.suppress(ProcessLookupError):
            each.process.kill()
        each.process.communicate()


@pytest.mark.parametrize(("number", "code", "word"), SIGNALS)
def test_a_merge_is_stopped_by_one_line(merging, number: int, code: int, word: str) -> None:
    merge = merging()
    merge.process.send_signal(number)
    ended, printed, errors = merge.end()
    assert (ended, printed) == (code, "")
    assert errors.startswith(f"mergekern: {word}, ")
    assert errors.endswith(f" MB done{GOES_ON}\n")
    assert errors.count("\n") == 1
    assert not merge.out.exists()


def test_json_tells_of_the_stop(merging) -> None:
    merge = merging("--json")
    merge.process.send_signal(signal.SIGTERM)
    code, printed, errors = merge.end()
    assert code == 143
    events = [json.loads(line) for line in printed.splitlines()]
    assert [e["event"] for e in events if e["event"] != "progress"] == ["plan", "error"]
    assert events[-1]["kind"] == "Stopped"
    assert f"mergekern: {events[-1]['message']}\n" == errors


def test_a_second_signal_kills_at_once(merging) -> None:
    merge = merging("--slow-end")
    merge.process.send_signal(signal.SIGINT)
    merge.wait_for("ending")
    merge.process.send_signal(signal.SIGINT)
    assert merge.end() == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(("number", "code", "word"), SIGNALS)
def test_any_command_is_stopped(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int, code: int, word: str
) -> None:
    """Without the words about going on, and the process has its handlers back."""
    before = [signal.getsignal(each) for each, _, _ in SIGNALS]

    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr("mergekern.cli.doctor._threads", stop)
    assert run("doctor") == (code, "", f"mergekern: {word}\n")
    assert [signal.getsignal(each) for each, _, _ in SIGNALS] == before


def test_handlers_of_others_stay() -> None:
    """A program that runs commands inside itself, or under nohup, keeps its own handling."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    with pytest.raises(Stopped) as stopped, stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143


def test_commands_run_outside_of_the_main_thread() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.run(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]
