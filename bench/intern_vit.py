"""Checkpoints of InternViT-6B's shape: its names and sizes, as many of its 48 layers as asked for.

Weights are noise of a usual size, experts are the base and smaller noise. Written once and kept,
shard by shard, so that no more than two shards are in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, HIDDEN, PATCH, IMAGE = 3200, 12800, 14, 448
EXPERTS = ("a", "b", "c")
SHARD = 1 << 30  # bytes
Shape = tuple[int, ...]


def shapes(layers: int, width: int = WIDTH, hidden: int = HIDDEN) -> dict[str, Shape]:
    """Norms are RMSNorm, queries and keys have their own, and qkv has no bias."""
    found: dict[str, Shape] = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.position_embedding": (1, (IMAGE // PATCH) ** 2 + 1, width),
        "embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": (width,),
    }
    for i in range(layers):
        layer = {
            "ls1": (width,),
            "ls2": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.q_norm.weight": (width,),
            "attn.k_norm.weight": (width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "mlp.fc1.weight": (hidden, width),
            "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (width, hidden),
            "mlp.fc2.bias": (width,),
            "norm1.weight": (width,),
            "norm2.weight": (width,),
        }
        found.update({f"encoder.layers.{i}.{name}": shape for name, shape in layer.items()})
    return found


def write(folder: Path, layers: int) -> Path:
    """A base and three experts in bfloat16, sharded; those of an earlier run are taken as is."""
    done = folder / f"intern_vit_{layers}"
    if not done.exists():
        making = folder / f"{done.name}.part"
        shards = list(_shards(shapes(layers)))
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(making, name, shard, number)
        for model in ("base", *EXPERTS):
            _write_rest(making / model, shards)
        making.rename(done)
    return done


def _shards(all_of_them: dict[str, Shape]) -> Iterator[dict[str, Shape]]:
    shard: dict[str, Shape] = {}
    size = 0
    for name, shape in all_of_them.items():
        if size + 2 * math.prod(shape) > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += 2 * math.prod(shape)
    yield shard


def _write_shard(folder: Path, file: str, shard: dict[str, Shape], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def noise(shape: Shape, size: float) -> Tensor:
        return torch.randn(shape, generator=g).mul_(size)

    base = {name: noise(shape, 0.02).bfloat16() for name, shape in shard.items()}
    for model in ("base", *EXPERTS):
        (folder / model).mkdir(parents=True, exist_ok=True)
        tensors = base
        if model != "base":
            tensors = {k: (noise(x.shape, 1e-3) + x).bfloat16() for k, x in base.items()}
        save_file(tensors, folder / model / file, {"format": "pt"})


def _write_rest(folder: Path, shards: list[dict[str, Shape]]) -> None:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(2 * math.prod(shape) for shard in shards for shape in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {"model_type": "intern_vit_6b", "hidden_size": WIDTH, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
