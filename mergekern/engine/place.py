"""Where slices are computed: here, or on a GPU with copies on streams of their own.

To a GPU the reading thread sends what it has read from pinned buffers on one stream, the computing
thread enqueues kernels that wait for it, and results come back into pinned memory on a third, for
which only the writing thread waits. The window bounds what is under way on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError


class Sent(NamedTuple):
    """Tensors on their way, to where they are computed or back, and what marks their arrival."""

    tensors: list[Tensor]
    arrived: Any = None

    def wait(self) -> list[Tensor]:
        """The tensors, when they are there and what they were copied from is free."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


class Place:
    """The host: nothing is copied."""

    pinned = False

    def window(self, limit: int, least: int) -> int:
        """How much of this many bytes may be under way; `least` is what a slice takes."""
        return limit

    def send(self, tensors: Sequence[Tensor]) -> Sent:
        """Called by the reading thread."""
        return Sent(list(tensors))

    def receive(self, sent: Sent) -> list[Tensor]:
        """Called by the computing thread before it uses them."""
        return sent.tensors

    def fetch(self, results: Sequence[Tensor]) -> Sent:
        """Called by the computing thread; the writing one waits."""
        return Sent(list(results))


class Gpu(Place):
    """A CUDA device. `cuda` is torch.cuda, or what stands for it in a test."""

    pinned = True

    def __init__(self, device: str, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = torch.device(device), cuda
        self._up, self._down = cuda.Stream(self._device), cuda.Stream(self._device)

    def window(self, limit: int, least: int) -> int:
        free, _ = self._cuda.mem_get_info(self._device)
        room = free // 10 * 8  # the rest for scratch of kernels and fragments
        if least > room:
            raise ArgumentError.of(
                "device",
                f"the largest slice does not fit on {self._device}",
                f"{free / 2**20:.0f} MiB free",
                f"{least * 10 / 8 / 2**20:.0f} MiB",
            )
        return min(limit, room)

    def send(self, tensors: Sequence[Tensor]) -> Sent:
        with self._cuda.stream(self._up):
            sent = [x.to(self._device, non_blocking=True) for x in tensors]
            return Sent(sent, self._up.record_event())

    def receive(self, sent: Sent) -> list[Tensor]:
        current = self._cuda.current_stream(self._device)
        current.wait_event(sent.arrived)
        for x in sent.tensors:  # their memory is of the other stream
            x.record_stream(current)
        return sent.tensors

    def fetch(self, results: Sequence[Tensor]) -> Sent:
        self._down.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._down):
            fetched = []
            for x in results:
                here = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
                fetched.append(here.copy_(x, non_blocking=True))
                x.record_stream(self._down)
            return Sent(fetched, self._down.record_event())


def place_of(device: str) -> Place:
    return Gpu(device) if torch.device(device).type == "cuda" else Place()
