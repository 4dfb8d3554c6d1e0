"""kth_magnitude in plain torch: 16-bit digits of the keys."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...check import accumulator
from .. import digits
from . import chunks


def kth_magnitude(x: Tensor, base: Tensor | None, k: int) -> tuple[float, int, int, int]:
    """Value, count above, count equal, and one past the index of the last kept tie."""
    acc = accumulator(x.dtype)
    if base is None and x.element_size() == 2:
        counts = np.zeros(1 << 15, np.int64)
        (flat,) = chunks.flat([x])
        for begin, end, _ in chunks.rows([flat]):
            part = (flat[begin:end] if flat.ndim else flat).reshape(-1)
            bits = part.view(torch.int16).to(torch.int64) & 0x7FFF
            counts += torch.bincount(bits, minlength=1 << 15).cpu().numpy()
        pattern, above, equal = digits.by_patterns(counts, x.dtype, k)
        value = digits.pattern_value(pattern, x.dtype)
        key = digits.value_key(value, acc)
    else:
        key, above, equal = digits.by_digits(
            lambda prefix, shift: _histogram(x, base, prefix, shift),
            64 if acc == torch.float64 else 32,
            k,
        )
        value = digits.key_value(key, acc)
    if equal == k - above:
        return value, above, equal, x.numel()
    ties = k - above
    for keys, first in _keys(x, base):
        found = torch.nonzero(keys == key).view(-1)
        if len(found) >= ties:
            return value, above, equal, first + int(found[ties - 1]) + 1
        ties -= len(found)
    raise AssertionError("fewer ties than were counted")


def _keys(x: Tensor, base: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """Keys of |x - base| chunk by chunk, with the flat index of the first."""
    acc = accumulator(x.dtype)
    flat = chunks.flat([x] if base is None else [x, base])
    for begin, end, first in chunks.rows(flat):
        d = chunks.part(flat[0], begin, end, acc)
        if base is not None:
            d = d - chunks.part(flat[1], begin, end, acc)
        yield chunks.magnitude_keys(d), first


def _histogram(x: Tensor, base: Tensor | None, prefix: int, shift: int) -> np.ndarray:
    counts = np.zeros(1 << 16, np.int64)
    for keys, _ in _keys(x, base):
        chosen = keys[keys >> (shift + 16) == prefix] if shift + 16 < 64 else keys
        digit = chosen >> shift & 0xFFFF
        counts += torch.bincount(digit, minlength=1 << 16).cpu().numpy()
    return counts
