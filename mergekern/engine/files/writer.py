"""safetensors to write: tensors in any order, as they are finished."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...methods.compat import Signature
from .formats import NAMES, nbytes


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
