"""Pickles of torch.save to read: tensors and plain data, never code."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...methods.compat import Signature

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
