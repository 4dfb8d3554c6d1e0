"""merge_deltas: what TIES, elections and rescaling do, case by case."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import mergekern as mk
from mergekern import Bernoulli
from mergekern.check import name_of

import cases
from accuracy import assert_bits_equal
from cases import CHUNK, values

OP = "merge_deltas"
NAN, INF = math.nan, math.inf


# ---- TIES ------------------------------------------------------------------------------------


@pytest.mark.parametrize("based", [True, False], ids=["base", "deltas"])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_a_threshold_keeps_exactly_k_the_lowest_index_first(
    dtype: torch.dtype, kind: str, based: bool, backend: str, device: str
) -> None:
    x = values((1031,), dtype, kind).to(device)
    base = torch.full_like(x, 0.125) if based else None
    delta = x.double().cpu() if base is None else (x.double() - 0.125).cpu()
    # By value first, by index among equals; a zero among the kept cannot be seen in the sum.
    order = torch.sort(delta.abs(), descending=True, stable=True).indices
    present = int((delta != 0).sum())
    for k in (1, 100, 700, 1031):
        kth = mk.kth_magnitude(x, k, base=base, backend=backend)
        got = mk.merge_deltas(
            base, [x], [1.0], keep=[kth], out_dtype=torch.float64, backend=backend
        )
        kept = (got.cpu() - (0.125 if based else 0)) != 0
        assert int(kept.sum()) == min(k, present)
        expected = torch.zeros(1031, dtype=torch.bool)
        expected[order[: min(k, present)]] = True
        assert torch.equal(kept, expected)


def test_the_worked_example_of_ties(backend: str, device: str) -> None:
    """Trim to two of four, elect signs by the summed mass, average those that agree."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0], device=device)
    tasks = ([4.0, -1.0, 0.5, -3.0], [-2.0, 0.1, 5.0, -1.0], [2.0, 3.0, -1.0, 0.0])
    xs = [base + torch.tensor(t, device=device) for t in tasks]
    keep = [mk.kth_magnitude(x, 2, base=base, backend=backend) for x in xs]
    got = mk.merge_deltas(
        base, xs, [1, 1, 1], keep=keep, elect="sum", normalize=True, backend=backend
    )
    assert got.tolist() == [4.0, 4.0, 6.0, -2.0]


# ---- elections -------------------------------------------------------------------------------

# (elect, normalize, deltas of the models at one element, weights, result)
ELECTIONS = {
    "sum, a tie is positive": ("sum", False, [1.0, -1.0], [1, 1], 1.0),
    "sum, the heavier side": ("sum", False, [1.0, 1.0, -3.0], [1, 1, 1], -3.0),
    "sum, weights count": ("sum", False, [1.0, -3.0], [4, 1], 4.0),
    "sum, zeros are not counted": ("sum", True, [6.0, 0.0, -0.0], [1, 1, 1], 6.0),
    "sum, agreeing weights": ("sum", True, [6.0, 2.0, -1.0], [3, 1, 5], 5.0),
    "sum, negative weight": ("sum", False, [1.0, 1.0], [-3, 1], -3.0),
    "sum, negative weight agrees": ("sum", True, [2.0, 1.0], [-3, 1], 2.0),
    "sum, agreeing weights of 0": ("sum", True, [2.0, -2.0], [1, -1], 4.0),
    "sum, only zeros": ("sum", True, [0.0, -0.0], [1, 1], 0.0),
    "count, a tie is positive": ("count", False, [1.0, -9.0], [1, 1], 1.0),
    "count, more heads": ("count", False, [1.0, 1.0, -9.0], [1, 1, 1], 2.0),
    "count, zeros abstain": ("count", False, [0.0, 0.0, -9.0], [1, 1, 1], -9.0),
    "count, agreeing weights": ("count", True, [1.0, 5.0, -9.0], [1, 3, 1], 4.0),
    "none": (None, False, [1.0, -3.0], [2, 1], -1.0),
    "none, total": (None, True, [1.0, -3.0, 0.0], [2, 1, 5], -0.125),
    "none, total of 0": (None, True, [4.0, 1.0], [1, -1], 3.0),
    "none, total near 0": (None, True, [4.0, 0.0], [1, -1 + 2.0**-30], 4.0),
    "none, total of 1e-7": (None, True, [2.0, 2.0], [1, -1 + 2.0**-23], 2.0),
    # NaN in a kept delta gives NaN
    "NaN alone": (None, False, [NAN, 1.0], [1, 1], NAN),
    "NaN by sum": ("sum", True, [NAN, 1.0], [1, 1], NAN),
    "NaN by count": ("count", True, [NAN, 1.0], [1, 1], NAN),
    "NaN by count, negative": ("count", False, [NAN, -1.0, -1.0], [1, 1, 1], NAN),
    "NaN with weight 0": ("sum", False, [NAN, 1.0], [0, 1], NAN),
    # infinities
    "inf": (None, False, [INF, 1.0], [1, 1], INF),
    "both infinities": (None, False, [INF, -INF], [1, 1], NAN),
    "both by sum": ("sum", False, [INF, -INF], [1, 1], NAN),
    "both by sum, normalized": ("sum", True, [INF, -INF, 1.0], [1, 1, 1], NAN),
    "both by count": ("count", False, [INF, -INF], [1, 1], INF),
    "both by count, negative": ("count", False, [INF, -INF, -1.0], [1, 1, 1], -INF),
    "inf by sum": ("sum", False, [INF, -5.0], [1, 1], INF),
    "inf outvoted": ("count", False, [INF, -5.0, -1.0], [1, 1, 1], -6.0),
    "inf with weight 0": ("sum", False, [INF, 1.0], [0, 1], NAN),
}


@pytest.mark.parametrize("based", [True, False], ids=["base", "deltas"])
@pytest.mark.parametrize("what", ELECTIONS)
def test_elections(what: str, based: bool, backend: str, device: str) -> None:
    elect, normalize, deltas, weights, result = ELECTIONS[what]
    for dtype in (torch.float32, torch.float64):
        # Five elements in a row, so that vector and tail code both see it.
        xs = [torch.full((37,), v, dtype=dtype, device=device) for v in deltas]
        base = torch.zeros(37, dtype=dtype, device=device) if based else None
        got = mk.merge_deltas(base, xs, weights, elect=elect, normalize=normalize, backend=backend)
        assert_bits_equal(got, torch.full((37,), result, dtype=dtype))


def test_what_is_not_kept_is_plus_0_even_if_nan(backend: str, device: str) -> None:
    base = torch.tensor([1.0, -2.0], device=device)
    x = torch.tensor([NAN, INF], device=device)
    got = mk.merge_deltas(base, [x], [1.0], keep=[Bernoulli(0.0)], backend=backend)
    assert_bits_equal(got, base.cpu())


def test_equal_models_give_the_base_back(backend: str, device: str) -> None:
    base = values((1031,), torch.bfloat16).to(device)
    got = mk.merge_deltas(base, [base, base], [1, 1], elect="sum", normalize=True, backend=backend)
    assert_bits_equal(got, base.cpu())


# ---- rescaling -------------------------------------------------------------------------------


def test_l1_keeps_the_sum_of_magnitudes(backend: str, device: str) -> None:
    x = torch.tensor([8.0, -4.0, 2.0, 2.0], device=device)
    keep = [mk.kth_magnitude(x, 2, backend=backend)]
    got = mk.merge_deltas(None, [x], [1.0], keep=keep, rescale="l1", backend=backend)
    factor = float(np.float32(16 / 12))
    assert_bits_equal(got, torch.tensor([8.0, -4.0, 0.0, 0.0]) * factor)


@pytest.mark.parametrize("scale", [1e-8, 0.0], ids=["tiny norm", "zero norm"])
def test_l1_of_almost_nothing_does_not_rescale(scale: float, backend: str, device: str) -> None:
    x = torch.tensor([2.0, 1.0], device=device) * scale
    keep = [mk.kth_magnitude(x, 1, backend=backend)]
    got = mk.merge_deltas(None, [x], [1.0], keep=keep, rescale="l1", backend=backend)
    assert_bits_equal(got, torch.tensor([2.0, 0.0]) * scale)


def test_l1_where_nothing_is_kept(backend: str, device: str) -> None:
    x = torch.ones(5, device=device)
    got = mk.merge_deltas(None, [x], [1.0], keep=[Bernoulli(0)], rescale="l1", backend=backend)
    assert_bits_equal(got, torch.zeros(5))


def test_density_divides_by_the_probability_that_is_used(backend: str, device: str) -> None:
    """0.3 is rounded to a multiple of 2**-16, and so is what a kept element is divided by."""
    x = torch.ones(1000, dtype=torch.float64, device=device)
    rule = Bernoulli(0.3)
    got = mk.merge_deltas(None, [x], [1.0], keep=[rule], rescale="density", backend=backend)
    assert set(got.tolist()) == {0.0, 65536 / rule.limit}
    got = mk.merge_deltas(None, [x], [1.0], keep=[None], rescale="density", backend=backend)
    assert set(got.tolist()) == {1.0}


def test_l1_norms_across_chunks(backend: str, device: str) -> None:
    """An l1 factor of a long tensor, exact because the values are."""
    x = values((2 * CHUNK + 17,), torch.float32, "ties").to(device)
    kth = mk.kth_magnitude(x, x.numel() // 5, backend=backend)
    got = mk.merge_deltas(None, [x], [1.0], keep=[kth], rescale="l1", backend=backend)
    size = x.cpu().double().abs()
    index = torch.arange(x.numel())
    kept = (size > kth.value) | ((size == kth.value) & (index < kth.cut))
    factor = float(np.float32(float(size.sum()) / float(size[kept].sum())))
    assert_bits_equal(got, torch.where(kept, x.cpu(), 0) * factor)
