"""kth_magnitude in plain torch: 16-bit digits of the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ... import digits
from ...check import accumulator
from ...keep import NOTHING
from . import chunks

Found = tuple[float, int, int, int]  # value, above, equal, one past the index of the last kept tie
Keys = Callable[[], Iterator[tuple[Tensor, int]]]  # chunks of keys, the flat index of their first


def kth_magnitude(
    xs: list[Tensor], base: Tensor | None, ranks: list[list[int]], rounded: bool = False
) -> list[list[Found]]:
    """Per x and rank: value, count above, count equal, one past the index of the last kept tie."""
    return [[_select(x, base, k, rounded) for k in ks] for x, ks in zip(xs, ranks, strict=True)]


def _select(x: Tensor, base: Tensor | None, k: int, rounded: bool) -> Found:
    acc, keys = accumulator(x.dtype), lambda: _keys(x, base, rounded)
    if base is not None or x.element_size() != 2:
        return select(keys, acc, x.numel(), k)
    counts = np.zeros(1 << 15, np.int64)
    (flat,) = chunks.flat([x])
    for begin, end, _ in chunks.rows([flat]):
        part = (flat[begin:end] if flat.ndim else flat).reshape(-1)
        bits = part.view(torch.int16).to(torch.int64) & 0x7FFF
        counts += torch.bincount(bits, minlength=1 << 15).cpu().numpy()
    pattern, above, equal = digits.by_patterns(counts, x.dtype, k)
    value = digits.pattern_value(pattern, x.dtype)
    cut = _cut(keys, digits.value_key(value, acc), k - above, equal, x.numel())
    return value, above, equal, cut


def select(keys: Keys, acc: torch.dtype, total: int, k: int) -> Found:
    """The k-th largest of any keys."""
    bits = 64 if acc == torch.float64 else 32
    key, above, equal = digits.by_digits(
        lambda prefix, shift: histogram(keys, prefix, shift), bits, k
    )
    cut = _cut(keys, key, k - above, equal, total)
    return digits.key_value(key, acc), above, equal, cut


def select_share(keys: Keys, acc: torch.dtype, total: int, share: float) -> Found:
    """The same for k = int(share * number of keys that are not 0); keeps nothing where k is 0."""
    k = int(sum(int(part.count_nonzero()) for part, _ in keys()) * share)
    return select(keys, acc, total, k) if k else NOTHING


def _cut(keys: Keys, key: int, ties: int, equal: int, total: int) -> int:
    """One past the index of the ties-th key that equals `key`."""
    return total if equal == ties else place(keys, key, ties)[1] + 1


def place(keys: Keys, key: int, rank: int) -> tuple[int, int]:
    """How many keys up to the rank-th equal `key`, and the index of that one or -1."""
    ties = 0
    for part, first in keys():
        found = torch.nonzero(part == key).view(-1)
        if ties + len(found) >= rank:
            return rank, first + int(found[rank - ties - 1])
        ties += len(found)
    return ties, -1


def place_of_tie(
    xs: list[Tensor], base: Tensor | None, value: float, rank: int, rounded: bool
) -> tuple[int, int]:
    """How many magnitudes equal `value` (counted up to `rank`), the index of the rank-th or -1."""
    key = digits.value_key(value, accumulator(xs[0].dtype))
    return place(lambda: _keys(xs[0], base, rounded), key, rank)


def digit_histogram(
    xs: list[Tensor], base: Tensor | None, prefix: int, shift: int, rounded: bool
) -> np.ndarray:
    """Counts of the 16-bit digit at `shift` of the keys that equal `prefix` above it."""
    return histogram(lambda: _keys(xs[0], base, rounded), prefix, shift)


def _keys(x: Tensor, base: Tensor | None, rounded: bool = False) -> Iterator[tuple[Tensor, int]]:
    """Keys of |x - base| chunk by chunk, with the flat index of the first."""
    acc = accumulator(x.dtype)
    flat = chunks.flat([x] if base is None else [x, base])
    for begin, end, first in chunks.rows(flat):
        d = chunks.part(flat[0], begin, end, acc)
        if base is not None:
            d = d - chunks.part(flat[1], begin, end, acc)
            d = d.to(x.dtype).to(acc) if rounded else d
        yield chunks.magnitude_keys(d), first


def histogram(keys: Keys, prefix: int, shift: int) -> np.ndarray:
    counts = np.zeros(1 << 16, np.int64)
    for part, _ in keys():
        chosen = part[part >> (shift + 16) == prefix] if shift + 16 < 64 else part
        digit = chosen >> shift & 0xFFFF
        counts += torch.bincount(digit, minlength=1 << 16).cpu().numpy()
    return counts
