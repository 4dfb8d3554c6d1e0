"""What a merge writes begins its way to the disk at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekern.engine.files import SafetensorsWriter
from mergekern.methods.compat import Signature

SIZE = (1 << 20) + 64


def written(path: Path) -> dict[str, torch.Tensor]:
    tensors = {
        "large": torch.arange(SIZE, dtype=torch.int64).to(torch.uint8),
        "small": torch.arange(5, dtype=torch.uint8),
    }
    signatures = {k: Signature(x.dtype, tuple(x.shape)) for k, x in tensors.items()}
    writer = SafetensorsWriter(path, signatures, {"format": "pt"})
    for name in ("small", "large"):
        writer.write(name, tensors[name])
    writer.sync()
    return tensors


def test_large_writes_are_on_their_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised = []

    def advise(fd: int, offset: int, size: int, advice: int) -> None:
        advised.append((os.fstat(fd).st_size - offset - size, size, advice))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    written(tmp_path / "x.safetensors")
    assert advised == [(5, SIZE, os.POSIX_FADV_DONTNEED)]  # five bytes follow in the file


def test_systems_without_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    tensors = written(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[k], x) for k, x in tensors.items())
