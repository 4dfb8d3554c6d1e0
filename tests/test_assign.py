"""assign, assign_heads: optimal matchings, whatever the number of threads."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment as solver
from torch import Tensor

import mergekern as mk
from mergekern.check import name_of
from mergekern.ops import _prices
from mergekern.ops import assign as implementation

import cases
from accuracy import assert_bits_equal
from refusal import refused


def scores(*shape: int, seed: int = 0, kind: str = "normal") -> Tensor:
    return cases.values(shape, torch.float32, kind, seed)


def total(score: Tensor, index: Tensor) -> float:
    assert sorted(set(index.tolist())) == sorted(index.tolist()), "a column is matched twice"
    return math.fsum(score.double()[torch.arange(len(index)), index].tolist())


def best_total(score: Tensor) -> float:
    return total(score, torch.from_numpy(solver(score.double().numpy(), maximize=True)[1]))


def best(score: Tensor, maximize: bool) -> float:
    """Of all matchings."""
    n, m = score.shape
    totals = [total(score, torch.tensor(p)) for p in itertools.permutations(range(m), n)]
    return max(totals) if maximize else min(totals)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros"])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 5), (3, 6)])
def test_the_best_of_all_matchings(n: int, m: int, maximize: bool, kind: str) -> None:
    for seed in range(5):
        x = scores(n, m, seed=seed, kind=kind)
        index = mk.assign(x, maximize=maximize)
        assert isinstance(index, Tensor)
        assert index.dtype == torch.int64
        assert total(x, index) == best(x, maximize)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "odd"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str) -> None:
    x = scores(6, 6).to(dtype)
    assert_bits_equal(mk.assign(cases.LAYOUTS[layout](x)), mk.assign(x.double()))


def test_float64_scores_are_compared_as_such() -> None:
    x = torch.tensor([[1, 1], [1, 1 + 2.0**-40]], dtype=torch.float64)
    assert mk.assign(x).tolist() == [0, 1]
    assert mk.assign(x.flip(1)).tolist() == [1, 0]


@pytest.mark.parametrize("workers", [None, 1, 2, 7])
def test_many_are_each_alone(workers: int | None) -> None:
    xs = [scores(n, n + n % 3, seed=n) for n in range(20)]
    got = mk.assign(xs, workers=workers)
    assert isinstance(got, list)
    for x, index in zip(xs, got, strict=True):
        assert_bits_equal(index, mk.assign(x))
    batch = scores(5, 8, 9)
    for x, index in zip(batch, mk.assign(batch, workers=workers), strict=True):
        assert_bits_equal(index, mk.assign(x))
    assert mk.assign([]) == []
    assert mk.assign(batch[:0]) == []


def test_workers_work_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two solvers wait for each other."""
    import threading

    both, solve = threading.Barrier(2, timeout=10), implementation.linear_sum_assignment

    def waiting(*args: Any, **kwargs: Any) -> Any:
        both.wait()
        return solve(*args, **kwargs)

    monkeypatch.setattr(implementation, "linear_sum_assignment", waiting)
    monkeypatch.setenv("MERGEKERN_THREADS", "2")
    assert [i.tolist() for i in mk.assign([torch.eye(3)] * 2)] == [[0, 1, 2]] * 2


def test_no_rows() -> None:
    assert_bits_equal(mk.assign(torch.zeros(0, 3)), torch.zeros(0, dtype=torch.int64))
    assert_bits_equal(mk.assign_heads(torch.zeros(0, 0), 3), torch.zeros(0, dtype=torch.int64))


# ---- large matrices: the search starts from prices ----------------------------------------------

CROWDED = {
    "normal": lambda x: x,
    "wide": lambda x: x * x.abs() ** 7,  # over many orders of magnitude
    "few columns": lambda x: x + 6 * x[0],
    "scaled columns": lambda x: x * (2 * x[0]).exp(),
    "scaled rows": lambda x: x * (2 * x[:, :1]).exp(),
    "ranks": lambda x: x[:, :1] * x[0],
    "ties": lambda x: x.round(),
    "copies": lambda x: x[torch.arange(len(x)) // 3],
    "equal": torch.zeros_like,
    "huge": lambda x: x / x.abs().max() * 3e38,
    "tiny": lambda x: x * 1e-43,
}


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of the matrices that got prices, which those of 32 rows get then."""
    calls: list[int] = []

    def spy(score: Tensor, maximize: bool) -> np.ndarray:
        calls.append(len(score))
        return _prices.priced(score, maximize)

    monkeypatch.setattr(implementation, "_GLANCE", 32)
    monkeypatch.setattr(implementation, "_LARGE", 32)
    monkeypatch.setattr(implementation, "priced", spy)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("kind", CROWDED)
def test_prices_leave_the_optimum(
    kind: str, maximize: bool, dtype: torch.dtype, priced: list[int]
) -> None:
    for n, seed in itertools.product((32, 33, 80), range(3)):
        x = CROWDED[kind](scores(n, n, seed=seed)).to(dtype)
        priced.clear()
        index = mk.assign(x, maximize=maximize)
        assert isinstance(index, Tensor)
        assert priced == [n]
        want = torch.from_numpy(solver(x.double().numpy(), maximize=maximize)[1])
        assert total(x, index) == total(x, want)
        if kind == "normal" and dtype == torch.float32:  # one optimum alone
            assert_bits_equal(index, want)


def test_prices_where_they_are_met() -> None:
    x = scores(1024, 1024)
    got = mk.assign(x)
    assert isinstance(got, Tensor)
    assert_bits_equal(got, torch.from_numpy(solver(x.double().numpy(), maximize=True)[1]))


@pytest.mark.parametrize("maximize", [True, False])
def test_costs_are_exact(maximize: bool) -> None:
    """The cost and the score of a row make the price of the column, the same in each row."""
    x = scores(200, 200)
    sign = 1 if maximize else -1
    prices = torch.from_numpy(_prices.priced(x, maximize)) + sign * x.double()
    assert_bits_equal(prices, prices[:1].expand_as(prices).clone())
    assert prices[0].unique().numel() > 100


@pytest.mark.parametrize("maximize", [True, False])
def test_an_auction_ends_a_step_from_the_optimum(
    maximize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Duality: sum_i max_j (s_ij - p_j) + sum_j p_j is the best total, or up to n steps more."""
    monkeypatch.setattr(_prices, "_ROUNDS", 10**6)
    n = _prices._CANDIDATES  # all columns are candidates
    for seed in range(5):
        x = scores(n, n, seed=seed).double()
        given = x.float() if maximize else -x.float()
        cost = torch.from_numpy(_prices.priced(given, maximize))
        price = (cost + x)[0]
        dual = math.fsum([*(-cost.amin(1)).tolist(), *price.tolist()])
        spread = float((x.amax(1) - x.amin(1)).mean())
        unit = 2.0 ** math.frexp(spread)[1]
        rounding = 8 * 2.0**-24 * (float(x.abs().max()) + float(price.max()))
        excess = dual - best_total(x)
        assert -n * rounding <= excess <= n * (_prices._STEPS[-1] * unit + rounding)


def test_no_prices_where_rows_want_few_columns() -> None:
    """Candidates say nothing about the columns that most rows have to take."""
    x = scores(200, 200) + 1000 * (torch.arange(200) < 40)
    assert_bits_equal(torch.from_numpy(_prices.priced(x, True)), -x.double())


def test_favourites_are_the_matching_if_no_two_are_the_same(
    priced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(implementation, "linear_sum_assignment")
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    x = torch.eye(50)[order]
    for rows in (50, 40):
        assert_bits_equal(mk.assign(x[:rows]), order[:rows])
        assert_bits_equal(mk.assign(-x[:rows], maximize=False), order[:rows])
    assert priced == []


def test_who_goes_without_prices(priced: list[int]) -> None:
    crowded = scores(40, 40)
    mk.assign([crowded[:31, :31], crowded[:39], crowded.double()])
    assert priced == []
    tied = crowded.double().round()
    assert_bits_equal(mk.assign(tied), torch.from_numpy(solver(tied.numpy(), maximize=True)[1]))
    nearly = torch.eye(40)
    nearly[0, 0], nearly[0, 1] = 0, 0.5
    assert_bits_equal(mk.assign(nearly), mk.assign(nearly.double()))
    assert priced == []


# ---- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize(("heads", "size"), [(1, 4), (4, 1), (3, 2), (2, 3)])
def test_the_best_matching_that_keeps_heads(heads: int, size: int, maximize: bool) -> None:
    for seed in range(3):
        x = scores(heads * size, heads * size, seed=seed)
        index = mk.assign_heads(x, heads, maximize=maximize)
        assert isinstance(index, Tensor)
        allowed = [
            torch.tensor([q * size + i for q, inner in zip(outer, inners) for i in inner])
            for outer in itertools.permutations(range(heads))
            for inners in itertools.product(itertools.permutations(range(size)), repeat=heads)
        ]
        totals = [total(x, p) for p in allowed]
        want = max(totals) if maximize else min(totals)
        assert abs(total(x, index) - want) <= 4 * heads * math.ulp(x.abs().sum().item())
        assert any(torch.equal(index, p) for p in allowed)


@pytest.mark.parametrize("workers", [1, 3])
def test_heads_of_many(workers: int) -> None:
    xs = [scores(h * 3, h * 3, seed=h) for h in (4, 8)]
    got = mk.assign_heads(xs, 4, workers=workers)
    for x, index in zip(xs, got, strict=True):
        assert_bits_equal(index, mk.assign_heads(x, 4))


def test_a_shuffled_copy_is_found() -> None:
    g = torch.Generator().manual_seed(0)
    heads, size = 6, 8
    f = torch.randn(heads * size, 40, generator=g)
    outer = torch.randperm(heads, generator=g)
    want = torch.cat([q * size + torch.randperm(size, generator=g) for q in outer.tolist()])
    got = mk.assign_heads(f @ f[want].T, heads)
    assert isinstance(got, Tensor)
    assert_bits_equal(want[got], torch.arange(heads * size))


# ---- the door ------------------------------------------------------------------------------------

X = torch.eye(4)
NAN = torch.tensor([[0, float("nan")], [0, 1]])
REFUSALS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "rows": (torch.zeros(3, 2), {}, "score has more rows than columns; got [3, 2]"),
    "rows in a list": ([X, torch.zeros(3, 2)], {}, "score[1] has more rows than columns"),
    "a vector": (X[0], {}, "score is no matrix; got [4]"),
    "nan": (NAN, {}, "score[0, 1] is not finite; got nan"),
    "infinity": ([X, 1 / NAN[:, :1].T], {}, "score[1][0, 0] is not finite; got inf"),
    "integers": (X.int(), {}, "int32"),
    "workers": (X, {"workers": 0}, "workers is no number of threads; got 0"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    x, kwargs, words = REFUSALS[what]
    with refused("assign", words):
        mk.assign(x, **kwargs)


@pytest.mark.parametrize(
    ("x", "heads", "words"),
    [
        (X, 3, "score does not divide into heads; got [4, 4]; expected [d, d] with d a multiple"),
        (X[:2], 2, "score does not divide into heads; got [2, 4]"),
        (X, 0, "heads is no number of heads; got 0"),
        (X, 2.0, "heads is no number of heads; got 2.0"),
        (NAN, 1, "score[0, 1] is not finite"),
    ],
)
def test_refusals_of_heads(x: Tensor, heads: Any, words: str) -> None:
    with refused("assign_heads", words):
        mk.assign_heads(x, heads)
