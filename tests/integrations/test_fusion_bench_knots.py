"""subspace_alignment in the place of FusionBench's function."""

from __future__ import annotations

import pytest
import torch

from mergekern.integrations import fusion_bench as dropin

from accuracy import assert_within
from required import peer

utils = peer("fusion_bench.method.knots.knots_utils", "fusion-bench")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rank", "shape"), [(4, (40, 60)), (4, (60, 40)), (24, (24, 30))])
def test_subspace_alignment(rank: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The same singular values and, of each task, the same task vector: signs go with pairs."""
    g = torch.Generator().manual_seed(0)
    out, into = shape
    deltas = [
        (torch.randn(out, rank, generator=g) @ torch.randn(rank, into, generator=g)).to(dtype)
        for _ in range(3)
    ]
    eps = 1e-4 if dtype != torch.bfloat16 else 2.0  # above what rounding to 8 bits has added
    u, s, vs = dropin.subspace_alignment(deltas, eps=eps)
    u2, s2, vs2 = utils.subspace_alignment(deltas, eps=eps)
    assert u.shape == u2.shape == (out, len(s))
    assert (u.dtype, s.dtype, vs[0].dtype) == (dtype, dtype, dtype)
    unit = 64 * torch.finfo(dtype).eps  # two SVDs of 60 columns, and roundings to the dtype
    assert_within(s, s2.double(), torch.tensor(unit * float(s2[0])).double())
    assert len(vs) == len(vs2) == 3
    for v, v2 in zip(vs, vs2, strict=True):
        got, expected = ((a * b) @ c for a, b, c in ((u, s, v), (u2, s2, v2)))
        size = float(s2[0]) * len(s) ** 0.5
        assert_within(got, expected.double(), torch.tensor(unit * size).double())


def test_nothing_above_the_cut() -> None:
    u, s, vs = dropin.subspace_alignment([torch.zeros(5, 3)] * 2)
    assert (u.shape, s.shape, [v.shape for v in vs]) == ((5, 0), (0,), [(0, 3)] * 2)
