"""Sums as Hopper's tensor cores form them, by the public model of their bits.

Sixteen products and the sum before are aligned to the largest of them with two bits beyond a
float32's, cut off there, added up, and cut off to a float32.
"""

from __future__ import annotations

import numpy as np

GROUP = 16


def _cut(x: np.ndarray, exponent: np.ndarray, bits: int) -> np.ndarray:
    """x without what lies below `bits` bits of a number of that exponent (as frexp has it)."""
    return np.ldexp(np.trunc(np.ldexp(x, bits - exponent)), exponent - bits)


def sums(products: np.ndarray, before: np.ndarray | float = 0.0) -> np.ndarray:
    """Of float64 [..., n, m], exact products, over n: float32 values as float64 [..., m]."""
    *others, n, m = products.shape
    total = np.broadcast_to(np.asarray(before, dtype=np.float64), (*others, m)).copy()
    for begin in range(0, n, GROUP):
        group = np.concatenate([products[..., begin : begin + GROUP, :], total[..., None, :]], -2)
        _, exponent = np.frexp(np.abs(group).max(-2))
        total = _cut(group, exponent[..., None, :], 26).sum(-2)
        total = _cut(total, np.frexp(total)[1], 24)
    return total
