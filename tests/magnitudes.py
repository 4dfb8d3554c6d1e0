"""What kth_magnitude must find: an oracle by a stable sort, and data that mislead a sample."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from mergekern import Threshold
from mergekern.check import accumulator

import cases

SMALL = 1 << 15  # cpu._SMALL: up to here the C++ backend gathers all keys


def magnitudes(x: Tensor, base: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(is NaN, |x - base| with NaN as infinity), flat, float64."""
    x = x.cpu()
    acc = accumulator(x.dtype)
    d = x.double() if base is None else (x.to(acc) - base.cpu().to(acc)).double()
    flat = d.reshape(-1).numpy()
    nan = np.isnan(flat)
    return nan, np.where(nan, np.inf, np.abs(flat))


class Brute:
    """All ranks of |x - base| by one stable sort: NaN first, then by size, then by index."""

    def __init__(self, x: Tensor, base: Tensor | None = None) -> None:
        self.nan, self.size = magnitudes(x, base)
        self.order = np.lexsort((np.arange(self.size.size), -self.size, ~self.nan))

    def threshold(self, k: int) -> Threshold:
        last = self.order[k - 1]
        if self.nan[last]:
            larger, ties = np.zeros_like(self.nan), self.nan
        else:
            larger = self.nan | (self.size > self.size[last])
            ties = ~self.nan & (self.size == self.size[last])
        value = math.nan if self.nan[last] else float(self.size[last])
        above = int(larger.sum())
        places = np.flatnonzero(ties)
        return Threshold(value, above, len(places), int(places[k - above - 1]) + 1)

    def kept(self, k: int) -> np.ndarray:
        return np.sort(self.order[:k])

    def survivors(self, threshold: Threshold) -> np.ndarray:
        """The flat indices that the documentation of Threshold says are kept."""
        index = np.arange(self.size.size)
        if threshold.value != threshold.value:
            return index[self.nan & (index < threshold.cut)]
        larger = self.nan | (self.size > threshold.value)
        equal = ~self.nan & (self.size == threshold.value)
        return index[larger | (equal & (index < threshold.cut))]

    def check(self, got: Threshold, k: int) -> None:
        expected = self.threshold(k)
        assert isinstance(got, Threshold)
        assert repr(got[:3]) == repr(expected[:3])  # NaN is NaN, and the value is never -0
        assert got.above < k <= got.above + got.equal
        np.testing.assert_array_equal(self.survivors(got), self.kept(k))
        if got.equal > k - got.above:  # some ties are left out, so only one cut is right
            assert got.cut == expected.cut
        else:
            assert expected.cut <= got.cut <= self.size.size


def assert_exact(got: Threshold, x: Tensor, k: int, base: Tensor | None = None) -> None:
    Brute(x, base).check(got, k)


def ranks(numel: int) -> list[int]:
    """First, last and a trim's usual fifth, without repetition."""
    return sorted({1, max(1, numel // 5), numel})


SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, -math.nan]
ELEMENT = st.one_of(st.sampled_from(SPECIAL), st.floats(width=16), st.floats(width=32))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int]:
    dtype = draw(st.sampled_from(cases.DTYPES))
    xs = draw(st.lists(ELEMENT, min_size=1, max_size=40))
    x = torch.tensor(xs, dtype=torch.float64).to(dtype)
    base = None
    if draw(st.booleans()):
        ys = draw(st.lists(ELEMENT, min_size=len(xs), max_size=len(xs)))
        base = torch.tensor(ys, dtype=torch.float64).to(dtype)
    return x, base, draw(st.integers(1, len(xs)))


def _hard() -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    n = 130_003
    i = np.arange(n)
    for period in (16, 1000, 4096):
        yield f"period {period}", (i % period).astype(np.float64)
    yield "sorted", i / n
    yield "reversed", i[::-1] / n
    yield "constant blocks", (i // 5000).astype(np.float64)
    yield "large end", np.where(i < n - 600, rng.standard_normal(n), 1e6 + i)
    yield "equal but few", np.where(i % 50_000 == 7, 1.0 + i, 0.5)
    yield "one outlier", np.where(i == 12_345, 1e30, 1e-3)
    yield "two values", np.where(rng.random(n) < 0.2, 1.0, -2.0)
    yield "zero but few", np.where(rng.random(n) < 1e-4, rng.standard_normal(n), 0.0)
    yield "many ties of many values", np.repeat(rng.standard_normal(n // 10 + 1), 10)[:n]
    yield "many decades", np.exp(rng.uniform(-80, 80, n))
    yield "many NaN", np.where(rng.random(n) < 0.3, np.nan, rng.standard_normal(n))


HARD = dict(_hard())
