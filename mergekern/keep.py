"""What survives of one task vector, as plain data that `merge_deltas` takes, one rule per model.

By magnitude (Threshold, Band), at random (Bernoulli), by rank and chance (MagPrune, which
`rank_mask` turns into a Mask), or as a stored Mask; None keeps everything.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Threshold(NamedTuple):
    """The k-th largest magnitude of a tensor, and how to keep exactly k elements by it.

    Kept: magnitudes above `value`, and those equal to it at a flat (C order) index below `cut`,
    so among ties the lowest index goes first. above < k <= above + equal. Where all ties are kept,
    `cut` is any index past the last of them.
    """

    value: float
    above: int
    equal: int
    cut: int

    def from_index(self, first: int) -> Threshold:
        """The same threshold for a part that begins at that index."""
        return self._replace(cut=max(0, self.cut - first))


NOTHING = Threshold(math.nan, 0, 0, 0)  # no key ranks above NaN, no index lies below 0


def above(value: float) -> Threshold:
    """Keep magnitudes strictly above `value`."""
    return Threshold(value, 0, 0, 0)


class Band(NamedTuple):
    """Keep what `least` keeps and `most` does not: no small magnitudes, and no outliers.

    Source: Model Breadcrumbs (Davari and Belilovsky, 2312.06795).
    """

    least: Threshold
    most: Threshold

    def from_index(self, first: int) -> Band:
        """The same band for a part that begins at that index."""
        return Band(self.least.from_index(first), self.most.from_index(first))


class Bernoulli(NamedTuple):
    """Keep each element with probability `density`, independently.

    The probability is rounded to a multiple of 2**-16, and to at least 2**-16 unless it is 0.
    Random bits are Philox4x32-10 (Salmon et al., SC 2011) keyed by seed, name and model: element e
    takes 16 bits of the block with counter e // 8, so the same key gives the same mask on every
    backend, thread count and shard. `first`: the number e of the first element, for a part of a
    tensor. Source: DARE (Yu et al., 2311.03099).
    """

    density: float
    seed: int = 0
    name: str = ""
    model: int = 0
    first: int = 0

    def from_index(self, first: int) -> Bernoulli:
        """The same draws for a part that begins at that index."""
        return self._replace(first=self.first + first)

    @property
    def limit(self) -> int:
        """An element is kept if its 16-bit draw is below this.

        >>> [Bernoulli(p).limit for p in (0.5, 1.0, 1e-9, 0.0)]
        [32768, 65536, 1, 0]
        """
        return max(round(self.density * 65536), 1 if self.density > 0 else 0)

    @property
    def key(self) -> tuple[int, int]:
        """The two 32-bit words of the Philox key."""
        return _philox_key(self.seed, self.name, self.model)


class MagPrune(NamedTuple):
    """Keep each element with a probability that grows with the rank of its magnitude in its row.

    The element of rank r (0 the smallest) of a row of n is kept with probability
    density - epsilon + 2 epsilon r / (n - 1), rounded to a multiple of 2**-16, and with
    probability density where n is 1. A row runs along axis 1, or is the whole of a tensor with
    fewer axes. Equal magnitudes rank in index order, NaN last. Draws as those of Bernoulli.
    Source: MAGPRUNE of DELLA (Deep et al., 2406.11617); mergekit `sparsify.della_magprune`.
    """

    density: float
    epsilon: float
    seed: int = 0
    name: str = ""
    model: int = 0

    def limits(self, n: int) -> np.ndarray:
        """By rank: an element is kept if its 16-bit draw is below this.

        >>> MagPrune(0.5, 0.25).limits(3).tolist(), MagPrune(0.5, 0.25).limits(1).tolist()
        ([16384, 32768, 49152], [32768])
        """
        share = np.arange(n) / (n - 1) if n > 1 else np.full(n, 0.5)
        probability = self.density - self.epsilon + 2 * self.epsilon * share
        return np.rint(probability * 65536).clip(0, 65536).astype(np.uint32)

    @property
    def key(self) -> tuple[int, int]:
        """The two 32-bit words of the Philox key."""
        return _philox_key(self.seed, self.name, self.model)


def _philox_key(seed: int, name: str, model: int) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}\0{name}\0{model}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


class Mask(NamedTuple):
    """A stored mask: uint8, one bit per element in C order, as numpy.packbits writes them."""

    bits: Tensor


Keep = Threshold | Band | Bernoulli | Mask | None


def from_index(keep: Keep, first: int) -> Keep:
    """The same rule for a part that begins at that index; stored masks are those of a part."""
    return keep if keep is None or isinstance(keep, Mask) else keep.from_index(first)


class Recipe(NamedTuple):
    """The numbers of one merge, one per model where a list; csrc/merge_deltas.h says what for."""

    keep: list[Keep]
    before: list[float]
    after: list[float]
    weights: list[float]
    alone: list[float]
    rescale: list[float]
    elect: str
    zero: str
    combine: str
    normalize: bool
    stepwise: bool
    divide: bool
    total: float
    least: float
    instead: float
    scale: float
