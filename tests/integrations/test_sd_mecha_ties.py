"""ties with host="sd_mecha" against sd-mecha's ties_sum, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import mergekern as mk

from accuracy import assert_bits_equal

mecha = pytest.importorskip(
    "sd_mecha.extensions.builtin.merge_methods.ties",
    reason="sd-mecha: not installed, and in no extra: pip install sd-mecha==1.1.8 beside torch",
)

SHAPES = {
    "random": (40, 131),
    "quantised": (40, 31),
    "zeros": (20, 31),
    "one": (1,),
    "scalar": (),
    "depthwise": (37, 1, 3, 3),
    "empty": (0, 7),
}


def task_vectors(kind: str, n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    xs = [torch.randn(SHAPES[kind], generator=g) for _ in range(n)]
    if kind == "quantised":  # ties at the cut, and tied votes
        return [(2 * x).round() / 8 for x in xs]
    if kind == "zeros":
        return [torch.where(torch.rand(x.shape, generator=g) < 0.7, 0.0, x) for x in xs]
    return xs


@pytest.mark.parametrize("kind", SHAPES)
def test_bits(kind: str) -> None:
    for n, k in itertools.product(range(1, 5), (0.0, 0.2, 0.5, 0.999, 1.0)):
        xs = task_vectors(kind, n)
        base = torch.zeros(SHAPES[kind])
        merged = mk.merge_tensors(xs, "ties", base=base, weight=1, density=k, host="sd_mecha")
        assert_bits_equal(merged, base + mecha.ties_sum.__wrapped__(*xs, k=k))
