"""What all weight files share: names of element types, sizes, what an open file can do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...methods.compat import Signature

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
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def nbytes(signature: Signature) -> int:
    return torch.Size(signature.shape).numel() * signature.dtype.itemsize


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU: its own memory where it is contiguous, else a copy."""
    data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(data)


Piece = tuple[str, int, memoryview]  # tensor, its first byte to read, where to


class WeightFile(Protocol):
    """An open file of named tensors."""

    path: Path
    opened: os.stat_result  # what the system said of it then
    signatures: Mapping[str, Signature]
    metadata: Mapping[str, str]
    # Tensor -> its first byte in the file and one past its last; a tensor missing here is held in
    # memory.
    ranges: Mapping[str, tuple[int, int]]

    def read_into(self, name: str, begin: int, buffer: memoryview) -> None: ...
    def read_many(self, pieces: Sequence[Piece]) -> None: ...
    def read(self, name: str) -> Tensor: ...
    def written_to(self) -> bool: ...
    def close(self) -> None: ...
