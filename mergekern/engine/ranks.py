"""The processes that make one output together, as `torchrun` starts them.

What they tell each other is small (finished slices, counts of a survey) and lies in main memory, so
it goes by gloo, whatever the device that merges. Before each exchange they meet at the job's store,
where every process leaves a sign of life each second: a slow one is waited for, a dead one is not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ArgumentError, RankError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

    from .progress import Bar

SILENCE = 30.0  # seconds without a sign after which a process counts as dead
_EVERY = 1.0
_JOIN = timedelta(seconds=300)  # for all processes to start, and for one exchange
_joins = itertools.count()  # keys of a job that is joined twice differ

T = TypeVar("T")


class Ranks:
    """One process by itself."""

    rank = 0
    size = 1

    def gather(self, mine: Any) -> list[Any]:
        """What each process gives, in the order of ranks. All of them call it."""
        return [mine]

    def lead(self, act: Callable[[], T]) -> T:
        """What `act` returns in rank 0, which alone calls it, in all of them."""
        return self.gather(act() if self.rank == 0 else None)[0]

    def show(self, bar: Bar) -> None:
        """From now on rank 0's bar is that of all ranks."""


ALONE = Ranks()


class _Joined(Ranks):
    def __init__(self, store: Store, group: ProcessGroup | None, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store, self._group = store, group
        self._meetings = itertools.count()
        self._heard: dict[int, tuple[bytes, float]] = {}  # last sign of each rank, and when it came
        self._bar: Bar | None = None
        self._known = (0, 0)  # bytes of the other ranks that the bar counts

    def gather(self, mine: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        try:
            self._meet()
            dist.all_gather_object(found, mine, group=self._group)
        except RuntimeError as error:  # the store, or a process, went while it was spoken to
            if isinstance(error, RankError):
                raise
            raise RankError(
                f"the other ranks cannot be reached any more ({_line(error)})"
            ) from None
        return found

    def _meet(self) -> None:
        """Waits until all are here, as long as those that are not are alive."""
        meeting = next(self._meetings)
        self._store.set(f"met/{meeting}/{self.rank}", "")
        missing, pause = [r for r in range(self.size) if r != self.rank], 1e-3
        while missing := [r for r in missing if not self._store.check([f"met/{meeting}/{r}"])]:
            for rank in missing:
                self._listen(rank)
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    def _listen(self, rank: int) -> None:
        if self._store.check([f"failed/{rank}"]):
            raise RankError(f"rank {rank} has failed, and this one stops: its own line says why")
        sign, now = self._store.get(f"alive/{rank}"), time.monotonic()
        last, when = self._heard.get(rank, (b"", now))
        if sign != last:
            self._heard[rank] = sign, now
        elif now - when > SILENCE:
            raise RankError(f"rank {rank} has given no sign of life for {SILENCE:.0f} s")

    def show(self, bar: Bar) -> None:
        self._bar = bar

    def pulse(self, done: threading.Event) -> None:
        """Leaves a sign of life each second, with what of this rank's bytes is done."""
        with contextlib.suppress(RuntimeError):  # without the store this rank is as good as dead
            for beat in itertools.count():
                bar = self._bar
                total, moved = (bar.total, bar.done) if bar else (0, 0)
                self._store.set(f"alive/{self.rank}", f"{beat} {total} {moved}")
                if bar and self.rank == 0:
                    self._count_others(bar)
                if done.wait(_EVERY):
                    return

    def _count_others(self, bar: Bar) -> None:
        signs = self._store.multi_get([f"alive/{rank}" for rank in range(1, self.size)])
        figures = [list(map(int, sign.split())) for sign in signs]
        total, moved = (sum(each[i] for each in figures) for i in (1, 2))
        bar.expect(total - self._known[0])
        bar.advance(moved - self._known[1])
        self._known = total, moved


@contextlib.contextmanager
def joined(distributed: bool = True) -> Iterator[Ranks]:
    """The ranks of this job, until all leave; one process by itself where RANK and WORLD_SIZE do
    not say that there are more.

    Raises: RankError where another rank does not come, fails or dies.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not distributed or size <= 1:
        yield ALONE
        return
    store, group = _enter(rank, size)
    ranks, done = _Joined(store, group, rank, size), threading.Event()
    pulse = threading.Thread(target=ranks.pulse, args=(done,), daemon=True)
    pulse.start()
    try:
        yield ranks
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the store may be what failed
            store.set(f"failed/{rank}", "")
        raise
    finally:
        done.set()
        pulse.join()
        _leave(group)


def _enter(rank: int, size: int) -> tuple[Store, ProcessGroup | None]:
    """The store of this job and a group of its ranks; None: the default one, made here."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if not dist.is_available():
        got, expected = f"WORLD_SIZE={size}", "1, or a torch that has it"
        raise ArgumentError.of("ranks", "this torch has no torch.distributed", got, expected)
    try:
        found, *_ = next(rendezvous("env://", rank, size, timeout=_JOIN))
        store = dist.distributed_c10d.PrefixStore(f"mergekern/{next(_joins)}", found)
        store.set(f"alive/{rank}", "0 0 0")  # before the others can ask for it
        if dist.is_initialized():
            return store, dist.new_group(timeout=_JOIN, backend="gloo")
        dist.init_process_group("gloo", timeout=_JOIN, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"{size} ranks, as WORLD_SIZE says, have not found each other ({_line(error)})"
        ) from None
    return store, None


def _leave(group: ProcessGroup | None) -> None:
    import torch.distributed as dist

    dist.destroy_process_group(group)


def is_first() -> bool:
    """Whether this process speaks for the job."""
    return _number("WORLD_SIZE", 1) <= 1 or _number("RANK", 0) == 0


def label() -> str:
    """What an error of this process begins with: which rank it is, if there are others.

    >>> label()
    ''
    """
    alone = os.environ.get("WORLD_SIZE", "1") in ("", "1")
    return "" if alone else f"rank {os.environ.get('RANK', '0')}: "


def own_device(device: str) -> str:
    """Of the GPUs of this machine the one that is this process's."""
    import torch

    if device != "cuda" or _number("WORLD_SIZE", 1) <= 1:
        return device
    return f"cuda:{_number('LOCAL_RANK', 0) % max(1, torch.cuda.device_count())}"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ArgumentError.of(name, "no number", repr(text), "0 or more")
    return int(text)


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
