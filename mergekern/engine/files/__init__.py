"""Weight files: safetensors and torch pickles to read, a streaming safetensors writer."""

from __future__ import annotations

from pathlib import Path

from .formats import DTYPES, NAMES, WeightFile, nbytes
from .safetensors_file import SafetensorsFile
from .torch_file import TorchFile
from .writer import SafetensorsWriter

__all__ = [
    "DTYPES",
    "NAMES",
    "SafetensorsFile",
    "SafetensorsWriter",
    "TorchFile",
    "WeightFile",
    "nbytes",
    "open_file",
]


def open_file(path: Path) -> WeightFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
