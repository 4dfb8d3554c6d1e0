"""Random masks as host tools draw them from torch's generator on a CPU, and norms as they sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..keep import Keep, Mask
from ..ops.merge_deltas import merge_deltas
from .bits import Packer

_CHUNK = 1 << 20  # elements; torch draws the same numbers however the tensor is divided


def _working(dtype: torch.dtype) -> torch.dtype:
    """The type in which mergekit holds probabilities on a CPU."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def _packed(parts: Iterator[Tensor], total: int) -> Mask:
    packer = Packer(total, torch.device("cpu"))
    for part in parts:
        packer.add(part.bool().view(-1))
    return packer.mask()


def bernoulli(x: Tensor, density: float) -> Mask:
    """The mask of `torch.bernoulli(torch.full_like(x, density))`, one draw of torch's generator
    per element in order: mergekit `sparsify.bernoulli`, PEFT `random_pruning`."""
    _on_cpu(x)
    p = torch.tensor(density, dtype=_working(x.dtype))
    starts = range(0, x.numel(), _CHUNK)
    parts = (
        torch.empty(min(_CHUNK, x.numel() - at), dtype=torch.uint8).bernoulli_(p) for at in starts
    )
    return _packed(parts, x.numel())


def magprune(x: Tensor, base: Tensor, density: float, epsilon: float) -> Mask:
    """The mask of mergekit's `della_magprune`, whose ranks and probabilities are held in the
    dtype of the tensor; equal magnitudes rank as torch.argsort leaves them there too."""
    _on_cpu(x)
    work = _working(x.dtype)
    if x.ndim < 2:
        x, base = x.reshape(1, -1), base.reshape(1, -1)
    length = x.shape[1]
    if length == 1:  # 0 / 0 there, which torch.bernoulli refuses
        return bernoulli(x, density)
    step = max(8, _CHUNK // max(1, x[:1].numel()) // 8 * 8)

    def parts() -> Iterator[Tensor]:
        for at in range(0, x.shape[0], step):
            d = x[at : at + step] - base[at : at + step]
            ranks = d.abs().argsort(dim=1).argsort(dim=1).to(work) + 1
            last = ranks.new_tensor(length - 1) + 1
            share = ((ranks - 1) / (last - 1)).clamp(0, 1)
            yield torch.bernoulli((density - epsilon) + share * 2 * epsilon).to(torch.uint8)

    return _packed(parts(), x.numel())


def l1_factor(x: Tensor, base: Tensor, keep: Keep) -> float:
    """What restores the L1 norm of x - base in mergekit: not finite where the norm is not.

    Both norms are torch's own sums in the type that mergekit masks in, whose order is that of
    torch; x - base is held once for it.
    """
    if keep is None:
        return 1.0
    d = x - base
    if isinstance(keep, Mask):
        d = d.to(_working(d.dtype))
    everything = d.abs_().sum()
    kept = merge_deltas(None, [d], [1.0], keep=[keep], rounding="host", out=d).sum()
    if everything < 1e-7 or kept < 1e-7:
        return 1.0
    return float(everything / kept)


def _on_cpu(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ArgumentError.of(
            "host", "random masks are reproduced on a CPU only", x.device, "CPU tensors or no host"
        )
