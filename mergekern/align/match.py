"""Match: which features of several models are one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .spaces import Spaces


@dataclass(frozen=True)
class Match:
    """Which merged feature every feature of every model goes to.

    labels: movable space -> one int64 [size] per model, merged features 0..size-1, every one used.
    """

    spaces: Spaces
    labels: dict[str, list[Tensor]]
    method: str
    correlations: dict[str, Any]
