"""Exact selection by counting digits: the part that the torch and cpu backends share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Selection = tuple[int, int, int]  # key of the k-th largest, count above it, count equal to it

# Keys are the bits of |x|, ordered as unsigned integers; every NaN has this one, above infinity.
NAN_KEY = {torch.float64: 0x7FF0000000000001, torch.float32: 0x7F800001}
# The stored bits of infinity: larger patterns are NaN.
INFINITY_PATTERN = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


def in_histogram(histogram: np.ndarray, k: int) -> Selection:
    """The bin that holds the k-th largest entry, entries above that bin, entries in it."""
    from_top = np.cumsum(histogram[::-1])
    i = int(np.searchsorted(from_top, k))
    in_bin = int(histogram[::-1][i])
    return len(histogram) - 1 - i, int(from_top[i]) - in_bin, in_bin


def by_digits(histogram: Callable[[int, int], np.ndarray], bits: int, k: int) -> Selection:
    """Radix selection, one read per 16-bit digit, from the top.

    `histogram(prefix, shift)` counts the digits at `shift` of keys whose bits above them equal
    `prefix`.
    """
    key = above = equal = 0
    for shift in range(bits - 16, -1, -16):
        digit, larger, equal = in_histogram(histogram(key, shift), k - above)
        key = key << 16 | digit
        above += larger
    return key, above, equal


def by_patterns(histogram: np.ndarray, dtype: torch.dtype, k: int) -> Selection:
    """Selection from counts of the 32768 bit patterns of a 16-bit |x|; key is the pattern."""
    nan = INFINITY_PATTERN[dtype] + 1
    counts = histogram[: nan + 1].copy()
    counts[nan] += histogram[nan + 1 :].sum()
    return in_histogram(counts, k)


def pattern_value(pattern: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(pattern, dtype=torch.int16).view(dtype))


def key_value(key: int, acc: torch.dtype) -> float:
    """The magnitude whose bits are `key`."""
    if acc == torch.float64:
        return float(np.array(key, np.uint64).view(np.float64))
    return float(np.array(key, np.uint32).view(np.float32))


def value_key(value: float, acc: torch.dtype) -> int:
    """The bits of `value`, which is exact in `acc`; the one NaN key for NaN."""
    if value != value:
        return NAN_KEY[acc]
    if acc == torch.float64:
        return int(np.array(value, np.float64).view(np.uint64))
    return int(np.array(value, np.float32).view(np.uint32))
