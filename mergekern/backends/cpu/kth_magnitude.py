"""kth_magnitude: a driver over the selection kernels of csrc/kth_magnitude.cpp."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...check import accumulator
from .. import digits
from . import runtime

_SMALL = 1 << 15  # up to here all keys are gathered and partitioned
_RUN = 16  # elements of one sampled run: a cache line or two


def kth_magnitude(x: Tensor, base: Tensor | None, k: int) -> tuple[float, int, int, int]:
    """Value, count above, count equal, and one past the index of the last kept tie."""
    acc = accumulator(x.dtype)
    view, origin, total = runtime.view(x), runtime.optional_view(base), x.numel()
    if total <= _SMALL:
        keys = _keys(view, origin, total, acc)
        key = int(np.partition(keys, total - k)[total - k])
        ties = np.flatnonzero(keys == key)
        above = int((keys > key).sum())
        return digits.key_value(key, acc), above, len(ties), int(ties[k - above - 1]) + 1

    if base is None and x.element_size() == 2:
        pattern, above, equal = _by_patterns(x, view, k)
        value = digits.pattern_value(pattern, x.dtype)
        key, counts = digits.value_key(value, acc), None
    else:
        found = _by_bracket(view, origin, total, acc, k)
        if found:
            key, above, counts = found
        else:
            key, above, _ = _by_digits(view, origin, total, acc, k)
            counts = None
        value = digits.key_value(key, acc)
        equal = -1 if counts is None else int(counts.sum())
    if counts is None:
        if equal == k - above:
            return value, above, equal, total
        counts = _bracket(view, origin, total, acc, key, key)[0][:, 1]
        equal = int(counts.sum())
    cut = total
    if equal > k - above:
        cut = _cut(view, origin, total, key, counts, k - above)
    return value, above, equal, cut


def _numpy(acc: torch.dtype) -> type:
    return np.uint64 if acc == torch.float64 else np.uint32


def _keys(view: object, origin: object, total: int, acc: torch.dtype) -> np.ndarray:
    keys: np.ndarray = np.empty(total, _numpy(acc))
    runtime._cpu.magnitude_keys(x=view, base=origin, out=keys.ctypes.data, begin=0, end=total)
    return keys


def _by_patterns(x: Tensor, view: object, k: int) -> digits.Selection:
    slots = runtime.threads()
    histograms = np.zeros((slots, 1 << 15), np.int64)
    part = -(-x.numel() // slots)

    def task(i: int) -> None:
        runtime._cpu.pattern_histogram(
            x=view,
            histogram=histograms[i].ctypes.data,
            begin=min(x.numel(), i * part),
            end=min(x.numel(), (i + 1) * part),
        )

    runtime.parallel(task, slots)
    return digits.by_patterns(histograms.sum(0), x.dtype, k)


def _by_digits(
    view: object, origin: object, total: int, acc: torch.dtype, k: int
) -> digits.Selection:
    slots = runtime.threads()
    part = -(-total // slots)

    def histogram(prefix: int, shift: int) -> np.ndarray:
        histograms = np.zeros((slots, 1 << 16), np.int64)

        def task(i: int) -> None:
            runtime._cpu.digit_histogram(
                x=view,
                base=origin,
                prefix=prefix,
                shift=shift,
                histogram=histograms[i].ctypes.data,
                begin=min(total, i * part),
                end=min(total, (i + 1) * part),
            )

        runtime.parallel(task, slots)
        return histograms.sum(0)

    return digits.by_digits(histogram, 64 if acc == torch.float64 else 32, k)


def _bracket(
    view: object, origin: object, total: int, acc: torch.dtype, low: int, high: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Per chunk the counts above, at high, inside, at low; the keys inside; room per chunk."""
    count = -(-total // runtime.CHUNK)
    room = runtime.CHUNK // 16 if high - low > 1 else 0
    kept: np.ndarray = np.empty((count, room), _numpy(acc))
    counts = np.empty((count, 4), np.int64)

    def kernel(begin: int, end: int) -> None:
        i = begin // runtime.CHUNK
        counts[i] = runtime._cpu.bracket_count(
            x=view,
            base=origin,
            low=low,
            high=high,
            kept=kept[i].ctypes.data if room else 0,
            capacity=room,
            begin=begin,
            end=end,
        )

    runtime.chunks(kernel, total)
    return counts, kept, room


def _by_bracket(
    view: object, origin: object, total: int, acc: torch.dtype, k: int
) -> tuple[int, int, np.ndarray] | None:
    """Key, count above and per-chunk count of ties; None where the sample was misleading.

    A sample of keys gives two keys that enclose the wanted rank with near certainty; one pass
    counts what lies above, at and between them and keeps the few keys between.
    """
    runs = min(1 << 14, max(1 << 10, total // (1 << 11)))
    sample: np.ndarray = np.empty(runs * _RUN, _numpy(acc))

    def draw(begin: int, end: int) -> None:
        runtime._cpu.sample_keys(
            x=view,
            base=origin,
            total=total,
            runs=runs,
            run=_RUN,
            out=sample.ctypes.data,
            begin=begin,
            end=end,
        )

    runtime.chunks(draw, runs, 1 << 10)
    quantile = (total - k) / total
    # Five standard deviations of the rank if the sample were independent.
    margin = 5 * (len(sample) * quantile * (1 - quantile)) ** 0.5 + 8
    first = max(0, int(quantile * len(sample) - margin))
    last = min(len(sample) - 1, int(quantile * len(sample) + margin))
    low, high = (int(v) for v in np.partition(sample, [first, last])[[first, last]])

    counts, kept, room = _bracket(view, origin, total, acc, low, high)
    above, at_high, inside, at_low = (int(v) for v in counts.sum(0))
    if k <= above or k > above + at_high + inside + at_low:
        return None
    if k <= above + at_high:
        return high, above, counts[:, 1]
    above += at_high
    if k > above + inside:
        return low, above + inside, counts[:, 3]
    if int(counts[:, 2].max()) + runtime._cpu.BLOCK > room:
        return None
    keys = np.concatenate([row[:n] for row, n in zip(kept, counts[:, 2])])
    value, more, _, _ = kth_magnitude(_as_magnitudes(keys), None, k - above)
    key = digits.value_key(value, acc)
    starts = np.cumsum(counts[:, 2]) - counts[:, 2]
    ties = np.add.reduceat(np.append(keys == key, False), starts, dtype=np.int64)
    return key, above + more, np.where(counts[:, 2] > 0, ties, 0)


def _as_magnitudes(keys: np.ndarray) -> Tensor:
    """Keys are the bits of magnitudes, so selecting among them is the same task again."""
    return torch.from_numpy(keys.view(np.float64 if keys.itemsize == 8 else np.float32))


def _cut(view: object, origin: object, total: int, key: int, counts: np.ndarray, ties: int) -> int:
    """One past the index of the ties-th element whose key is `key`."""
    before = np.cumsum(counts)
    chunk = int(np.searchsorted(before, ties))
    rank = ties - 1 - (int(before[chunk - 1]) if chunk else 0)
    index: int = runtime._cpu.find_key(
        x=view,
        base=origin,
        key=key,
        rank=rank,
        begin=chunk * runtime.CHUNK,
        end=min(total, (chunk + 1) * runtime.CHUNK),
    )
    return index + 1
