"""safetensors to read: the library validates the header before an offset of it is trusted.

What it has no call for is done here: reading a tensor without a copy from a map whose pages can be
given back.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import CheckpointError
from ...methods.compat import Signature
from .formats import DTYPES
from .positioned import PositionedFile

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class SafetensorsFile(PositionedFile):
    """Tensors as views of a private memory map: nothing is copied until it is touched."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with safe_open(path, framework="pt"):
                pass  # raises for truncated, overlapping or oversized headers
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: no readable safetensors file ({reason})") from None
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
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
        self.ranges = {name: _shifted(header[name]["data_offsets"], 8 + size) for name in ordered}
        self.signatures: Mapping[str, Signature] = {
            name: Signature(DTYPES[header[name]["dtype"]], tuple(header[name]["shape"]))
            for name in ordered
        }

    def read(self, name: str) -> Tensor:
        dtype, shape = self.signatures[name]
        begin, end = self.ranges[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        count = (end - begin) // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(shape)

    def close(self) -> None:
        """Let go of the map, which ends with the last tensor that views it.

        Not `mmap.close`: torch.frombuffer holds the map but exports no buffer of it, so that would
        unmap the memory under living tensors.
        """
        del self._map
        super().close()


def _shifted(offsets: list[int], by: int) -> tuple[int, int]:
    begin, end = offsets
    return begin + by, end + by
