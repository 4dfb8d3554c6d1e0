"""The drop-in for KnOTS beside its own functions: masks and merges to the bit, SVDs in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.adapters import low_rank
from mergekern.adapters.low_rank import svd_above
from mergekern.integrations import knots as ours

from accuracy import assert_bits_equal, assert_within
from adapters import knots

Modules = dict[str, ModuleType]
F32, F64 = torch.float32, torch.float64


def rows(n: int, size: int, values: str, dtype: torch.dtype = F32) -> Tensor:
    g = torch.Generator().manual_seed(n * size)
    x = torch.randn(n, size, generator=g).to(dtype)
    if values == "ties":  # few magnitudes, many zeros, votes that cancel
        x = (2 * x).round() / 2
    elif values == "zeros":
        x *= torch.rand(n, size, generator=g) < 0.05
    elif values == "odd":
        flat = x.view(-1)
        for i, odd in enumerate([math.nan, math.inf, -math.inf, -0.0] * 2):
            flat[7 * i % len(flat)] = odd
    return x


@pytest.fixture
def modules() -> Iterator[Modules]:
    with knots.original() as found:
        yield found


def same(got: Any, expected: Any) -> None:
    got, expected = (list(x) if isinstance(x, tuple) else [x] for x in (got, expected))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert_bits_equal(a, b)


SHAPES = [(1, 1), (2, 1), (1, 7), (3, 1000), (8, 70001), (9, 32768), (5, 32769)]
VALUES = ["normal", "ties", "zeros", "odd"]


@knots.needed
@pytest.mark.parametrize("share", [0.001, 0.2, 0.999, 0, 1, 20, 99.9, 100, 150])
@pytest.mark.parametrize("values", VALUES)
def test_masks(modules: Modules, values: str, share: float) -> None:
    for n, size in SHAPES:
        x = rows(n, size, values)
        for given in (x, x[0]):
            expected = modules["masking_ops"].topk_values_mask(given.clone(), K=share)
            same(ours._masking_topk(given, K=share), expected)
            for asked in (True, False):
                host = modules["merging_functions"].topk_values_mask
                expected = host(given.clone(), K=share, return_mask=asked)
                same(ours.topk_values_mask(given, K=share, return_mask=asked), expected)


@knots.needed
@pytest.mark.parametrize("mode", ["sum_of_values", "sum_of_signs"])
@pytest.mark.parametrize("values", VALUES)
def test_ties_masks(modules: Modules, values: str, mode: str) -> None:
    for (n, size), share in zip(SHAPES * 2, [20, 0.3, 1, 0, 60, 99.9, 5] * 2, strict=True):
        x = [*rows(n, size, values)]
        expected = modules["masking_ops"].ties_masking(x, topK=share, sign_resolve_mode=mode)
        same(ours.ties_masking(x, topK=share, sign_resolve_mode=mode), expected)


@knots.needed
@pytest.mark.parametrize("weights", [None, [0.3, 7.0]], ids=str)
@pytest.mark.parametrize("merging", ["mean", "sum", "max", "unmerged"])
def test_merges(modules: Modules, merging: str, weights: list[float] | None) -> None:
    """Of the weights only the first one counts; it stays in what masked_merge was given."""
    for values in VALUES:
        for n, size in SHAPES:
            x = rows(n, size, values)
            host = modules["merging_functions"].ties_merging
            expected = host([*x], topK=20, merging_type=merging, weights=weights)
            got = ours.ties_merging([*x], topK=20, merging_type=merging, weights=weights)
            same(got, expected)
            theirs, mine = x.clone(), x.clone()
            expected = modules["masking_ops"].masked_merge(theirs, merging, weights=weights)
            same(ours.masked_merge(mine, merging, weights=weights), expected)
            same(mine, theirs)


@knots.needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64], ids=str)
def test_other_dtypes(modules: Modules, dtype: torch.dtype) -> None:
    x = rows(4, 33000, "normal", dtype)
    for merging in ("mean", "sum", "max"):
        expected = modules["merging_functions"].ties_merging([*x], 30, merging)
        same(ours.ties_merging([*x], 30, merging), expected)
        host = modules["masking_ops"].masked_merge(x.clone(), merging, weights=[0.5])
        same(ours.masked_merge(x.clone(), merging, weights=[0.5]), host)
    same(ours.ties_masking([*x], 30), modules["masking_ops"].ties_masking([*x], 30))


def test_unknown_types() -> None:
    for call in (ours.masked_merge, lambda x, kind: ours.ties_merging([*x], 20, kind)):
        with pytest.raises(ValueError, match="unknown merging type; got 'median'; expected mean"):
            call(torch.ones(2, 3), "median")
    with pytest.raises(ValueError, match="unknown mode; got 'both'"):
        ours.ties_masking([torch.ones(3)], sign_resolve_mode="both")


# ---- the decomposition -----------------------------------------------------------------------


def tasks(rank: int, scale: float, shape: tuple[int, int] = (192, 160), n: int = 4) -> Any:
    """Task vectors as KnOTS has them: float32 products of factors."""
    g = torch.Generator().manual_seed(rank)
    return [
        {
            "q": scale
            * torch.randn(shape[0], rank, generator=g)
            @ torch.randn(rank, shape[1], generator=g)
        }
        for _ in range(n)
    ]


@knots.needed
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("rank", [1, 8, 16, 100])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_apply_svd(modules: Modules, rank: int, scale: float, across: bool) -> None:
    """The same singular values and, up to signs of pairs, vectors; products to the rounding of
    float32. At scale 1 the rounding of the inputs passes the cut, and counts, as it does there."""
    given = tasks(rank, scale, (96, 80) if rank == 100 else (192, 160))
    expected = knots.svd_merger(modules).apply_svd(given, concat_across_output=across)
    got = ours.apply_svd(knots.svd_merger(modules), given, concat_across_output=across)
    (u, ones, parts, every), (hu, hones, hparts, hevery) = got, expected
    s, hs = every["q"]["s"], hevery["q"]["s"]
    assert s.shape == hs.shape
    assert_within(s, hs.double(), 2.0**-23 * hs.double() + 2.0**-50 * float(hs[0]))
    for i, task in enumerate(given):
        assert ones[i]["q"].tolist() == hones[i]["q"].tolist()
        exact = (task["q"] if across else task["q"].T).double()
        limit = torch.full_like(exact, 2.0**-20 * float(exact.abs().max()))
        assert_within(u["q"].double() @ parts[i]["q"].double(), exact, limit)
        assert parts[i]["q"].shape == hparts[i]["q"].shape
    for x, y in ((u["q"], hu["q"]), (every["q"]["V"].T, hevery["q"]["V"].T)):
        assert x.dtype == y.dtype == F32
        signs = (x * y).sum(0).sign()
        if hs.numel() == rank * len(given):  # others are noise, whose values lie close together
            assert_within(x * signs, y.double(), torch.tensor(2.0**-20, dtype=F64))


@knots.needed
@pytest.mark.parametrize("topk", [5, 20, 99.5])
def test_merges_by_its_own_steps(modules: Modules, topk: float) -> None:
    """Its steps on the functions of both: no element of a mask differs."""
    given = tasks(8, 1e-2)
    expected, mask = knots.merged_by(modules, given, topk, 0.6)
    with ours.accelerated():
        got, its_mask = knots.merged_by(modules, given, topk, 0.6)
    assert_bits_equal(its_mask, mask)
    limit = torch.full_like(expected["q"], 1e-5 * float(expected["q"].abs().max())).double()
    assert_within(got["q"], expected["q"].double(), limit)


@pytest.mark.parametrize(
    ("size", "rank", "sketched"),
    [((210, 400), 20, True), ((400, 210), 40, True), ((400, 90), 20, False), ((60, 70), 60, False)],
)
def test_svd_above(
    size: tuple[int, int], rank: int, sketched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's; clusters of equal singular values are compared by their products."""
    found = []
    by_sketches = low_rank._by_sketches

    def watched(*given: Any) -> Any:
        found.append(by_sketches(*given))
        return found[-1]

    monkeypatch.setattr(low_rank, "_by_sketches", watched)
    g = torch.Generator().manual_seed(rank)
    c = torch.randn(size[0], rank, generator=g, dtype=F64)
    c = (c @ torch.randn(rank, size[1], generator=g, dtype=F64)).float().double()
    u, s, vh = svd_above(c, 1e-3)
    assert [x is not None for x in found] == [sketched]
    assert s.numel() == rank
    whole = torch.linalg.svdvals(c)
    assert_within(s, whole[:rank], whole[:rank] * 2.0**-44)
    limit = torch.tensor(1e-3 + 2.0**-40, dtype=F64)  # what lies below the cut
    assert_within((u * s) @ vh, c, limit)
    eye = torch.eye(rank, dtype=F64)
    for q in (u.T @ u, vh @ vh.T):
        assert_within(q, eye, torch.tensor(2.0**-42, dtype=F64))


def test_svd_above_of_large_numbers() -> None:
    """Where |c|^2 - |b|^2 is rounding, and far above the cut, what is left is looked at."""
    g = torch.Generator().manual_seed(0)
    b, a = (1e4 * torch.randn(shape, generator=g, dtype=F64) for shape in ((210, 20), (20, 400)))
    found = low_rank._by_sketches(b @ a, 1e-3)
    assert found is not None
    assert int((found[1] > 1e-3).sum()) == 20


def spectrum(values: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [400, 500] of these singular values, and its left vectors."""
    g = torch.Generator().manual_seed(0)
    q, p = (
        torch.linalg.qr(torch.randn(n, len(values), generator=g, dtype=F64)).Q for n in (400, 500)
    )
    return (q * values) @ p.T, q


TAILS = {"many": torch.full((100,), 5e-7, dtype=F64), "one": torch.tensor([9e-6], dtype=F64)}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("last", [1.0001e-5, 1.05e-5, 1.2e-5, 1e-4, 1e-3])
def test_svd_above_where_a_sketch_is_too_narrow(last: float, tail: str) -> None:
    """64 values above the cut, and below it what a sketch of 64 columns does not tell from them."""
    above = torch.cat([torch.logspace(0, -2, 63, dtype=F64), torch.tensor([last], dtype=F64)])
    c, q = spectrum(torch.cat([above, TAILS[tail]]))
    u, s, _ = svd_above(c, 1e-5)
    assert_within(s, above, torch.tensor(2.0**-48, dtype=F64))
    turned = u * (u * q[:, :64]).sum(0).sign()
    assert_within(turned, q[:, :64], torch.tensor(2.0**-31, dtype=F64))


def test_svd_above_of_an_exact_rank() -> None:
    """Columns of a second sketch that are nothing but rounding are orthogonal all the same."""
    c, _ = spectrum(torch.logspace(0, -1, 70, dtype=F64))
    found = low_rank._by_sketches(c, 1e-5)
    assert found is not None
    for x in (found[0].T @ found[0], found[2] @ found[2].T):
        assert_within(x, torch.eye(128, dtype=F64), torch.tensor(2.0**-44, dtype=F64))


def test_svd_above_takes_no_vectors_that_are_not_near(monkeypatch: pytest.MonkeyPatch) -> None:
    c, _ = spectrum(torch.cat([torch.ones(20), torch.full((100,), 1e-7)]).double())
    assert low_rank._by_sketches(c, 1e-5) is not None
    monkeypatch.setattr(low_rank, "_STEPS", 0)
    assert low_rank._by_sketches(c, 1e-5) is None


def test_svd_above_counts_what_stands_at_the_cut() -> None:
    """Of singular values on both sides of the cut, and of many at once, none is lost or added."""
    g = torch.Generator().manual_seed(0)
    q, p = (torch.linalg.qr(torch.randn(n, 40, generator=g, dtype=F64)).Q for n in (150, 300))
    for values in (
        torch.logspace(2, -10, 40, dtype=F64),
        torch.cat([torch.full((20,), 1.0001e-5), torch.full((20,), 0.9999e-5)]).double(),
        torch.zeros(40, dtype=F64),
    ):
        u, s, vh = svd_above((q * values) @ p.T, 1e-5)
        assert s.numel() == int((values > 1e-5).sum())
        assert u.shape == (150, s.numel())
        assert vh.shape == (s.numel(), 300)
    assert svd_above(torch.zeros(0, 5), 1e-5)[0].shape == (0, 0)


# ---- in its place ----------------------------------------------------------------------------


@knots.needed
def test_it_can_be_taken_back(modules: Modules) -> None:
    merging, masking, merger = (
        modules[name] for name in ("merging_functions", "masking_ops", "task_merger")
    )
    names = [(merging, "topk_values_mask"), (merging, "ties_merging"), (merger, "masked_merge")]
    names += [(masking, n) for n in ("topk_values_mask", "ties_masking", "masked_merge")]
    names.append((merger.SVDMerger, "apply_svd"))
    before = [getattr(owner, name) for owner, name in names]
    ours.install()
    ours.install()
    during = [getattr(owner, name) for owner, name in names]
    assert not set(before) & set(during)
    assert all(f.__module__ == ours.__name__ for f in during)
    ours.uninstall()
    assert [getattr(owner, name) for owner, name in names] == before
    with pytest.raises(RuntimeError, match="stop"), ours.accelerated():
        raise RuntimeError("stop")
    assert [getattr(owner, name) for owner, name in names] == before


@knots.needed
def test_other_functions_are_refused(modules: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules["masking_ops"], "masked_merge", lambda vectors: vectors)
    before = modules["merging_functions"].ties_merging
    with pytest.raises(mk.BackendError, match=r"masking_ops.masked_merge is not what this drop-in"):
        ours.install()
    assert modules["merging_functions"].ties_merging is before


def test_without_a_checkout() -> None:
    with pytest.raises(mk.BackendError, match="knots: merging_functions does not import; got"):
        ours.install()
