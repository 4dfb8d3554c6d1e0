"""Random adapters, and the dense formulas they are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekern.adapters.adapter import Adapter, Factors

SHAPES: dict[str, tuple[int, tuple[int, ...]]] = {  # rows, the other axes
    "blocks.0.q": (48, (40,)),
    "blocks.0.fc": (33, (48,)),
    "stem": (20, (3, 5, 5)),
}


def factors(
    rows: int,
    shape: Sequence[int],
    rank: int,
    seed: int,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Factors:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, torch.Size(shape).numel(), generator=g).to(dtype)
    b = torch.randn(rows, rank, generator=g).to(dtype)
    return Factors(a, b, scale, tuple(shape))


def adapter(
    seed: int, rank: int = 4, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Adapter:
    return Adapter(
        {
            name: factors(rows, shape, rank, 100 * seed + i, scale, dtype)
            for i, (name, (rows, shape)) in enumerate(SHAPES.items())
        },
        config={"base_model_name_or_path": "base", "target_modules": [*SHAPES]},
    )


def dense(f: Factors) -> Tensor:
    """The task vector as a matrix of rows, in float64."""
    return f.scale * (f.b.double() @ f.a.double())


def knots_ties(
    adapters: Sequence[Adapter], density: float, scale: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """(u, merged) of each module by the paper's formulas, with a dense SVD in float64.

    Of each adapter the `density` largest parts of all modules are kept; signs are elected by sums;
    those that agree are averaged.
    """
    bases, parts = {}, {}
    for name, (_, shape) in SHAPES.items():
        matrices = [dense(a.modules[name]) for a in adapters]
        u, s, vh = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
        kept = s > 1e-5
        bases[name] = u[:, kept]
        weighted = (s[kept, None] * vh[kept]).float()
        parts[name] = torch.stack(torch.split(weighted, torch.Size(shape).numel(), 1))
    flat = torch.cat([x.flatten(1) for x in parts.values()], 1)
    k = int(flat.shape[1] * density)
    least = flat.abs().sort(1, descending=True).values[:, k - 1, None]
    merged = {}
    for name, x in parts.items():
        kept_x = torch.where(x.abs() >= least[..., None], x, 0).double()
        sign = kept_x.sum(0).sign()
        agreeing = torch.where(kept_x.sign() == sign, kept_x, 0)
        count = (agreeing != 0).sum(0).clamp(min=1)
        merged[name] = bases[name], scale * agreeing.sum(0) / count
    return merged
