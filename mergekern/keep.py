"""What survives of one task vector: by magnitude (Threshold) or at random (Bernoulli).

Plain data that `merge_deltas` takes, one per model; None keeps everything.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

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


NOTHING = Threshold(math.nan, 0, 0, 0)  # no key ranks above NaN, no index lies below 0


class Bernoulli(NamedTuple):
    """Keep each element with probability `density`, independently.

    The probability is rounded to a multiple of 2**-16, and to at least 2**-16 unless it is 0.
    Random bits are Philox4x32-10 (Salmon et al., SC 2011) keyed by seed, name and model: element e
    takes 16 bits of the block with counter e // 8, so the same key gives the same mask on every
    backend, thread count and shard. Source: DARE (Yu et al., 2311.03099).
    """

    density: float
    seed: int = 0
    name: str = ""
    model: int = 0

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
        text = f"{self.seed}\0{self.name}\0{self.model}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


class Mask(NamedTuple):
    """A stored mask: uint8, one bit per element in C order, as numpy.packbits writes them."""

    bits: Tensor


Keep = Threshold | Bernoulli | None
