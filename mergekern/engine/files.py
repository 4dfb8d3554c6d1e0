"""Weight files: memory-mapped safetensors to read, a streaming writer, torch pickles.

safetensors itself validates every header before we trust an offset of it; what it has no call
for is done here: reading a tensor without a copy from a map whose pages can be given back, and
writing tensors in any order as they are finished.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..methods.compat import Signature

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MADV_POPULATE_READ = 22  # Linux 5.14; older kernels answer EINVAL and pages come on first touch
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class WeightFile(Protocol):
    """An open file of named tensors."""

    path: Path
    signatures: Mapping[str, Signature]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Tensor: ...
    def prefetch(self, name: str) -> None: ...
    def release(self, name: str) -> None: ...
    def close(self) -> None: ...


class SafetensorsFile:
    """Tensors as views of a private memory map: nothing is copied until it is touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):
                pass  # raises for truncated, overlapping or oversized headers
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: no readable safetensors file ({reason})") from None
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            self._start = 8 + size
            flags = mmap.MAP_PRIVATE | _NO_RESERVE
            self._map = mmap.mmap(
                file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        self.metadata: Mapping[str, str] = header.pop("__metadata__", None) or {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name} has an unsupported dtype; got {entry['dtype']}"
                )
        ordered = sorted(header, key=lambda name: header[name]["data_offsets"])
        self._offsets = {name: tuple(header[name]["data_offsets"]) for name in ordered}
        self.signatures: Mapping[str, Signature] = {
            name: Signature(DTYPES[header[name]["dtype"]], tuple(header[name]["shape"]))
            for name in ordered
        }

    def read(self, name: str) -> Tensor:
        dtype, shape = self.signatures[name]
        begin, end = self._offsets[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        count = (end - begin) // dtype.itemsize
        return torch.frombuffer(
            self._map, dtype=dtype, count=count, offset=self._start + begin
        ).view(shape)

    def _advise(self, name: str, advice: int) -> None:
        begin, end = self._offsets[name]
        first = (self._start + begin) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._map.madvise(advice, first, self._start + end - first)

    def prefetch(self, name: str) -> None:
        """Bring the tensor's pages in now, in the thread that asks."""
        try:
            self._advise(name, _MADV_POPULATE_READ)
        except OSError:
            self._advise(name, mmap.MADV_WILLNEED)

    def release(self, name: str) -> None:
        """Give the tensor's pages back; reading it again brings them from the file."""
        self._advise(name, mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the map, which ends with the last tensor that views it.

        Not `mmap.close`: torch.frombuffer holds the map but exports no buffer of it, so that would
        unmap the memory under living tensors.
        """
        del self._map


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
)


def _reason(error: BaseException) -> str:
    """What was wrong, out of torch's long text with its advice to trust the file."""
    text = " ".join(str(error).split())
    found = re.search(r"(?i)unsupported (global: )?(global|operand) \S+", text)
    return found.group() if found else text.partition(". ")[0] or type(error).__name__


class TorchFile:
    """A pickle of torch.save, read with weights_only=True: tensors and plain data, never code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        try:
            mapped = zipfile.is_zipfile(path)  # files of torch < 1.6 are none and are read whole
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{path}: torch.load(weights_only=True) refuses it ({_reason(error)}); "
                "convert it to safetensors where you trust it"
            ) from None
        if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
            data = data["state_dict"]
        if not isinstance(data, Mapping) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()
        ):
            raise CheckpointError(f"{path}: holds no plain mapping of names to tensors")
        self._tensors: dict[str, Tensor] = dict(data)
        self.signatures: Mapping[str, Signature] = {
            name: Signature.of(t) for name, t in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def prefetch(self, name: str) -> None:
        """Pages come on first touch."""

    def release(self, name: str) -> None:
        """The pickle's storages are shared, so they are kept until close."""

    def close(self) -> None:
        self._tensors.clear()


def open_file(path: Path) -> WeightFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


class SafetensorsWriter:
    """Writes tensors of known signature in any order; the file is complete when all are in."""

    def __init__(
        self, path: Path, signatures: Mapping[str, Signature], metadata: Mapping[str, str]
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
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._start + offset)

    def write(self, name: str, tensor: Tensor) -> None:
        if not tensor.numel():
            return
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        data: Any = flat.numpy()
        fd = os.open(self._path, os.O_WRONLY)  # not kept: there may be thousands of shards
        try:
            _write_all(fd, memoryview(data), self._start + self._offsets[name])
        finally:
            os.close(fd)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    """pwrite may write less than asked for (2 GiB at most)."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def nbytes(signature: Signature) -> int:
    return torch.Size(signature.shape).numel() * signature.dtype.itemsize
