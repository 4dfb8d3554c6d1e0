"""The window of a stream: bytes under way, and the buffers that come back from it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# Code that torch loads on first use, scratch of the kernels, freed results that the heap keeps.
OVERHEAD = 40 << 20
_GRAIN = 1 << 16
# Under way at most, or two of the largest units and the small ones between them: more does not keep
# the threads busier, and memory that was never touched costs a virtual machine as much time as the
# disk (2 s per GiB on one that was measured).
_AHEAD = 256 << 20
_BETWEEN = 32 << 20

_M_MMAP_THRESHOLD = -3


def return_freed() -> None:
    """From now on this process gives freed tensors back to the system at once, on glibc.

    It would keep those of up to 32 MiB in its heaps: in a merge of 1 GiB some 400 MB. Once given
    back or not, memory costs the same time here.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def window(memory: int) -> int:
    """The bytes that tensors under way may take of a bound on memory."""
    return max(memory - OVERHEAD, memory // 2)


class Window:
    """`take` waits until that many bytes are free (or none are taken), `give` returns them.

    Buffers that are given back serve again, since new memory costs the kernel more than reading
    into it; those that stand idle count, and go where others are wanted.
    """

    def __init__(self, limit: int, *, pinned: bool = False) -> None:
        self._limit, self._pinned = limit, pinned
        self._taken = self._largest = self._idle_bytes = 0
        self._idle: dict[int, list[Tensor]] = {}
        self._closed = False
        self._changed = threading.Condition()

    def take(self, cost: int, sizes: Sequence[int]) -> list[Tensor] | None:
        """Buffers of at least these sizes, which `cost` includes; None if the stream has ended."""
        with self._changed:
            self._largest = max(self._largest, cost)
            most = min(self._limit, max(_AHEAD, 2 * self._largest + _BETWEEN))
            self._changed.wait_for(
                lambda: self._closed or self._taken + cost <= most or not self._taken
            )
            if self._closed:
                return None
            self._taken += cost
            return self._buffers(sizes)

    def _buffers(self, sizes: Sequence[int]) -> list[Tensor]:
        grains = [-(-size // _GRAIN) * _GRAIN for size in sizes]
        found = [self._idle[g].pop() if self._idle.get(g) else None for g in grains]
        self._idle_bytes -= sum(x.nbytes for x in found if x is not None)
        while self._idle_bytes > max(0, self._limit - self._taken):
            stack = next(stack for stack in self._idle.values() if stack)
            self._idle_bytes -= stack.pop().nbytes
        return [
            torch.empty(g, dtype=torch.uint8, pin_memory=self._pinned) if x is None else x
            for g, x in zip(grains, found, strict=True)
        ]

    def give(self, cost: int, buffers: Sequence[Tensor]) -> None:
        with self._changed:
            self._taken -= cost
            for x in buffers:
                self._idle.setdefault(x.nbytes, []).append(x)
                self._idle_bytes += x.nbytes
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._idle.clear()
            self._idle_bytes = 0
            self._changed.notify_all()
