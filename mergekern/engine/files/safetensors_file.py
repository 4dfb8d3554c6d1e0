"""safetensors to read: the library validates the header before an offset of it is trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...errors import CheckpointError
from ...methods.compat import Signature
from .formats import DTYPES
from .positioned import PositionedFile


class SafetensorsFile(PositionedFile):
    """A file whose header says of each tensor which bytes it is."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with safe_open(path, framework="pt"):
                pass  # raises for truncated, overlapping or oversized headers
            size = int.from_bytes(self.bytes_at(0, 8), "little")
            header = json.loads(self.bytes_at(8, size))
        except (SafetensorError, OSError, EOFError, ValueError) as error:  # or cut short since
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: no readable safetensors file ({reason})") from None
        self.metadata: Mapping[str, str] = header.pop("__metadata__", None) or {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name!a:.80} has an unsupported dtype; got {entry['dtype']}; "
                    f"expected one of {', '.join(DTYPES)} (dequantise block-scaled weights first)"
                )
        ordered = sorted(header, key=lambda name: header[name]["data_offsets"])
        self.ranges = {name: _shifted(header[name]["data_offsets"], 8 + size) for name in ordered}
        self.signatures: Mapping[str, Signature] = {
            name: Signature(DTYPES[header[name]["dtype"]], tuple(header[name]["shape"]))
            for name in ordered
        }


def _shifted(offsets: list[int], by: int) -> tuple[int, int]:
    begin, end = offsets
    return begin + by, end + by
