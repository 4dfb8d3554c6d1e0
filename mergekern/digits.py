"""Exact selection by counting digits: the part that the torch and cpu backends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .errors import ArgumentError

# What every process gives, in one order for all of them; plain data and numpy arrays.
Gather = Callable[[Any], list[Any]]

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


def alone(mine: Any) -> list[Any]:
    """The gather of one process."""
    return [mine]


class Descent:
    """Radix selection of several ranks among keys that are seen piece by piece, a digit per pass.

    ranks: each k, 0 for none, from the number of keys; with `nonzero` of those that are not 0.
    While `unfinished`: `add` every piece, then `end_pass`. The keys may be those of several
    processes: `gather` gives the counts of all of them.
    """

    def __init__(self, ranks: Sequence[Callable[[int], int]], *, nonzero: bool = False) -> None:
        self._ranks, self._nonzero = ranks, nonzero
        self._counts = {0: np.zeros(1 << 16, np.int64)}  # by the digits above
        self._zeros = 0
        self._shift: int | None = None
        self.bits = 0  # of a key; 0: no piece seen
        self.total = 0
        self.found: list[tuple[int, int, int, int]] = []  # k, key so far, count above, equal

    @property
    def unfinished(self) -> bool:
        return self._shift is None or self._shift >= 0

    def add(self, bits: int, histogram: Callable[[int, int], np.ndarray]) -> None:
        """A piece of keys of so many bits; `histogram` as in `by_digits`."""
        self.bits = bits
        shift = bits - 16 if self._shift is None else self._shift
        if self._shift is None and self._nonzero:
            self._zeros += int(histogram(0, 0)[0])
        for prefix, counts in self._counts.items():
            counts += histogram(prefix, shift)

    def end_pass(self, gather: Gather = alone) -> None:
        all_bits, all_zeros, all_counts = zip(*gather((self.bits, self._zeros, self._counts)))
        if len({*all_bits} - {0}) > 1:
            what = "float64 in one process, narrower types in another"
            raise ArgumentError.of("kth_magnitude", what, [*all_bits], "one of both")
        self.bits = max(all_bits)
        counts = {p: sum(c[p] for c in all_counts) for p in self._counts}
        if self._shift is None:
            self._shift = self.bits - 16
            self.total = int(counts[0].sum())
            population = self.total - sum(all_zeros)
            self.found = [(rank(population), 0, 0, 0) for rank in self._ranks]
        for i, (k, key, above, _) in enumerate(self.found):
            if k:
                digit, larger, equal = in_histogram(counts[key], k - above)
                self.found[i] = k, key << 16 | digit, above + larger, equal
        self._counts = {f[1]: np.zeros(1 << 16, np.int64) for f in self.found}
        self._shift -= 16
