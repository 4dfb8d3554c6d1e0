"""Timing against the machine's own limits, measured in the same minutes.

Machines are shared: an absolute time says little, and a limit measured once at the start says
little about the minute in which a kernel ran. So every timed call is preceded by a timed copy,
and what is reported is the median of the ratios.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable

import torch

from mergekern import check

Call = Callable[[], object]
ROUNDS = 11


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best(call: Call, rounds: int = 3) -> float:
    return min(seconds(call) for _ in range(rounds))


class Copy:
    """A copy through torch, all threads, memory touched before: the bandwidth to compare with.

    Bytes are those read plus those written.
    """

    def __init__(self, nbytes: int) -> None:
        self.source = torch.zeros(nbytes, dtype=torch.uint8).fill_(1)
        self.target = torch.zeros(nbytes, dtype=torch.uint8).fill_(2)
        self.times: list[float] = []

    def __call__(self) -> None:
        self.times.append(seconds(lambda: self.target.copy_(self.source)))
        time.sleep(0.02)  # torch's worker threads spin for a while and would take a core away

    @property
    def bandwidth(self) -> float:
        """Bytes a second, the median of all copies so far."""
        return 2 * self.source.nbytes / statistics.median(self.times)


def first_touch(nbytes: int) -> float:
    """Seconds that the pages of a new result cost at the least: filling one as ops allocate it,
    less filling it again. The best of each: the system may take ten times as long for a while."""
    old = torch.zeros(nbytes, dtype=torch.uint8).fill_(1)
    new = best(lambda: check.output("bench", None, old).fill_(1), ROUNDS)
    return max(0.0, new - best(lambda: old.fill_(1), ROUNDS))


def gemm_rate(n: int = 1536) -> float:
    """Float32 FLOP/s of torch.mm, all threads."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    torch.mm(a, b)
    return 2 * n**3 / best(lambda: torch.mm(a, b), 5)


def peak_extra(call: Call) -> int | None:
    """Bytes by which the process grew at most during the call; None where Linux does not say."""
    with contextlib.suppress(OSError):
        with contextlib.suppress(
            AttributeError
        ):  # what malloc kept of former calls would hide this
            ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # resets the high-water mark
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    return None


def _status(field: str) -> int:
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
