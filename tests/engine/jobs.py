"""Jobs of several ranks: the command line in processes of their own, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import TCPStore

# A server that has torch already: a process of it starts in milliseconds, without threads.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["mergekern.cli", "torch.distributed", "mergekern.align"])


class Ended(NamedTuple):
    code: int  # negative: the signal that ended it
    out: str
    err: str


class Started:
    """The processes of a job. As torchrun does, `wait` ends the others when one has failed."""

    def __init__(self, processes: Sequence[BaseProcess], logs: Path) -> None:
        self.processes, self._logs = processes, logs

    def wait(self, *, stop_others: bool = True, timeout: float = 240) -> list[Ended]:
        end = time.monotonic() + timeout
        while any(p.is_alive() for p in self.processes):
            if stop_others and any(p.exitcode for p in self.processes):
                for p in self.processes:
                    p.terminate()
            assert time.monotonic() < end, "the job hangs"
            time.sleep(0.01)
        return [
            Ended(p.exitcode or 0, *((self._logs / f"{i}.{n}").read_text() for n in ("out", "err")))
            for i, p in enumerate(self.processes)
        ]


def environment(ranks: int, store: TCPStore) -> dict[str, str]:
    """What torchrun, which has the store, tells all ranks."""
    return {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


@contextlib.contextmanager
def started(ranks: int, act: Callable[[], int], logs: Path) -> Iterator[Started]:
    """`act` in every rank, whose result is its exit code."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    logs.mkdir(parents=True, exist_ok=True)
    processes: list[BaseProcess] = [
        _SERVER.Process(target=_rank, args=(rank, environment(ranks, store), logs, act))
        for rank in range(ranks)
    ]
    for p in processes:
        p.start()
    try:
        yield Started(processes, logs)
    finally:
        for p in processes:
            p.kill()
            p.join()


def _rank(rank: int, known: dict[str, str], logs: Path, act: Callable[[], int]) -> None:
    os.environ.update(known, RANK=str(rank), LOCAL_RANK=str(rank))
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    code = act()
    sys.stdout.flush()
    sys.exit(code)


# ---- what ranks do ---------------------------------------------------------------------------


def in_turn(acts: Sequence[Callable[[], int]]) -> int:
    """One after the other, whatever comes of each; the largest exit code."""
    return max([act() for act in acts])


def merge(*arguments: object) -> int:
    from mergekern.cli import run

    return run(["merge", *map(str, arguments)])


def sweep(config: Path, out: Path, values: dict[str, list[float]]) -> int:
    from mergekern.engine.run import merge_sweep

    merge_sweep(config, out, values, progress=False, distributed=True)
    return 0


def of_rank(acts: dict[int, Callable[[], int]], act: Callable[[], int]) -> int:
    """What is given for this rank, else `act`."""
    return acts.get(int(os.environ["RANK"]), act)()


def cut_at(size: int, act: Callable[[], int]) -> int:
    """With slices of so many elements."""
    from mergekern.methods import slices

    slices.SLICE = size
    return act()


def writing(before: Callable[[int], None], act: Callable[[], int]) -> int:
    """`before(n)` is called before the n-th slice is written."""
    from mergekern.engine import units
    from mergekern.engine.output import Output

    units._BATCH = 0  # one at a time
    real, calls = Output.write, itertools.count()

    def write(*a: Any) -> None:
        before(next(calls))
        real(*a)

    Output.write = write  # type: ignore[method-assign]
    return act()


def die_at(when: int, n: int) -> None:
    if n == when:
        os.kill(os.getpid(), signal.SIGKILL)


def fail_at(when: int, n: int) -> None:
    if n == when:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def hold(begun: Path, until: Path, n: int) -> None:
    """Says that it is here, and fails as soon as it is told to."""
    begun.touch()
    while not until.exists():
        time.sleep(0.01)
    fail_at(n, n)


def listening(seconds: float, act: Callable[[], int]) -> int:
    """Silence counts as death after so many seconds."""
    from mergekern.engine import ranks

    ranks.SILENCE = seconds
    return act()
