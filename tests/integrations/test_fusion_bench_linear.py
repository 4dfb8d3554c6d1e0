"""linear against FusionBench: the bits of its averages on request, else never less accurate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mergekern as mk
from mergekern import reference
from mergekern.check import name_of

import cases
from accuracy import assert_bits_equal
from cases import values
from required import peer

method = peer("fusion_bench.method", "fusion-bench")
modelpool = peer("fusion_bench.modelpool", "fusion-bench")

F64 = torch.float64
SHAPES = {
    "matrix": (64, 193),
    "depthwise": (257, 1, 3, 3),
    "one element": (1,),
    "scalar": (),
    "empty": (3, 0, 5),
    "chunks": (2, 131_075),
}
KINDS = ("normal", "ties", "zeros", "tiny", "subnormal", "huge", "mixed")
WEIGHTS = ([1.0, 1.0, 1.0], [0.3, 0.3, 0.3], [0.7, -0.4, 0.55], [0.3])


class Model(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())


def theirs(xs: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    pool = modelpool.BaseModelPool({f"model{i}": Model(x) for i, x in enumerate(xs)})
    if normalize and set(weights) == {1.0}:
        algorithm = method.SimpleAverageAlgorithm()
    else:
        algorithm = method.WeightedAverageAlgorithm(normalize, weights, verbose=False)
    return algorithm.run(pool).x.detach()


def inputs() -> list[tuple[str, str]]:
    return [("matrix", kind) for kind in KINDS] + [(s, "normal") for s in SHAPES if s != "matrix"]


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "plain"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize(("shape", "kind"), inputs())
def test_host_mode_has_the_bits(
    shape: str, kind: str, dtype: torch.dtype, weights: list[float], normalize: bool
) -> None:
    xs = [values(SHAPES[shape], dtype, kind, seed=i) for i in range(len(weights))]
    expected = theirs(xs, weights, normalize)
    got = mk.merge_tensors(xs, "linear", weight=weights, normalize=normalize, host="fusion_bench")
    assert_bits_equal(got, expected)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "plain"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES[:3], ids=name_of)
def test_by_default_never_less_accurate(
    dtype: torch.dtype, weights: list[float], normalize: bool
) -> None:
    """It rounds every product and sum to the dtype, so no slack is needed."""
    xs = [values(SHAPES["matrix"], dtype, seed=i) for i in range(len(weights))]
    exact = torch.empty(xs[0].shape, dtype=F64)
    reference.weighted_sum(exact, xs, weights, sum(weights) if normalize else 1.0)
    mine, other = (
        float((x.double() - exact).abs().max())
        for x in (
            mk.merge_tensors(xs, "linear", weight=weights, normalize=normalize),
            theirs(xs, weights, normalize),
        )
    )
    assert mine <= other
