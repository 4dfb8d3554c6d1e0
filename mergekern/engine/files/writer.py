"""safetensors to write: parts of tensors in any order, as they are finished."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ...methods.compat import Signature
from .formats import NAMES, Piece, bytes_of, nbytes

_VECTOR = 512  # buffers in a call; systems take 1024


class SafetensorsWriter:
    """Writes tensors of known signature in any order; the file is complete when all are in.

    keep: a file that has this header and size already is written on.
    """

    def __init__(
        self,
        path: Path,
        signatures: Mapping[str, Signature],
        metadata: Mapping[str, str],
        *,
        keep: bool = False,
    ) -> None:
        # Wide types first, as safetensors itself sorts, so that every tensor is aligned.
        names = sorted(signatures, key=lambda n: -signatures[n].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset = 0
        self._offsets: dict[str, int] = {}
        for name in names:
            dtype, shape = signatures[name]
            size = nbytes(signatures[name])
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            self._offsets[name] = offset
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._path = path
        head = len(text).to_bytes(8, "little") + text
        if keep and _has(path, head, self._start + offset):
            return
        with path.open("wb" if keep else "xb") as file:
            file.write(head)
            file.truncate(self._start + offset)

    def write(self, name: str, tensor: Tensor) -> None:
        self.write_many([(name, 0, bytes_of(tensor))])

    def write_many(self, pieces: Sequence[Piece]) -> None:
        """Parts of tensors, in one call to the system where they follow each other."""
        placed = sorted(
            ((self._start + self._offsets[n] + begin, data) for n, begin, data in pieces if data),
            key=lambda piece: piece[0],
        )
        fd = os.open(self._path, os.O_WRONLY)  # not kept: there may be thousands of shards
        try:
            while placed:
                run = [placed[0][1]]
                end = placed[0][0] + run[0].nbytes
                for place, data in placed[1:_VECTOR]:
                    if place != end:
                        break
                    run.append(data)
                    end += data.nbytes
                first, placed = placed[0][0], placed[len(run) :]
                _write_all(fd, run, first)
        finally:
            os.close(fd)

    def sync(self) -> None:
        fd = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def read_bytes(self, name: str, begin: int, size: int) -> bytes:
        """What the file holds there, for a comparison."""
        fd = os.open(self._path, os.O_RDONLY)
        try:
            return os.pread(fd, size, self._start + self._offsets[name] + begin)
        finally:
            os.close(fd)


def _has(path: Path, head: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(head)) == head


def _write_all(fd: int, run: list[memoryview], offset: int) -> None:
    """pwritev may write less than asked for (2 GiB at most)."""
    while run:
        written = os.pwritev(fd, run, offset)
        offset += written
        while run and written >= run[0].nbytes:
            written -= run.pop(0).nbytes
        if written:
            run[0] = run[0][written:]
