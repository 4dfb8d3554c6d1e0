"""assign, assign_heads: optimal matchings, whatever the number of threads."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.check import name_of

import cases
from accuracy import assert_bits_equal
from refusal import refused


def scores(*shape: int, seed: int = 0, kind: str = "normal") -> Tensor:
    return cases.values(shape, torch.float32, kind, seed)


def total(score: Tensor, index: Tensor) -> float:
    assert sorted(set(index.tolist())) == sorted(index.tolist()), "a column is matched twice"
    return math.fsum(score.double()[torch.arange(len(index)), index].tolist())


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

    from mergekern.ops import assign

    both, solve = threading.Barrier(2, timeout=10), assign.linear_sum_assignment

    def waiting(*args: Any, **kwargs: Any) -> Any:
        both.wait()
        return solve(*args, **kwargs)

    monkeypatch.setattr(assign, "linear_sum_assignment", waiting)
    monkeypatch.setenv("MERGEKERN_THREADS", "2")
    assert [i.tolist() for i in mk.assign([torch.eye(3)] * 2)] == [[0, 1, 2]] * 2


def test_no_rows() -> None:
    assert_bits_equal(mk.assign(torch.zeros(0, 3)), torch.zeros(0, dtype=torch.int64))
    assert_bits_equal(mk.assign_heads(torch.zeros(0, 0), 3), torch.zeros(0, dtype=torch.int64))


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
