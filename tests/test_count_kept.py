"""count_kept: exact counts of what a rule keeps, and of places where kept signs conflict."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergekern as mk
from mergekern import Band, Bernoulli, Mask, Threshold, reference
from mergekern.keep import NOTHING, Keep
from mergekern.ops.merge_deltas import Counts, count_kept

from cases import CATALOGUE, CHUNK, Case, values
from refusal import refused
from serving import affordable

OP = "merge_deltas"  # of which it is a part
NAN, INF = math.nan, math.inf


def expected(
    base: Tensor | None, xs: list[Tensor], keep: list[Keep], rounded: bool, first: int, last: int
) -> Counts:
    xs, base = [x.cpu() for x in xs], None if base is None else base.cpu()
    return Counts(*reference.count_kept(base, xs, keep, rounded, first, last))


def rules(xs: list[Tensor], base: Tensor | None, backend: str) -> list[Keep]:
    """Of every kind, in turn; ties are cut in the middle."""
    n = xs[0].numel()
    if not n:
        return [None] * len(xs)
    found: list[Keep] = []
    for i, x in enumerate(xs):
        ranks = max(1, n // 2), max(1, n // 5)
        low, high = (mk.kth_magnitude(x, k, base=base, backend=backend) for k in ranks)
        bits = np.packbits(np.random.default_rng(i).random(n) < 0.6)
        mask = Mask(torch.from_numpy(bits).to(x.device))
        kinds = [low, Bernoulli(0.4, 5, "layer.weight", i), None, Band(low, high), mask, NOTHING]
        found.append(kinds[i % len(kinds)])
    return found


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("case", [c for c in CATALOGUE if math.prod(c.shape) < 5000], ids=str)
def test_catalogue(case: Case, rounded: bool, backend: str, device: str) -> None:
    xs, n = case.tensors(device), math.prod(case.shape)
    for base in (None, case.tensors(device, seed=3)[0]):
        keep = rules(xs, base, backend)
        for first, last in {(0, n), (n // 3, n - n // 4), (n, n)}:
            got = count_kept(
                base, xs, keep, rounded=rounded, first=first, last=last, backend=backend
            )
            assert got == expected(base, xs, keep, rounded, first, last)


def test_known_answers(backend: str, device: str) -> None:
    def of(*xs: list[float], keep: Any = None) -> Counts:
        return count_kept(None, [torch.tensor(x, device=device) for x in xs], keep, backend=backend)

    assert of([1.0, -1.0, 0.0], [-1.0, -1.0, 1.0]) == ([3, 3], 1)
    assert of([0.0, -0.0, NAN, INF], [-1.0, 1.0, 1.0, -INF]) == ([4, 4], 1)  # zero, NaN: no sign
    assert of([1.0, 1.0], [NAN, -1.0], [-1.0, NAN]) == ([2, 2, 2], 2)  # a NaN hides no conflict
    assert of([1.0], [-1.0], keep=[None, NOTHING]) == ([1, 0], 0)
    tie = Threshold(2.0, 0, 4, 2)  # the first two of four equal ones
    assert of([2.0] * 4, [-1.0] * 4, keep=[tie, None]) == ([2, 4], 2)
    assert of([], []) == ([0, 0], 0)


@pytest.mark.parametrize("n", [1, 8, 17])
def test_many_models_over_chunks(n: int, backend: str, device: str) -> None:
    """Against torch on the whole: more elements than a chunk, a range across its border."""
    total = affordable(backend, CHUNK + 1031)
    border = total - 1031
    base = values((total,), torch.bfloat16).to(device)
    xs = [values((total,), torch.bfloat16, seed=1 + i).to(device) for i in range(n)]
    ranks = [total // (2 + i) for i in range(n)]
    keep = [
        mk.kth_magnitude(x, k, base=base, backend=backend) for x, k in zip(xs, ranks, strict=True)
    ]
    assert count_kept(base, xs, keep, backend=backend).kept == ranks
    d = torch.stack([x.float() - base.float() for x in xs]).cpu()
    index = torch.arange(total)
    kept = torch.stack(
        [
            (v.abs() > t.value) | ((v.abs() == t.value) & (index < t.cut))
            for v, t in zip(d, keep, strict=True)
        ]
    )
    both = ((d > 0) & kept).any(0) & ((d < 0) & kept).any(0)
    for first, last in ((0, total), (border - 7, border + 9), (5, 6)):
        got = count_kept(base, xs, keep, first=first, last=last, backend=backend)
        assert got.kept == kept[:, first:last].sum(1).tolist()
        assert got.conflicts == int(both[first:last].sum())


@pytest.mark.parametrize("threads", ["1", "3"])
def test_threads_change_nothing(threads: str, cpu_backend: Any, monkeypatch: Any) -> None:
    xs = [values((10_000,), torch.float32, seed=i) for i in range(3)]
    keep = rules(xs, None, "cpu")
    whole = count_kept(None, xs, keep, backend="cpu")
    monkeypatch.setenv("MERGEKERN_THREADS", threads)
    monkeypatch.setattr(cpu_backend, "CHUNK", 1000)
    assert count_kept(None, xs, keep, backend="cpu") == whole


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_property_ranges_add_up(data: st.DataObject) -> None:
    number = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, INF, -INF, NAN])
    n, count = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 4))
    xs = [torch.tensor([data.draw(number) for _ in range(n)]) for _ in range(count)]
    at = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    keep = rules(xs, None, "torch")
    whole = count_kept(None, xs, keep)
    assert whole == expected(None, xs, keep, False, 0, n)
    parts = [
        count_kept(None, xs, keep, first=a, last=b) for a, b in zip([0, *at], [*at, n], strict=True)
    ]
    assert whole.conflicts == sum(p.conflicts for p in parts)
    assert whole.kept == [sum(each) for each in zip(*(p.kept for p in parts), strict=True)]


def test_refusals() -> None:
    x = torch.ones(4)
    for first, last in ((-1, 2), (3, 2), (0, 5)):
        with refused("count_kept", "range leaves the tensor", f"{first} to {last}"):
            count_kept(None, [x], first=first, last=last)
    with refused("count_kept", "keep has the wrong length"):
        count_kept(None, [x], [None, None])
    with refused("count_kept", "base differs from xs[0] in dtype"):
        count_kept(x.double(), [x])
    with refused("count_kept", "mask does not fit"):
        count_kept(None, [x], [Mask(torch.zeros(2, dtype=torch.uint8))])
