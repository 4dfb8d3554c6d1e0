"""Which stream does what on a GPU, by stand-ins: what cannot be seen without one is the copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekern as mk
from mergekern.engine import place as places
from mergekern.engine.place import Gpu, Sent
from mergekern.errors import ArgumentError

from engine.models import linear, read_folder, tensors, write_folder


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def record_event(self) -> Event:
        self.cuda.log.append((self.name, "record"))
        return Event(self.cuda, self.name)

    def wait_event(self, event: Event) -> None:
        self.cuda.log.append((self.name, f"waits for {event.of}"))

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append((self.name, f"waits for {other.name}"))


class Event:
    def __init__(self, cuda: Cuda, of: str) -> None:
        self.cuda, self.of = cuda, of

    def synchronize(self) -> None:
        self.cuda.log.append(("host", f"waits for {self.of}"))


class Cuda:
    """Keeps account of what is asked of torch.cuda."""

    def __init__(self, free: int = 1 << 30) -> None:
        self.log: list[tuple[str, str]] = []
        self.names = iter(("up", "down"))
        self.compute = Stream(self, "compute")
        self.now = self.compute
        self.free = free

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self, next(self.names))

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def current_stream(self, device: torch.device) -> Stream:
        return self.now

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, self.free


class Spy:
    """A tensor that says on which stream it is copied, and which streams use its memory."""

    shape, dtype = (3,), torch.float32

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def to(self, device: torch.device, *, non_blocking: bool) -> Spy:
        assert non_blocking
        self.cuda.log.append((self.cuda.now.name, f"copies to {device}"))
        return Spy(self.cuda)

    def record_stream(self, stream: Stream) -> None:
        self.cuda.log.append((stream.name, "uses"))


def test_each_copy_has_its_stream_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    gpu = Gpu("cuda:0", cuda)
    sent = gpu.send([Spy(cuda), Spy(cuda)])  # type: ignore[list-item]
    assert cuda.log == [("up", "copies to cuda:0")] * 2 + [("up", "record")]
    cuda.log.clear()
    there = gpu.receive(sent)
    assert cuda.log == [("compute", "waits for up")] + [("compute", "uses")] * 2
    cuda.log.clear()

    class Here:
        def copy_(self, x: Spy, *, non_blocking: bool) -> Here:
            assert non_blocking
            cuda.log.append((cuda.now.name, "copies back"))
            return self

    def empty(*_: Any, pin_memory: bool, **__: Any) -> Here:
        assert pin_memory
        return Here()

    monkeypatch.setattr(places.torch, "empty", empty)
    back = gpu.fetch(there)
    assert cuda.log == [
        ("down", "waits for compute"),
        *[("down", "copies back"), ("down", "uses")] * 2,
        ("down", "record"),
    ]
    cuda.log.clear()
    back.wait()
    assert cuda.log == [("host", "waits for down")]


def test_a_slice_that_does_not_fit_says_how_much_it_needs() -> None:
    gpu = Gpu("cuda:0", Cuda(free=100 << 20))
    assert gpu.window(1 << 40, 1) == (100 << 20) // 10 * 8
    assert gpu.window(5, 1) == 5
    with pytest.raises(
        ArgumentError, match="does not fit on cuda:0; got 100 MiB free; expected 125"
    ):
        gpu.window(1 << 40, 100 << 20)


def test_the_stream_asks_for_every_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order: sent, received, fetched, waited for; and nothing of what is only copied."""
    log: list[str] = []

    class Marker:
        def synchronize(self) -> None:
            log.append("wait")

    class Told(places.Place):
        def send(self, x: Any) -> Sent:
            log.append("send")
            return Sent([t.clone() for t in x], Marker())

        def receive(self, sent: Sent) -> Any:
            log.append("receive")
            return sent.tensors

        def fetch(self, results: Any) -> Sent:
            log.append("fetch")
            return Sent(list(results), Marker())

    monkeypatch.setattr("mergekern.engine.stream.place_of", lambda _: Told())
    monkeypatch.setattr("mergekern.engine.units._MOST", 1)  # each tensor by itself
    paths = [write_folder(tmp_path / f"m{i}", tensors(i)) for i in range(2)]
    mk.merge_checkpoints(linear(*paths), tmp_path / "out", progress=False)
    merged = sum(x.is_floating_point() for x in tensors().values())
    assert {what: log.count(what) for what in log} == dict.fromkeys(
        ("send", "receive", "fetch", "wait"), merged
    )
    want = mk.merge_state_dicts([tensors(0), tensors(1)], "linear", weight=1)
    assert all(torch.equal(x, want[k]) for k, x in read_folder(tmp_path / "out").items())
