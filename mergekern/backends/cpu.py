"""C++ kernels of mergekern._cpu, over chunks of elements in a thread pool.

Kernels are serial and own nothing; threads, chunks and scratch live here. MERGEKERN_THREADS sets
the number of threads (default: torch.get_num_threads()). Chunk borders do not depend on it, so
results do not either. One file, long as it is: the ops differ from each other only in what they
hand to the kernel, and selection is a driver over four of them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..check import accumulator
from ..dispatch import compiled
from ..errors import ArgumentError
from ..keep import Bernoulli, Keep, Threshold
from . import digits

_cpu = compiled("_cpu")
_DTYPES = {
    torch.float32: _cpu.DType.f32,
    torch.float64: _cpu.DType.f64,
    torch.float16: _cpu.DType.f16,
    torch.bfloat16: _cpu.DType.bf16,
}
_ELECT = {None: _cpu.Elect.none, "sum": _cpu.Elect.sum, "count": _cpu.Elect.count}

CHUNK = 1 << 18  # elements of one task of the pool: large against its overhead, small against L3

STREAM = 1 << 24  # bytes from which on outputs are written past the caches

# ---- threads ---------------------------------------------------------------------------------

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def threads() -> int:
    """MERGEKERN_THREADS, or torch's number of threads."""
    text = os.environ.get("MERGEKERN_THREADS")
    if text is None:
        return torch.get_num_threads()
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentError.of("MERGEKERN_THREADS", "no number", repr(text), "1 or more")
    return int(text)


def _forget_pool() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)  # a forked child has none of the pool's threads


def _parallel(task: Callable[[int], None], count: int) -> None:
    """task(0) ... task(count - 1), in any order; the caller works too."""
    global _pool, _pool_size
    workers = min(threads(), count)
    if workers <= 1:
        for i in range(count):
            task(i)
        return
    if _pool is None or _pool_size < workers - 1:
        _pool, _pool_size = ThreadPoolExecutor(workers - 1, "mergekern"), workers - 1
    numbers = itertools.count()

    def work() -> None:
        while (i := next(numbers)) < count:
            task(i)

    futures = [_pool.submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:
        for future in futures:
            future.result()


def _chunks(kernel: Callable[[int, int], None], total: int, chunk: int = CHUNK) -> None:
    """kernel(begin, end) for every chunk of `total` elements."""
    if total <= chunk:
        if total:
            kernel(0, total)
        return
    _parallel(lambda i: kernel(i * chunk, min(total, (i + 1) * chunk)), -(-total // chunk))


# ---- views -----------------------------------------------------------------------------------


def _collapse(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """The same elements in the same order with as few dimensions as possible."""
    sizes: list[int] = []
    steps: list[int] = []
    for size, step in zip(shape, strides):
        if size == 1:
            continue
        if sizes and steps[-1] == size * step:
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)
    return (sizes, steps) if sizes else ([1], [1])


def _view(x: Tensor, *, output: bool = False) -> object:
    if x.is_contiguous():
        shape, strides = [x.numel()], [1]
    else:
        shape, strides = _collapse(x.shape, x.stride())
    return _cpu.View(
        data=x.data_ptr(),
        dtype=_DTYPES[x.dtype],
        shape=shape,
        strides=strides,
        stream=output and x.nbytes >= STREAM,
    )


def _optional_view(x: Tensor | None) -> object:
    return None if x is None else _view(x)


# ---- ops -------------------------------------------------------------------------------------


def weighted_sum(out: Tensor, xs: list[Tensor], weights: list[float], divisor: float) -> None:
    target, views = _view(out, output=True), [_view(x) for x in xs]

    def kernel(begin: int, end: int) -> None:
        _cpu.weighted_sum(
            out=target, xs=views, weights=weights, divisor=divisor, begin=begin, end=end
        )

    _chunks(kernel, out.numel())


def _rule(keep: Keep, acc: torch.dtype) -> object:
    if isinstance(keep, Threshold):
        return _cpu.KeepRule.magnitude(threshold=digits.value_key(keep.value, acc), cut=keep.cut)
    if isinstance(keep, Bernoulli):
        k0, k1 = keep.key
        return _cpu.KeepRule.random(k0=k0, k1=k1, limit=keep.limit)
    return _cpu.KeepRule()


def merge_deltas(
    out: Tensor,
    base: Tensor | None,
    xs: list[Tensor],
    weights: list[float],
    factors: list[float],
    keep: list[Keep],
    elect: str | None,
    normalize: bool,
    total: float,
    scale: float,
) -> None:
    acc = accumulator(xs[0].dtype)
    target, origin = _view(out, output=True), _optional_view(base)
    views = [_view(x) for x in xs]
    rules = [_rule(k, acc) for k in keep]

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty(len(xs) * _cpu.MERGE_BLOCK, dtype=acc)
        _cpu.merge_deltas(
            out=target,
            base=origin,
            xs=views,
            weights=weights,
            factors=factors,
            keep=rules,
            elect=_ELECT[elect],
            normalize=normalize,
            total=total,
            scale=scale,
            scratch=scratch.data_ptr(),
            begin=begin,
            end=end,
        )

    _chunks(kernel, out.numel())


def l1_norms(base: Tensor | None, xs: list[Tensor], keep: list[Keep]) -> list[tuple[float, float]]:
    origin = _optional_view(base)
    norms = []
    for x, k in zip(xs, keep, strict=True):
        view, rule = _view(x), _rule(k, accumulator(x.dtype))
        sums = torch.zeros(-(-x.numel() // CHUNK), 2, dtype=torch.float64)

        def kernel(
            begin: int, end: int, view: object = view, rule: object = rule, sums: Tensor = sums
        ) -> None:
            row = sums[begin // CHUNK].data_ptr()
            _cpu.l1_norms(x=view, base=origin, keep=rule, sums=row, begin=begin, end=end)

        _chunks(kernel, x.numel())
        everything, kept = sums.sum(0).tolist()
        norms.append((everything, kept))
    return norms


def gram(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    views, origin, n = [_view(x) for x in xs], _optional_view(base), len(xs)
    total = xs[0].numel()
    partial = torch.zeros(-(-total // CHUNK), n, n, dtype=torch.float64)

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty(n * _cpu.GRAM_BLOCK, dtype=torch.float64)
        dots = partial[begin // CHUNK].data_ptr()
        _cpu.gram(
            xs=views, base=origin, scratch=scratch.data_ptr(), dots=dots, begin=begin, end=end
        )

    _chunks(kernel, total)
    upper = partial.sum(0)
    out.copy_(upper + upper.triu(1).T)


def _axes(out: Tensor, x: Tensor, index: dict[int, Tensor]) -> list[tuple[int, int, Tensor | None]]:
    """(size, stride, index times stride) of the result's axes; plain neighbours are merged."""
    axes: list[tuple[int, int, Tensor | None]] = []
    for d, size in enumerate(out.shape):
        stride = x.stride(d)
        if d in index:
            axes.append((size, stride, index[d] * stride))
        elif size != 1:
            if axes and axes[-1][2] is None and axes[-1][1] == size * stride:
                size *= axes.pop()[0]
            axes.append((size, stride, None))
    if len(axes) < 2:  # rows are counted over all axes but the last
        axes.insert(0, (1, 0, None))
    if len(axes) < 2:
        axes.append((1, 1, None))
    return axes


def permute(out: Tensor, x: Tensor, index: dict[int, Tensor]) -> None:
    if not out.numel():
        return
    axes = _axes(out, x, index)
    width, stride, offsets = axes[-1]
    row_size = x.shape[max(index)] if index else 0
    positions = None
    if offsets is not None and stride == 1 and row_size < 2**31:
        positions = offsets.to(torch.int32)
    addresses = [(n, s, 0 if o is None else o.data_ptr()) for n, s, o in axes]

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty(0 if positions is None else row_size * 16, dtype=torch.uint8)
        _cpu.permute(
            out=out.data_ptr(),
            x=x.data_ptr(),
            itemsize=x.element_size(),
            axes=addresses,
            stream=out.nbytes >= STREAM,
            positions=0 if positions is None else positions.data_ptr(),
            row_size=row_size,
            scratch=scratch.data_ptr(),
            begin=begin,
            end=end,
        )

    rows = max(8, CHUNK // width // 8 * 8)  # whole groups of the rows that are gathered together
    _chunks(kernel, out.numel() // width, rows)


# ---- selection -------------------------------------------------------------------------------

_SMALL = 1 << 15  # up to here all keys are gathered and partitioned
_RUN = 16  # elements of one sampled run: a cache line or two


def kth_magnitude(x: Tensor, base: Tensor | None, k: int) -> tuple[float, int, int, int]:
    """Value, count above, count equal, and one past the index of the last kept tie."""
    acc = accumulator(x.dtype)
    view, origin, total = _view(x), _optional_view(base), x.numel()
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
    _cpu.magnitude_keys(x=view, base=origin, out=keys.ctypes.data, begin=0, end=total)
    return keys


def _by_patterns(x: Tensor, view: object, k: int) -> digits.Selection:
    slots = threads()
    histograms = np.zeros((slots, 1 << 15), np.int64)
    part = -(-x.numel() // slots)

    def task(i: int) -> None:
        _cpu.pattern_histogram(
            x=view,
            histogram=histograms[i].ctypes.data,
            begin=min(x.numel(), i * part),
            end=min(x.numel(), (i + 1) * part),
        )

    _parallel(task, slots)
    return digits.by_patterns(histograms.sum(0), x.dtype, k)


def _by_digits(
    view: object, origin: object, total: int, acc: torch.dtype, k: int
) -> digits.Selection:
    slots = threads()
    part = -(-total // slots)

    def histogram(prefix: int, shift: int) -> np.ndarray:
        histograms = np.zeros((slots, 1 << 16), np.int64)

        def task(i: int) -> None:
            _cpu.digit_histogram(
                x=view,
                base=origin,
                prefix=prefix,
                shift=shift,
                histogram=histograms[i].ctypes.data,
                begin=min(total, i * part),
                end=min(total, (i + 1) * part),
            )

        _parallel(task, slots)
        return histograms.sum(0)

    return digits.by_digits(histogram, 64 if acc == torch.float64 else 32, k)


def _bracket(
    view: object, origin: object, total: int, acc: torch.dtype, low: int, high: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Per chunk the counts above, at high, inside, at low; the keys inside; room per chunk."""
    count = -(-total // CHUNK)
    room = CHUNK // 16 if high - low > 1 else 0
    kept: np.ndarray = np.empty((count, room), _numpy(acc))
    counts = np.empty((count, 4), np.int64)

    def kernel(begin: int, end: int) -> None:
        i = begin // CHUNK
        counts[i] = _cpu.bracket_count(
            x=view,
            base=origin,
            low=low,
            high=high,
            kept=kept[i].ctypes.data if room else 0,
            capacity=room,
            begin=begin,
            end=end,
        )

    _chunks(kernel, total)
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
        _cpu.sample_keys(
            x=view,
            base=origin,
            total=total,
            runs=runs,
            run=_RUN,
            out=sample.ctypes.data,
            begin=begin,
            end=end,
        )

    _chunks(draw, runs, 1 << 10)
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
    if int(counts[:, 2].max()) + _cpu.BLOCK > room:
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
    index: int = _cpu.find_key(
        x=view,
        base=origin,
        key=key,
        rank=rank,
        begin=chunk * CHUNK,
        end=min(total, (chunk + 1) * CHUNK),
    )
    return index + 1
