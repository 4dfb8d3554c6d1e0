"""Tiny checkpoints on disk, whole and broken, for the tests of the engine and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS = 4


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A small encoder: embeddings, a stack of layers, a scalar, an integer buffer, no element."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    made = {
        "embeddings.word.weight": normal(11, 8),
        "embeddings.position_ids": torch.arange(16)[None],
        "logit_scale": normal(),
        "unused.bias": normal(0),
        "head.weight": normal(3, 8),
    }
    for i in range(LAYERS):
        made[f"encoder.layer.{i}.dense.weight"] = normal(8, 9)
        made[f"encoder.layer.{i}.dense.bias"] = normal(8)
    return made


def write_file(path: Path, content: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(dict(content), path, {"format": "pt"})
    else:
        torch.save(dict(content), path)
    return path


def write_folder(
    folder: Path, content: Mapping[str, Tensor], *, shards: int = 1, suffix: str = ".safetensors"
) -> Path:
    """A model folder as Hugging Face writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(f'{{"from": "{folder.name}"}}')
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    if shards == 1:
        write_file(folder / f"{stem}{suffix}", content)
        return folder
    where = {}
    for i in range(shards):
        part = dict(list(content.items())[i::shards])
        name = f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}"
        write_file(folder / name, part)
        where.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All weights of an output folder by its index, as `safetensors` reads them."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    where: dict[str, str] = json.loads(index.read_text())["weight_map"]
    content: dict[str, Tensor] = {}
    for file in dict.fromkeys(where.values()):
        content.update(load_file(folder / file))
    assert set(content) == set(where)
    return content


def linear(*paths: Path, weights: tuple[float, ...] | None = None, **more: Any) -> dict[str, Any]:
    """A configuration of the method that is simplest to reason about."""
    values = weights or (1.0,) * len(paths)
    models = [
        {"model": str(p), "parameters": {"weight": w}} for p, w in zip(paths, values, strict=True)
    ]
    return {"merge_method": "linear", "models": models, **more}


def ties(base: Path, *paths: Path, method: str = "ties", **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(p), "parameters": {"weight": 1.0}} for p in paths],
        "parameters": parameters,
    }


def raw_safetensors(header: Any, data: bytes = b"", *, pad: int = 0, length: int | None = None):
    """The bytes of a safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def python(code: str, *arguments: object, timeout: float = 60, **environment: str):
    """Another Python process: its result with text output."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
    )


def can_go_on(parent: Path, out: str) -> bool:
    """The output is not there, but what a later run goes on with."""
    return not (parent / out).exists() and (parent / f".{out}.mergekern" / "out").is_dir()


def nothing_left(parent: Path, out: str) -> bool:
    """Neither the output nor a staging folder of it is there."""
    return not [p for p in parent.iterdir() if p.name == out or p.name.startswith(f".{out}.")]
