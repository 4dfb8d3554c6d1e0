"""Small models whose tensors have many slices, and merges of them by methods of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.faults import Job
from engine.models import linear, ties, write_folder

SHARD = 9000  # bytes of an output file
MEMORY = "64KiB"  # so that larger tensors are measured and merged slice by slice


def tensors(seed: int, size: int = 1) -> dict[str, Tensor]:
    """Of a few slices, of one, of a part of one, of no element; and a buffer that is copied."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    made = {
        "embed.weight": normal(120 * size, 50, dtype=torch.bfloat16),
        "embed.position_ids": torch.arange(2100 * size)[None],
        "scale": normal(),
        "unused": normal(0, 3),
        "head.weight": normal(10, 100),
    }
    for i in range(6):
        made[f"layers.{i}.weight"] = normal(37 * size, 41, dtype=torch.float16)
        made[f"layers.{i}.bias"] = normal(37)
    return made


def write_models(folder: Path, size: int = 1) -> list[Path]:
    """A base in shards, a model in one file, a model of pickles, and files that are carried."""
    base = write_folder(folder / "base", tensors(0, size), shards=2)
    (base / "vocab.txt").write_text("a\nb\n")
    (base / "processor").mkdir()
    (base / "processor" / "preprocessor_config.json").write_text("{}")
    a = write_folder(folder / "a", tensors(1, size))
    return [base, a, write_folder(folder / "b", tensors(2, size), shards=2, suffix=".bin")]


def configs(models: list[Path]) -> dict[str, dict[str, Any]]:
    """Methods that go over the data once, that measure each tensor before, or the whole model."""
    plain = {"models": [{"model": str(path)} for path in models]}
    return {
        "linear": linear(*models),
        "ties": ties(*models, density=0.3),
        "dare_ties": ties(*models, method="dare_ties", density=0.6),
        "della": ties(*models, method="della", density=0.6, epsilon=0.2),
        "dare_ties of mergekit": ties(*models, method="dare_ties", density=0.6),
        "karcher": {**plain, "merge_method": "karcher"},
        "ties_global": ties(*models, method="ties_global", density=0.3),
    }


METHODS = (
    *("linear", "ties", "dare_ties", "dare_ties of mergekit", "della", "karcher", "ties_global"),
)


def job(models: list[Path], out: Path, method: str = "ties", **options: Any) -> Job:
    host = "mergekit" if method.endswith("mergekit") else None
    settings = {"shard_size": SHARD, "memory": MEMORY, "host": host, **options}
    return Job(configs(models)[method], out, options=settings)
