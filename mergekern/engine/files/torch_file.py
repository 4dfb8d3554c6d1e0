"""Pickles of torch.save to read: tensors and plain data, never code."""

from __future__ import annotations

import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...methods.compat import Signature
from .formats import Piece, bytes_of, nbytes
from .positioned import PositionedFile, fill

# What torch.load raises for files that are truncated, garbled or hold code.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
)
_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, of the extra field


def _reason(error: BaseException) -> str:
    """What was wrong, out of torch's long text with its advice to trust the file."""
    text = " ".join(str(error).split())
    found = re.search(r"(?i)unsupported (global: )?(global|operand) \S+", text)
    return found.group() if found else text.partition(". ")[0] or type(error).__name__


class TorchFile(PositionedFile):
    """A pickle of torch.save, read with weights_only=True: tensors and plain data, never code.

    Opening a file of torch >= 1.6, a zip archive, reads its pickle only: a contiguous tensor is a
    byte range of its storage, shared or not. Other tensors, and all of an older file or of one
    from a machine of other byte order, are held in memory.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata: Mapping[str, str] = {}
        try:
            self._open()
        except CheckpointError:
            raise
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{path}: torch.load(weights_only=True) refuses it ({_reason(error)}); "
                "convert it to safetensors where you trust it"
            ) from None

    def _open(self) -> None:
        storages = self._storages()
        tensors = self._tensors("meta") if storages else {}
        located = {name: _located(t, storages) for name, t in tensors.items()}
        if not storages or None in located.values():
            tensors, located = self._tensors("cpu"), {}
        self.signatures = {name: Signature.of(t) for name, t in tensors.items()}
        self._check(tensors)
        self.ranges = {
            name: place
            for name, place in located.items()
            if place is not None and tensors[name].is_contiguous()
        }
        self._held = {
            name: self._gathered(t, located.get(name))
            for name, t in tensors.items()
            if name not in self.ranges
        }

    def _storages(self) -> dict[int, int]:
        """First byte -> size of each storage in the archive; none where it is held in memory."""
        if self.bytes_at(0, len(_MAGIC)) != _MAGIC:  # as torch.load tells
            return {}
        with zipfile.ZipFile(self.path) as archive:
            records = archive.infolist()
            for record in records:
                if record.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"record {record.filename} is compressed")
                mark = record.filename.endswith("/byteorder")
                if mark and archive.read(record).decode() != sys.byteorder:
                    return {}
        storages = {}
        for record in records:
            header = self.bytes_at(record.header_offset, _LOCAL_HEADER.size)
            _, name, extra = _LOCAL_HEADER.unpack(header)
            storages[record.header_offset + _LOCAL_HEADER.size + name + extra] = record.file_size
        return storages

    def _tensors(self, where: str) -> dict[str, Tensor]:
        """The mapping in the file; "meta" reads no weights."""
        data = torch.load(self.path, map_location=where, weights_only=True)
        return {name: tensor.detach() for name, tensor in self._weights(data).items()}

    def _weights(self, data: Any) -> Mapping[str, Tensor]:
        """The weights themselves, or the one mapping of names to tensors in a training checkpoint.

        Beside that mapping there may be an optimizer's state, counters, scalars.
        """
        if _plain(data):
            return data
        inside = data if isinstance(data, Mapping) else {}
        found = [key for key, value in inside.items() if _plain(value) and value]
        beside = [k for k, v in inside.items() if isinstance(v, Tensor) and v.numel() > 1]
        if len(found) > 1:
            listed = ", ".join(f"{key!a:.80}" for key in found)
            raise CheckpointError(
                f"{self.path}: holds several mappings of names to tensors; got {listed}; "
                "expected one (save the one to merge in a file of its own)"
            )
        if not found or beside:
            raise CheckpointError(f"{self.path}: holds no plain mapping of names to tensors")
        weights: Mapping[str, Tensor] = inside[found[0]]
        return weights

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        """What a pickle may say and a weight is not."""
        size = self.path.stat().st_size
        for name, t in tensors.items():
            if t.layout != torch.strided:
                raise CheckpointError(f"{self.path}: tensor {name} is not dense; got {t.layout}")
            if nbytes(self.signatures[name]) > size:  # it repeats its elements by strides of 0
                raise CheckpointError(
                    f"{self.path}: tensor {name} is larger than its file; "
                    f"got {nbytes(self.signatures[name])} bytes"
                )

    def _gathered(self, t: Tensor, place: tuple[int, int] | None) -> Tensor:
        """A tensor in C order; on "meta", its elements out of the bytes that it spans."""
        if place is None:
            return t.resolve_conj().resolve_neg().contiguous()
        raw = torch.empty(place[1] - place[0], dtype=torch.uint8)
        fill(self._fd, bytes_of(raw), place[0])
        return raw.view(t.dtype).as_strided(t.shape, t.stride()).contiguous()

    def read_into(self, name: str, begin: int, buffer: memoryview) -> None:
        if name in self.ranges:
            super().read_into(name, begin, buffer)
            return
        raw = bytes_of(self._held[name])
        buffer.cast("B")[:] = raw[begin : begin + buffer.nbytes]

    def read_many(self, pieces: Sequence[Piece]) -> None:
        super().read_many([piece for piece in pieces if piece[0] in self.ranges])
        for piece in pieces:
            if piece[0] not in self.ranges:
                self.read_into(*piece)

    def read(self, name: str) -> Tensor:
        return super().read(name) if name in self.ranges else self._held[name]

    def close(self) -> None:
        super().close()
        self._held.clear()


def _plain(data: Any) -> bool:
    return isinstance(data, Mapping) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()
    )


def _located(t: Tensor, storages: Mapping[int, int]) -> tuple[int, int] | None:
    """The bytes of the file that a tensor on "meta" spans; None where they are not known.

    torch.load works a storage's place out from the order in which torch.save writes, and lets a
    tensor on "meta" reach beyond its storage. So a place counts only if it is a record's.
    """
    first: int = getattr(t.untyped_storage(), "_checkpoint_offset", -1)
    if first not in storages or t.is_conj() or t.is_neg() or t.layout != torch.strided:
        return None
    reach: int = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    begin = int(t.storage_offset()) * t.itemsize
    end = begin + (reach + 1) * t.itemsize if t.numel() else begin
    return (first + begin, first + end) if end <= storages[first] else None
