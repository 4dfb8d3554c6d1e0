"""Which slices of a merge are done, with checksums: what a later run may rely on.

A line is a CRC-32 and JSON: the head first, then lists of entries; one that a crash cut short, or
that the disk lost, fails its CRC and is passed over. Every process writes a file of its own and
reads all of them, so a torn end is never written on. Nothing is promised by a line alone: a run
that goes on compares what lies in the output with the checksum (`engine.resume`), so the order in
which pages reach the disk does not matter.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

_SYNC_EVERY = 5.0  # seconds of work that a loss of power may cost, beside what is under way


def digest_of(data: Any) -> str:
    """XXH3 of 128 bits, in hex: it finds accidents at the speed of memory, not forgeries."""
    return xxhash.xxh3_128_hexdigest(data.encode() if isinstance(data, str) else data)


def joined(digests: Iterable[str]) -> str:
    """The digest of a tensor, out of those of its slices: that of the only one, or of all, joined.

    >>> joined(["ab"])
    'ab'
    """
    each = list(digests)
    return each[0] if len(each) == 1 else digest_of("".join(each))


class Entry(NamedTuple):
    """A slice that is in the output."""

    task: int
    slice: int
    results: tuple[str, ...]  # digest of the result in each point of the sweep
    inputs: tuple[str, ...]  # digest of what was read of each source
    found: str = ""  # digest of what a pass before had found, which the result depends on
    numbers: Sequence[Mapping[str, list[float]]] = ()  # of each point, for the report


Entries = dict[tuple[int, int], Entry]


class Journal:
    """Appends to a file of its own in the control folder."""

    def __init__(self, folder: Path, head: dict[str, Any], rank: int = 0) -> None:
        run = sum(1 for _ in folder.glob("journal-*"))
        while True:
            self._path = folder / f"journal-{run:05d}-{rank:05d}"
            try:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                break
            except FileExistsError:
                run += 1
        self._synced = time.monotonic()
        self._write(head)

    def add(self, entries: Sequence[Entry]) -> None:
        self._write([list(entry) for entry in entries])
        if time.monotonic() - self._synced > _SYNC_EVERY:
            os.fdatasync(self._fd)
            self._synced = time.monotonic()

    def _write(self, value: Any) -> None:
        text = json.dumps(value, separators=(",", ":")).encode()
        view = memoryview(b"%08x %b\n" % (zlib.crc32(text), text))
        while view:
            view = view[os.write(self._fd, view) :]

    def close(self) -> None:
        os.fdatasync(self._fd)
        os.close(self._fd)


def read_journals(folder: Path) -> tuple[list[dict[str, Any]], Entries]:
    """The heads of all journals, the oldest first, and what they say is done."""
    heads: list[dict[str, Any]] = []
    entries: Entries = {}
    for path in sorted(folder.glob("journal-*")):
        values = _values(path.read_bytes())
        head = next(values, None)
        if not isinstance(head, dict):
            continue  # died while it wrote the first line
        heads.append(head)
        for task, index, results, inputs, found, numbers in itertools.chain.from_iterable(values):
            entries[task, index] = Entry(task, index, tuple(results), tuple(inputs), found, numbers)
    return heads, entries


def _values(data: bytes) -> Iterator[Any]:
    for line in data.split(b"\n"):
        crc, _, text = line.partition(b" ")
        if text and crc == b"%08x" % zlib.crc32(text):
            yield json.loads(text)
