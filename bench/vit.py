"""The tensors of a ViT-B/16, and the feature space on each axis of every one of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Weight(NamedTuple):
    """A tensor's shape, its spaces of output and of input features, and their axes."""

    shape: tuple[int, ...]
    rows: str | None
    cols: str | None = None
    axes: tuple[int, int] = (0, 1)


def weights(small: bool) -> tuple[dict[str, Weight], dict[str, int]]:
    """(tensors by name, sizes of spaces): 86 M parameters, or a few thousand."""
    d, f, layers, tokens = (16, 32, 1, 5) if small else (768, 3072, 12, 197)
    sizes = {"stream": d}
    found = {
        "class": Weight((1, 1, d), "stream", axes=(2, 0)),
        "positions": Weight((1, tokens, d), "stream", axes=(2, 0)),
        "patches": Weight((d, 3, 16, 16), "stream"),
        "patches.bias": Weight((d,), "stream"),
        "norm": Weight((d,), "stream"),
        "norm.bias": Weight((d,), "stream"),
        "head": Weight((10 if small else 1000, d), None, "stream"),
        "head.bias": Weight((10 if small else 1000,), None),
    }
    for i in range(layers):
        sizes |= {f"{i}.keys": d, f"{i}.values": d, f"{i}.hidden": f}
        for name, rows, cols in (
            ("query", f"{i}.keys", "stream"),
            ("key", f"{i}.keys", "stream"),
            ("value", f"{i}.values", "stream"),
            ("output", "stream", f"{i}.values"),
            ("fc1", f"{i}.hidden", "stream"),
            ("fc2", "stream", f"{i}.hidden"),
        ):
            found[f"{i}.{name}"] = Weight((sizes[rows], sizes[cols]), rows, cols)
            found[f"{i}.{name}.bias"] = Weight((sizes[rows],), rows)
        for name in ("norm1", "norm1.bias", "norm2", "norm2.bias"):
            found[f"{i}.{name}"] = Weight((d,), "stream")
    return found, sizes


def permutations(sizes: dict[str, int]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {space: torch.randperm(size, generator=g) for space, size in sizes.items()}


def tensors(of: dict[str, Weight], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=g).to(dtype) for name, w in of.items()}


def index_of(weight: Weight, by_space: dict[str, Any]) -> dict[int, Any]:
    """What `by_space` has for the space of every axis."""
    pairs = zip(weight.axes, (weight.rows, weight.cols))
    return {axis: by_space[space] for axis, space in pairs if space is not None}
