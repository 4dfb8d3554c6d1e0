"""Merges in a process of their own, in which the system refuses, or kills, at a chosen call.

Children are forked from a process that has imported everything and done nothing, so that a case
takes a tenth of a second and inherits no thread.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from mergekern import MergekernError, merge_checkpoints
from mergekern.engine import units
from mergekern.methods import slices

# What changes a disk: all of it that Python can ask the system for by name.
WRITES = ("write", "writev", "pwrite", "pwritev", "copy_file_range", "sendfile", "posix_fallocate")
CHANGES = (
    *WRITES,
    *("open", "opened", "fsync", "fdatasync", "sync", "truncate", "ftruncate", "rename", "replace"),
    *("renames", "unlink", "remove", "rmdir", "mkdir", "link", "symlink", "chmod", "fchmod"),
    *("utime",),
)
READS = ("read", "readv", "pread", "preadv")
TIMEOUT = 60  # seconds, of a child that hangs

Call = Callable[..., Any]
Strike = Callable[[Call, tuple[Any, ...]], None]  # the call it is made before, and its arguments


# ---- what happens at the call ----------------------------------------------------------------


def kill(real: Call, arguments: tuple[Any, ...]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tear(real: Call, arguments: tuple[Any, ...]) -> None:
    """Half of a write reaches the file, and the process dies."""
    fd, data, *rest = arguments
    if isinstance(data, list):  # of a vectored write
        real(fd, [memoryview(data[0]).cast("B")[: len(data[0]) // 2]], *rest)
    else:
        real(fd, memoryview(data).cast("B")[: len(data) // 2], *rest)
    kill(real, arguments)


def stop(real: Call, arguments: tuple[Any, ...]) -> None:
    """Sleeps until it is woken from outside."""
    os.kill(os.getpid(), signal.SIGSTOP)


def interrupt(real: Call, arguments: tuple[Any, ...]) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _refuse(number: int, real: Call, arguments: tuple[Any, ...]) -> None:
    raise OSError(number, os.strerror(number))


def refuse(number: int) -> Strike:
    return partial(_refuse, number)


def _shorten(path: Path, size: int, real: Call, arguments: tuple[Any, ...]) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def shorten(path: Path, size: int) -> Strike:
    """Another process cuts the file off."""
    return partial(_shorten, path, size)


def _overwrite(path: Path, at: int, real: Call, arguments: tuple[Any, ...]) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(1000))


def overwrite(path: Path, at: int) -> Strike:
    """Another process writes into the file."""
    return partial(_overwrite, path, at)


def _fill(path: Path, real: Call, arguments: tuple[Any, ...]) -> None:
    with path.open("ab", buffering=0) as file:
        for block in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(block))
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017


def fill(path: Path) -> Strike:
    """Another process takes all that is left of the disk."""
    return partial(_fill, path)


@dataclass(frozen=True)
class Fault:
    """`strike` before the call number `at` (from 0) of those in `calls`; `lasting`: and after."""

    strike: Strike
    at: int
    calls: tuple[str, ...] = CHANGES
    lasting: bool = False


# ---- the child -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A merge; of slices of `slice` elements, so that small tensors have many.

    batch: bytes of tensors that travel together, small for the same reason.
    """

    config: Mapping[str, Any]
    out: Path
    slice: int = 1000
    batch: int = 10_000
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def given(self, **options: Any) -> Job:
        return replace(self, options={**self.options, **options})


class Log:
    """Counts the calls of a fault, and strikes."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.names: list[str] = []
        self._count = itertools.count()

    def install(self) -> None:
        for name in set(self.fault.calls) & set(dir(os)):
            setattr(os, name, self._before(name, getattr(os, name)))
        if "opened" in self.fault.calls:
            builtins.open = io.open = self._after_opening(io.open)

    def _meet(self, name: str, real: Call, arguments: tuple[Any, ...]) -> None:
        number = next(self._count)
        self.names.append(name)
        if number == self.fault.at or (self.fault.lasting and number > self.fault.at):
            self.fault.strike(real, arguments)

    def _before(self, name: str, real: Call) -> Call:
        def call(*arguments: Any, **options: Any) -> Any:
            if name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR):
                self._meet(name, real, arguments)
            return real(*arguments, **options)

        return call

    def _after_opening(self, real: Call) -> Any:
        """A file of Python's own that is to be written, while it is still empty."""

        def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            opened = real(file, mode, *arguments, **options)
            if set(mode) & set("wax+"):
                self._meet("opened", real, (file, mode))
            return opened

        return call


def _child(job: Job, fault: Fault | None, result: Connection) -> None:
    os.environ["MERGEKERN_THREADS"] = str(job.threads)
    slices.SLICE, units._BATCH = job.slice, job.batch
    log = Log(fault or Fault(kill, -1))
    log.install()
    error = ""
    try:
        merge_checkpoints(dict(job.config), job.out, progress=False, **job.options)
    except MergekernError as refusal:
        error = str(refusal)
    except KeyboardInterrupt:
        error = "interrupted"
    result.send((error, log.names))


# ---- from outside ----------------------------------------------------------------------------


class End(NamedTuple):
    """How a child ended. code -9: killed. calls: those counted, in order; none of the killed."""

    code: int
    error: str
    calls: list[str]


class Run:
    """A child at work; as a context, one that does not outlive it, even asleep."""

    def __init__(self, job: Job, fault: Fault | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "mergekern.engine.run"])
        self._receiver, sender = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_child, args=(job, fault, sender))
        self.process.start()
        sender.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self.process.kill()

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def stopped(self) -> None:
        """Waits until it sleeps."""
        status = Path(f"/proc/{self.process.pid}/stat")
        end = time.monotonic() + TIMEOUT
        while status.read_text().rpartition(") ")[2][0] != "T":
            assert time.monotonic() < end, "the child does not come to the call"
            time.sleep(0.002)

    def end(self) -> End:
        self.process.join(TIMEOUT)
        hangs = self.process.exitcode is None
        if hangs:
            self.process.kill()
            self.process.join()
        assert not hangs, "the child hangs"
        try:
            error, calls = self._receiver.recv()
        except EOFError:
            error, calls = "", []
        code = self.process.exitcode
        assert code is not None
        self._receiver.close()
        self.process.close()
        return End(code, error, calls)


def run(job: Job, fault: Fault | None = None) -> End:
    """The whole run; what it raised beside our own errors is on stderr, and its code is 1."""
    return Run(job, fault).end()


def done(job: Job, fault: Fault | None = None) -> End:
    """A run that succeeds."""
    end = run(job, fault)
    assert (end.code, end.error) == (0, ""), end
    return end


# ---- what is on the disk ---------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, and every folder, by name."""
    return {
        path.relative_to(folder).as_posix(): b"" if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def control(out: Path) -> Path:
    """Where an unfinished run keeps its state."""
    return out.with_name(f".{out.name}.mergekern")


def same(out: Path, whole: Mapping[str, bytes]) -> None:
    """The output is what an uninterrupted run makes, and nothing is beside it."""
    got = content(out)
    differing = sorted(k for k in got.keys() | whole.keys() if got.get(k) != whole.get(k))
    assert not differing, differing
    left = list(out.parent.glob(f".{out.name}.*"))
    assert not left, left
