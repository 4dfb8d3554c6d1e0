"""Bytes of a file at a place, by pread: a file cut short is an error, not the SIGBUS of a map."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ArgumentError, CheckpointError
from ...methods.compat import Signature
from .formats import Piece, bytes_of, nbytes

_VECTOR = 512  # buffers in a call; systems take 1024


class PositionedFile:
    """An open file of tensors at known places. It stays the file that was opened, whatever is
    renamed over its path, and threads may read it at once."""

    path: Path
    signatures: Mapping[str, Signature]
    ranges: Mapping[str, tuple[int, int]]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        self.opened = os.fstat(self._fd)
        self._close = weakref.finalize(self, os.close, self._fd)

    def read_into(self, name: str, begin: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from `begin` on, in C order.

        Raises: CheckpointError where the file has become shorter or the disk fails.
        """
        first, last = self.ranges[name]
        if not 0 <= begin <= begin + buffer.nbytes <= last - first:
            got = f"bytes {begin} to {begin + buffer.nbytes}"
            raise ArgumentError.of("read_into", f"not in {name}", got, f"0 to {last - first}")
        try:
            fill(self._fd, buffer.cast("B"), first + begin)
        except EOFError:
            raise CheckpointError(
                f"{self.path}: tensor {name} ends early; the file has become shorter since it was "
                "opened"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} cannot be read ({error.strerror})"
            ) from None

    def read_many(self, pieces: Sequence[Piece]) -> None:
        """`read_into` of each, in one call to the system where they follow each other."""
        ordered = sorted(pieces, key=self._place)
        while ordered:
            run = [ordered[0]]
            end = self._place(run[0]) + run[0][2].nbytes
            for piece in ordered[1:_VECTOR]:
                if self._place(piece) != end:
                    break
                run.append(piece)
                end += piece[2].nbytes
            begin = self._place(run[0])
            if len(run) == 1 or not self._read_run(run, begin, end):
                for piece in run:
                    self.read_into(*piece)
            ordered = ordered[len(run) :]

    def _place(self, piece: Piece) -> int:
        return self.ranges[piece[0]][0] + piece[1]

    def _read_run(self, run: Sequence[Piece], begin: int, end: int) -> bool:
        """Whether all of it came at once; else what is wrong shows when each is read by itself."""
        try:
            return os.preadv(self._fd, [data for _, _, data in run], begin) == end - begin
        except OSError:
            return False

    def written_to(self) -> bool:
        """Whether the file is other than when it was opened. A link more or less is no matter."""
        now = os.fstat(self._fd)
        return (now.st_size, now.st_mtime_ns) != (self.opened.st_size, self.opened.st_mtime_ns)

    def read(self, name: str) -> Tensor:
        signature = self.signatures[name]
        raw = torch.empty(nbytes(signature), dtype=torch.uint8)
        self.read_into(name, 0, bytes_of(raw))
        return raw.view(signature.dtype).view(signature.shape)

    def bytes_at(self, offset: int, size: int) -> bytes:
        """Bytes of the file; EOFError, OSError."""
        raw = bytearray(size)
        fill(self._fd, memoryview(raw), offset)
        return bytes(raw)

    def close(self) -> None:
        self._close()


def fill(fd: int, buffer: memoryview, offset: int) -> None:
    """Fills `buffer` from `offset` of the file on; EOFError where the file ends before.

    preadv may read less than asked for (2 GiB at most).
    """
    while buffer:
        count = os.preadv(fd, [buffer], offset)
        if not count:
            raise EOFError
        buffer, offset = buffer[count:], offset + count
