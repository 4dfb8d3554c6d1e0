"""kth_magnitude: a driver over the selection kernels of csrc/kth_magnitude.cpp."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import digits
from ...check import accumulator
from ...keep import NOTHING
from . import runtime

_cpu = runtime._cpu

_SMALL = 1 << 15  # up to here all keys are gathered and partitioned
_RUN = 16  # elements of one sampled run: a cache line or two
_RUNS = 1 << 13  # at most

Found = tuple[float, int, int, int]  # value, above, equal, one past the index of the last kept tie


class Source(NamedTuple):
    """What is ranked, as the kernels take it."""

    keys: object  # _cpu.KeySource
    total: int
    acc: torch.dtype

    @property
    def dtype(self) -> type:
        return np.uint64 if self.acc == torch.float64 else np.uint32


def _source(x: Tensor, base: Tensor | None, rounded: bool) -> Source:
    keys = _cpu.KeySource(xs=[runtime.view(x)], base=runtime.optional_view(base), rounded=rounded)
    return Source(keys, x.numel(), accumulator(x.dtype))


def kth_magnitude(
    xs: list[Tensor], base: Tensor | None, ranks: list[list[int]], rounded: bool = False
) -> list[list[Found]]:
    """Per x and rank: value, count above, count equal, one past the index of the last kept tie."""
    sources = [_source(x, base, rounded) for x in xs]
    if xs[0].numel() <= _SMALL:
        gathered = [_keys(s) for s in sources]
        return [
            [_among(keys, k, s.acc) for k in ks]
            for s, keys, ks in zip(sources, gathered, ranks, strict=True)
        ]
    if base is None and xs[0].element_size() == 2:
        return [_by_patterns(x, s, ks) for x, s, ks in zip(xs, sources, ranks, strict=True)]
    brackets = [
        (i, *_bracket_of(sample, k / s.total))
        for i, (s, ks) in enumerate(zip(sources, ranks, strict=True))
        for sample in [_sample(s)]
        for k in ks
    ]
    counted = iter(_count(sources, brackets))
    return [[_exact(s, k, next(counted)) for k in ks] for s, ks in zip(sources, ranks, strict=True)]


def select_share(source: Source, share: float) -> Found:
    """The same for k = int(share * number of keys that are not 0); keeps nothing where k is 0."""
    total, acc = source.total, source.acc
    if total <= _SMALL:
        gathered = _keys(source)
        k = int(np.count_nonzero(gathered) * share)
        return _among(gathered, k, acc) if k else NOTHING
    sample = _sample(source)
    nonzero = np.count_nonzero(sample) / len(sample)
    bracket = _bracket_of(sample, share * nonzero, spread=2)
    zeros, counted = _count([source], [(0, 0, 0), (0, *bracket)])
    k = int((total - int(zeros.counts[:, 1].sum())) * share)
    return _exact(source, k, counted) if k else NOTHING


def digit_histogram(
    xs: list[Tensor], base: Tensor | None, prefix: int, shift: int, rounded: bool
) -> np.ndarray:
    """Counts of the 16-bit digit at `shift` of the keys that equal `prefix` above it."""
    return histogram(_source(xs[0], base, rounded), prefix, shift)


def place_of_tie(
    xs: list[Tensor], base: Tensor | None, value: float, rank: int, rounded: bool
) -> tuple[int, int]:
    """How many magnitudes equal `value`, and the index of the rank-th (from 1) of them or -1."""
    return place(_source(xs[0], base, rounded), value, rank)


def place(source: Source, value: float, rank: int) -> tuple[int, int]:
    """The same of any keys."""
    key = digits.value_key(value, source.acc)
    counts = _count([source], [(0, key, key)])[0].counts[:, 1]
    ties = int(counts.sum())
    return ties, _cut(source, key, counts, rank) - 1 if ties >= rank else -1


# ---- all keys at hand ------------------------------------------------------------------------


def _keys(source: Source) -> np.ndarray:
    keys: np.ndarray = np.empty(source.total, source.dtype)
    _cpu.magnitude_keys(source=source.keys, out=keys.ctypes.data, begin=0, end=source.total)
    return keys


def _among(keys: np.ndarray, k: int, acc: torch.dtype) -> Found:
    key = int(np.partition(keys, len(keys) - k)[len(keys) - k])
    ties = np.flatnonzero(keys == key)
    above = int((keys > key).sum())
    return digits.key_value(key, acc), above, len(ties), int(ties[k - above - 1]) + 1


# ---- a sample, and one pass that counts ------------------------------------------------------


class _Counted(NamedTuple):
    """One bracket after the pass, a row per chunk: above, at high, inside, at low; keys inside."""

    low: int
    high: int
    counts: np.ndarray
    kept: list[np.ndarray]  # shorter than the count where there was no room


def _sample(source: Source) -> np.ndarray:
    """Sorted keys of short runs from all over the tensor."""
    runs = min(_RUNS, max(1 << 10, source.total // (1 << 11)))
    sample: np.ndarray = np.empty(runs * _RUN, source.dtype)

    def draw(begin: int, end: int) -> None:
        _cpu.sample_keys(
            source=source.keys,
            total=source.total,
            runs=runs,
            run=_RUN,
            out=sample.ctypes.data,
            begin=begin,
            end=end,
        )

    runtime.chunks(draw, runs, 1 << 10)
    sample.sort()
    return sample


def _bracket_of(sample: np.ndarray, share: float, spread: float = 1) -> tuple[int, int]:
    """Two keys that enclose the one above which that share lies, with near certainty.

    Five standard deviations of the rank to each side if the sample were independent.
    """
    n, quantile = len(sample), 1 - min(share, 1.0)
    margin = spread * 5 * (n * quantile * (1 - quantile)) ** 0.5 + 8
    first = max(0, int(quantile * n - margin))
    last = min(n - 1, int(quantile * n + margin))
    return int(sample[first]), int(sample[last])


def _count(sources: list[Source], brackets: list[tuple[int, int, int]]) -> list[_Counted]:
    """One pass over all sources against brackets (source, low, high), side by side by source."""
    total, dtype = sources[0].total, sources[0].dtype
    chunks = -(-total // runtime.CHUNK)
    room = runtime.CHUNK // 16 if any(high - low > 1 for _, low, high in brackets) else 0
    counts = np.empty((chunks, len(brackets), 4), np.int64)
    kept: list[list[np.ndarray]] = [[]] * chunks
    keys = [s.keys for s in sources]
    scratch = threading.local()  # stays in the caches of its thread

    def kernel(begin: int, end: int) -> None:
        if not hasattr(scratch, "keys"):
            scratch.keys = np.empty((len(brackets), room), dtype)
        i = begin // runtime.CHUNK
        _cpu.bracket_count(
            sources=keys,
            brackets=brackets,
            kept=scratch.keys.ctypes.data if room else 0,
            capacity=room,
            counts=counts[i].ctypes.data,
            begin=begin,
            end=end,
        )
        there = np.where(counts[i, :, 2] + _cpu.BLOCK <= room, counts[i, :, 2], 0)
        kept[i] = [row[:n].copy() for row, n in zip(scratch.keys, there)]

    runtime.chunks(kernel, total)
    return [
        _Counted(low, high, counts[:, b], [rows[b] for rows in kept])
        for b, (_, low, high) in enumerate(brackets)
    ]


def _exact(source: Source, k: int, counted: _Counted) -> Found:
    found = _by_bracket(source, k, counted)
    if found is None:
        return _by_digits(source, k)
    key, above, counts = found
    return _found(source, key, k, above, counts)


def _by_bracket(source: Source, k: int, counted: _Counted) -> tuple[int, int, np.ndarray] | None:
    """Key, count above and per-chunk count of ties; None where the sample was misleading."""
    low, high, counts, kept = counted
    above, at_high, inside, at_low = (int(v) for v in counts.sum(0))
    if k <= above or k > above + at_high + inside + at_low:
        return None
    if k <= above + at_high:
        return high, above, counts[:, 1]
    above += at_high
    if k > above + inside:
        return low, above + inside, counts[:, 3]
    keys = np.concatenate(kept)
    if len(keys) < inside:
        return None
    # Keys are the bits of magnitudes, so selecting among them is the same task again.
    magnitudes = torch.from_numpy(keys.view(np.float64 if keys.itemsize == 8 else np.float32))
    value, more, _, _ = kth_magnitude([magnitudes], None, [[k - above]])[0][0]
    key = digits.value_key(value, source.acc)
    starts = np.cumsum(counts[:, 2]) - counts[:, 2]
    ties = np.add.reduceat(np.append(keys == key, False), starts, dtype=np.int64)
    return key, above + more, np.where(counts[:, 2] > 0, ties, 0)


def _found(source: Source, key: int, k: int, above: int, counts: np.ndarray) -> Found:
    """From the ties of each chunk to the whole answer."""
    equal = int(counts.sum())
    cut = source.total if equal == k - above else _cut(source, key, counts, k - above)
    return digits.key_value(key, source.acc), above, equal, cut


def _cut(source: Source, key: int, counts: np.ndarray, ties: int) -> int:
    """One past the index of the ties-th element whose key is `key`."""
    before = np.cumsum(counts)
    chunk = int(np.searchsorted(before, ties))
    rank = ties - 1 - (int(before[chunk - 1]) if chunk else 0)
    index: int = _cpu.find_key(
        source=source.keys,
        key=key,
        rank=rank,
        begin=chunk * runtime.CHUNK,
        end=min(source.total, (chunk + 1) * runtime.CHUNK),
    )
    return index + 1


# ---- histograms ------------------------------------------------------------------------------


def _by_patterns(x: Tensor, source: Source, ranks: list[int]) -> list[Found]:
    slots = runtime.threads()
    histograms = np.zeros((slots, 1 << 15), np.int64)
    part = -(-source.total // slots)
    view = runtime.view(x)

    def task(i: int) -> None:
        _cpu.pattern_histogram(
            x=view,
            histogram=histograms[i].ctypes.data,
            begin=min(source.total, i * part),
            end=min(source.total, (i + 1) * part),
        )

    runtime.parallel(task, slots)
    histogram = histograms.sum(0)
    found = []
    for k in ranks:
        pattern, above, equal = digits.by_patterns(histogram, x.dtype, k)
        key = digits.value_key(digits.pattern_value(pattern, x.dtype), source.acc)
        found.append(_with_ties(source, key, k, above, equal))
    return found


def _by_digits(source: Source, k: int) -> Found:
    bits = 64 if source.acc == torch.float64 else 32
    key, above, equal = digits.by_digits(
        lambda prefix, shift: histogram(source, prefix, shift), bits, k
    )
    return _with_ties(source, key, k, above, equal)


def _with_ties(source: Source, key: int, k: int, above: int, equal: int) -> Found:
    if equal == k - above:
        return digits.key_value(key, source.acc), above, equal, source.total
    counts = _count([source], [(0, key, key)])[0].counts[:, 1]
    return _found(source, key, k, above, counts)


def histogram(source: Source, prefix: int, shift: int) -> np.ndarray:
    slots = runtime.threads()
    lanes = 4 if source.total >= slots << 18 else 1  # worth the memory
    histograms = np.zeros((slots, lanes, 1 << 16), np.int64)
    part = -(-source.total // slots)

    def task(i: int) -> None:
        _cpu.digit_histogram(
            source=source.keys,
            prefix=prefix,
            shift=shift,
            lanes=lanes,
            histogram=histograms[i].ctypes.data,
            begin=min(source.total, i * part),
            end=min(source.total, (i + 1) * part),
        )

    runtime.parallel(task, slots)
    return histograms.sum((0, 1))
