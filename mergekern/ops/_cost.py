"""What a call must move and compute at the least; benchmarks divide by it."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    bytes: int
    flops: int
