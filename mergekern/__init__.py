"""mergekern: the compiled engine under model merging."""

from __future__ import annotations

from .errors import ArgumentError, BackendError, CheckpointError, ConfigError, MergekernError
from .keep import Bernoulli, Threshold
from .ops.gram import gram
from .ops.kth_magnitude import kth_magnitude
from .ops.merge_deltas import merge_deltas
from .ops.permute import permute
from .ops.weighted_sum import weighted_sum

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "Bernoulli",
    "CheckpointError",
    "ConfigError",
    "MergekernError",
    "Threshold",
    "gram",
    "kth_magnitude",
    "merge_deltas",
    "permute",
    "weighted_sum",
]
