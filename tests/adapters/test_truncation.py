"""best_of_rank against the truncated SVD in float64, within the bound of its docstring."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekern.adapters import truncation
from mergekern.adapters.truncation import best_of_rank

from accuracy import assert_bits_equal, assert_within

U64 = 2.0**-53


def spectrum(rows: int, cols: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float32 matrix of about these singular values."""
    g = torch.Generator().manual_seed(seed)
    n = len(values)
    u, v = (
        torch.linalg.qr(torch.randn(k, n, generator=g, dtype=torch.float64)).Q for k in (rows, cols)
    )
    return ((u * values) @ v.T).float()


def trimmed(rows: int, cols: int, rank: int = 4) -> Tensor:
    """As TIES leaves it: products of which the small elements are gone, signal over noise."""
    g = torch.Generator().manual_seed(rows)
    x = sum(
        torch.randn(rows, rank, generator=g) @ torch.randn(rank, cols, generator=g)
        for _ in range(3)
    )
    return torch.where(x.abs() > x.abs().median(), x, 0)


def blocks() -> Tensor:
    """Two parts that no product mixes; the second one holds the largest singular values."""
    x = torch.zeros(300, 200)
    x[:200, :150] = trimmed(200, 150)
    x[200:, 150:] = 10 * trimmed(100, 50)
    return x


LARGE, BULK = torch.tensor([1e4, 2.0, 1.5, 1.2]).double(), torch.linspace(1, 0.9, 90).double()
FALLING = 0.8 ** torch.arange(120, dtype=torch.float64)
CASES: dict[str, tuple[Callable[[], Tensor], int, bool]] = {  # made by, rank, by Lanczos
    "tall": (lambda: trimmed(512, 256), 4, True),
    "wide": (lambda: trimmed(256, 512), 4, True),
    "square": (lambda: trimmed(300, 300), 6, True),
    "rank 1": (lambda: trimmed(512, 256), 1, True),
    "strided": (lambda: trimmed(256, 1024)[:, ::2], 4, True),
    "falling": (lambda: spectrum(300, 240, FALLING), 8, True),
    "far apart": (lambda: spectrum(300, 240, torch.tensor([1e6, 1e3, 1, 1e-3]).double()), 2, True),
    "above a bulk": (lambda: spectrum(300, 240, torch.cat([LARGE, BULK])), 4, True),
    "close": (lambda: spectrum(300, 240, 1 - 0.003 * torch.arange(100).double()), 5, True),
    "noise": (lambda: torch.randn(240, 240, generator=torch.Generator().manual_seed(3)), 14, False),
    "blocks": (blocks, 4, True),
    "many": (lambda: trimmed(300, 240), 40, False),
    "small": (lambda: trimmed(20, 27), 3, False),
    "one column": (lambda: trimmed(20, 1), 1, False),
    "float64": (lambda: trimmed(300, 240).double(), 4, False),
}


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the search found what was asked for, of each call."""
    found: list[bool] = []
    search = truncation._block_lanczos

    def spy(x: Tensor, rank: int) -> Tensor | None:
        rows = search(x, rank)
        found.append(rows is not None)
        return rows

    monkeypatch.setattr(truncation, "_block_lanczos", spy)
    return found


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_truncated_svd(case: str, searched: list[bool]) -> None:
    made, rank, by_search = CASES[case]
    x = made()
    b, a, lost = best_of_rank(x, rank)
    assert any(searched) is by_search
    assert b.dtype == a.dtype == torch.float64
    assert b.shape == (x.shape[0], rank)
    assert a.shape == (rank, x.shape[1])
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
    after = float(s[rank]) if rank < len(s) else 0.0
    apart, rounding = float(s[rank - 1]) - after, 32 * sum(x.shape) * U64 * float(s[0])
    off = rank**0.5 * 2.0**-26 * float(s[0] * s[rank - 1]) / apart
    rounding *= 1 + float(s[0]) / apart
    assert_within(b @ a, expected, torch.tensor(off * by_search + rounding, dtype=torch.float64))
    eye = torch.eye(rank, dtype=torch.float64)
    assert_within(a @ a.T, eye, torch.full_like(eye, 64 * sum(x.shape) * U64))
    assert_within(
        torch.linalg.vector_norm(b, dim=0), s[:rank], torch.full_like(s[:rank], off + rounding)
    )
    share = float(torch.linalg.vector_norm(s[rank:]) / torch.linalg.vector_norm(s))
    assert abs(lost - share) <= 1e-7


@pytest.mark.parametrize("rank", [3, 10])
def test_what_has_a_lower_rank_comes_back_whole(rank: int, searched: list[bool]) -> None:
    x = spectrum(300, 240, torch.tensor([5.0, 2.0, 1.0]).double())
    exact = x.double()
    b, a, _ = best_of_rank(x, rank)
    assert searched == [True]
    assert_within(b @ a, exact, torch.full_like(exact, 2.0**-20))  # x is rounded: not of rank 3
    assert b.shape[1] == rank
    eye = torch.eye(rank, dtype=torch.float64)
    assert_within(a @ a.T, eye, torch.full_like(eye, 1e-10))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 150),
    cols=st.integers(1, 150),
    rank=st.integers(1, 9),
    levels=st.lists(st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0, 3.0]), min_size=1, max_size=6),
    seed=st.integers(0, 9),
)
def test_nothing_of_that_rank_is_nearer(
    rows: int, cols: int, rank: int, levels: list[float], seed: int
) -> None:
    """Whatever the singular values are, repeated, far apart or 0: |x - b a|_F is the least.

    A vector is that of an eigenvalue of x^T x no farther off than its residual, or of others that
    are as near: rounding x spreads equal ones by some units of float32, which count four times.
    """
    n = min(rows, cols)
    x = spectrum(rows, cols, torch.tensor((levels * n)[:n]).double(), seed)
    b, a, _ = best_of_rank(x, rank)
    s = torch.linalg.svdvals(x.double())
    left, least = (float(t.square().sum()) for t in (x.double() - b @ a, s[rank:]))
    first, last = float(s[0]), float(s[min(rank, n) - 1])
    residuals = 4 * rank * 2.0**-24 * first * max(last, 2.0**-16 * first)
    assert left <= least + residuals + 64 * n * U64 * first**2


def test_whole_numbers_of_a_lower_rank(searched: list[bool]) -> None:
    """Of which the last singular values are exactly 0: the search still ends."""
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randint(-3, 4, (n, 2), generator=g).float() for n in (300, 240))
    b, a, lost = best_of_rank(u @ v.T, 4)
    assert searched == [True]
    exact = (u @ v.T).double()
    assert_within(b @ a, exact, torch.full_like(exact, 1e-12))
    assert lost <= 1e-7


def test_zeros() -> None:
    b, a, lost = best_of_rank(torch.zeros(128, 64), 2)
    assert_bits_equal((b @ a).abs(), torch.zeros(128, 64, dtype=torch.float64))
    assert lost == 0
    assert bool(a.isfinite().all())


def test_a_rank_above_the_shorter_side_is_that_side() -> None:
    x = trimmed(20, 6)
    b, a, lost = best_of_rank(x, 9)
    assert (b.shape, a.shape) == ((20, 6), (6, 6))
    assert_within(b @ a, x.double(), torch.full((20, 6), 1e-12, dtype=torch.float64))
    assert lost <= 1e-7


def test_torch_s_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    first = best_of_rank(trimmed(512, 256), 4)
    assert_bits_equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    for one, other in zip(first[:2], best_of_rank(trimmed(512, 256), 4)[:2], strict=True):
        assert_bits_equal(one, other)
