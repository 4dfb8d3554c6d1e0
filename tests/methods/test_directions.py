"""Task vectors and their sums in float64, as the spectral methods take them."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mergekern import check
from mergekern.methods.directions import Matrices

from accuracy import assert_bits_equal, assert_within


def spread(dtype: torch.dtype, n: int = 5) -> tuple[Tensor, list[Tensor]]:
    """From elements a few units apart to such as are 1e-30 and 1e30."""
    g = torch.Generator().manual_seed(3)
    base = torch.randn(40, 24, generator=g).to(dtype)
    size = 10.0 ** torch.linspace(-8, 0, 24)
    xs = [(base.double() + size * torch.randn(40, 24, generator=g)).to(dtype) for _ in range(n)]
    if dtype != torch.float16:
        for row in range(20):
            xs[row % n][row] *= 1e30
            xs[(row + 1) % n][row] *= 1e-30
    return base, xs


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("n", [1, 5])
def test_the_sum_is_right_to_the_longest_task_vector(
    n: int, dtype: torch.dtype, weight: float
) -> None:
    """Against fractions; what is given is read only."""
    base, xs = spread(dtype, n)
    before = [x.clone() for x in (base, *xs)]
    got = Matrices("op", "w", xs, base, [weight] * n, None).total()
    exact = torch.tensor(
        [
            float(sum(Fraction(weight) * (Fraction(x) - Fraction(b)) for x in others))
            for b, *others in zip(*(x.flatten().tolist() for x in (base, *xs)), strict=True)
        ],
        dtype=torch.float64,
    ).view(base.shape)
    longest = torch.stack([(x.double() - base.double()).abs() for x in xs]).amax(0)
    assert_within(got, exact, (2 * n + 1) * 2.0**-52 * weight * longest)
    for x, y in zip((base, *xs), before, strict=True):
        assert_bits_equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_task_vectors_are_rounded_once(dtype: torch.dtype) -> None:
    base, xs = spread(dtype)
    for strided in (False, True):
        given = [x.T if strided else x for x in (base, *xs)]
        for x, vector in zip(xs, Matrices("op", "w", given[1:], given[0], [1.0] * 5, None)):
            assert_bits_equal(vector.T if strided else vector, x.double() - base.double())


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_what_is_finite(special: float) -> None:
    huge = torch.full((3, 3), 1e308, dtype=torch.float64)
    assert check.is_finite(huge)  # though their sum is not
    assert check.is_finite(torch.zeros(0))
    for other in (0.0, -special):
        x = torch.tensor([1.0, special, other])
        assert not check.is_finite(x)
