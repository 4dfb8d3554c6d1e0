"""Against peft.utils.merge_utils, where both mean the same, and a case where they do not.

peft elects signs among the trimmed task vectors as they are, then applies the weights, and divides
by the number of agreeing models. Here (as in mergekit) the weights come first, so that they vote,
and the divisor is the sum of the agreeing weights. With weights of 1 the two are one method:
`test_ties_with_unequal_weights_is_another_method` shows that with others they are not.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import mergekern as mk

from accuracy import assert_bytes_equal, assert_within
from required import peer

peft = peer("peft.utils.merge_utils", "peft")

SHAPE = (48, 131)
NUMEL = math.prod(SHAPE)
U = 2.0**-24
DENSITIES = (0.1, 0.5, 0.9)
ELECTIONS = {"sum": "total", "count": "frequency"}


def task_vectors(n: int, density: float) -> list[Tensor]:
    """float32; the last magnitude that a trim keeps differs from the first that it drops."""
    xs = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    k = int(density * NUMEL)
    for x in xs:
        size = x.abs().flatten().sort(descending=True).values
        assert k == NUMEL or size[k - 1] > size[k]
    return xs


def trims(xs: list[Tensor], density: float) -> list[mk.Threshold]:
    return [mk.kth_magnitude(x, int(density * NUMEL)) for x in xs]


def trimmed(xs: list[Tensor], density: float) -> Tensor:
    """[N, ...] in float64: exactly int(density * numel) of each, the largest."""
    kept = []
    for x in xs:
        threshold = x.abs().flatten().sort(descending=True).values[int(density * NUMEL) - 1]
        kept.append(torch.where(x.abs() >= threshold, x.double(), 0))
    return torch.stack(kept)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("elect", ELECTIONS)
def test_ties_with_weights_of_one(n: int, density: float, elect: str) -> None:
    """Both within the rounding of n - 1 additions and a division of the float64 result.

    Left out are votes by sum within that rounding of 0; votes by count are exact.
    """
    xs = task_vectors(n, density)
    ones = torch.ones(n)
    other = peft.ties(xs, ones, density, majority_sign_method=ELECTIONS[elect])
    keep = trims(xs, density)
    mine = mk.merge_deltas(None, xs, [1.0] * n, keep=keep, elect=elect, normalize=True)

    kept = trimmed(xs, density)
    vote = (kept if elect == "sum" else kept.sign()).sum(0)
    agree = kept.sign() == torch.where(vote >= 0, 1.0, -1.0)
    count = agree.sum(0).clamp(min=1)
    exact = (kept * agree).sum(0) / count
    clear = torch.ones(SHAPE, dtype=torch.bool)
    if elect == "sum":
        clear = (vote.abs() > n * U * kept.abs().sum(0)) | (kept == 0).all(0)
    assert int((~clear).sum()) <= NUMEL // 1000

    bound = (n + 1) * U / (1 - (n + 1) * U) * (kept.abs() * agree).sum(0) / count
    assert_within(mine[clear], exact[clear], bound[clear])
    assert_within(other[clear], exact[clear], bound[clear])
    assert_within(mine[clear], other[clear].double(), 2 * bound[clear])
    errors = [float((x.double() - exact)[clear].abs().max()) for x in (mine, other)]
    print(
        f"max error {errors[0]:.3e} (peft {errors[1]:.3e}), "
        f"{int((mine != other).sum())} of {NUMEL} differ in bits, {int((~clear).sum())} in doubt"
    )
    assert errors[0] <= errors[1]


def test_ties_with_unequal_weights_is_another_method() -> None:
    """One element, task vectors 1 and -2, weights 3 and 1.

    Here the weighted deltas 3 and -2 elect +, and 3 over its weight 3 gives 1. peft elects - by
    1 - 2, and -2 times its weight 1 over one model gives -2.
    """
    xs = [torch.tensor([1.0]), torch.tensor([-2.0])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that a density of 1 prunes nothing
        other = peft.ties(xs, torch.tensor([3.0, 1.0]), 1.0)
    mine = mk.merge_deltas(None, xs, [3.0, 1.0], elect="sum", normalize=True)
    assert_bytes_equal(other, torch.tensor([-2.0]))
    assert_bytes_equal(mine, torch.tensor([1.0]))


@pytest.mark.parametrize("density", DENSITIES)
def test_magnitude_prune(density: float) -> None:
    """Without an election the weights mean the same: sum_i w_i trimmed_i, within n + 1 roundings.

    (Two for the weight and its product, n - 1 for the sum.)
    """
    weights = [0.6, -0.3, 1.7]
    xs = task_vectors(3, density)
    other = peft.magnitude_prune(xs, torch.tensor(weights), density)
    mine = mk.merge_deltas(None, xs, weights, keep=trims(xs, density))
    terms = trimmed(xs, density) * torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    bound = 4 * U / (1 - 4 * U) * terms.abs().sum(0)
    assert_within(mine, terms.sum(0), bound)
    assert_within(other, terms.sum(0), bound)
    assert torch.equal(mine == 0, (terms == 0).all(0))


@pytest.mark.parametrize("density", DENSITIES)
def test_trims_keep_the_same_elements(density: float) -> None:
    """Bits: what is kept is untouched, what is dropped is 0, and exactly as many are kept."""
    (x,) = task_vectors(1, density)
    mine = mk.merge_deltas(None, [x], [1.0], keep=trims([x], density))
    other = peft.prune(x, density, method="magnitude")
    assert torch.equal(mine, other)  # peft leaves -0 where it drops a negative number
    assert int((mine != 0).sum()) == int(density * NUMEL)
