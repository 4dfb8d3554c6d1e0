"""Other processes from start to end: how long they take, what memory, what they read and write.

Each is told by the kernel and by itself: what a parent is told of a child includes the moment
before exec, when the child still was the parent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_TELL = """
import json as _json
def _numbers(file):
    return {k: int(v.split()[0]) for k, _, v in (line.partition(":") for line in file)
            if v.split() and v.split()[0].isdigit()}
with open("/proc/self/status") as _status, open("/proc/self/io") as _io:
    print(_json.dumps([_numbers(_status)["VmHWM"] * 1024, _numbers(_io)]))
"""
IMPORT = "import mergekern.engine.run, mergekern.methods, yaml, rich.progress"
MERGE = """
import sys
from mergekern.cli import main
sys.argv.insert(1, "merge")
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
"""


class Ended(NamedTuple):
    """peak: bytes resident. read, written: by calls to the system. from_disk: not in its cache."""

    seconds: float
    peak: int = 0
    read: int = 0
    written: int = 0
    from_disk: int = 0


def command(*words: str | os.PathLike[str]) -> Ended:
    start = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr.decode()
    return Ended(seconds)


def python(code: str, *arguments: object, threads: int | None = None) -> Ended:
    """A cold Python. Its code may print, and be followed by more."""
    limit = {} if threads is None else {"MERGEKERN_THREADS": str(threads)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + _TELL, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **limit},
    )
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    peak, counted = json.loads(done.stdout.splitlines()[-1])
    return Ended(seconds, peak, counted["rchar"], counted["wchar"], counted["read_bytes"])


def cat(files: Sequence[Path]) -> Ended:
    """Reads them: GNU cat copies each block into its memory, and writes it to nowhere."""
    with open(os.devnull, "wb") as nowhere:
        start = time.perf_counter()
        subprocess.run(["cat", *files], stdout=nowhere, check=True)
        return Ended(time.perf_counter() - start)


def dd(files: Sequence[Path], folder: Path) -> Ended:
    """Copies them into the folder by `dd bs=8M conv=fsync`, one after the other."""
    folder.mkdir()
    ended = [
        command("dd", f"if={file}", f"of={folder / file.name}", "bs=8M", "conv=fsync")
        for file in files
    ]
    return Ended(sum(each.seconds for each in ended))
