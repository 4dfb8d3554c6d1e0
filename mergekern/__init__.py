"""mergekern: the compiled engine under model merging."""

from __future__ import annotations

from .align.declare import declare_spaces
from .align.discover import discover_spaces
from .align.matching.match import Match, match
from .align.merging.apply import apply
from .align.merging.partial import PartialZip
from .align.merging.repair import repair
from .align.spaces import Spaces
from .align.statistics.collect import collect_statistics
from .align.statistics.statistics import Statistics
from .align.zip_models import zip_models
from .engine.manifest import Manifest
from .engine.run import merge_checkpoints, merge_sweep, plan_merge
from .engine.verify import Verification, verify
from .engine.zip_folder import load_zip
from .errors import (
    ArgumentError,
    BackendError,
    CheckpointError,
    ConfigError,
    ConfigWarning,
    MergekernError,
)
from .keep import Band, Bernoulli, MagPrune, Mask, Threshold
from .methods import methods
from .methods.bits import load_masks, save_masks
from .methods.emr import emr, emr_state_dicts
from .methods.masks import consensus_mask, masked, tall_masks
from .methods.merge import merge_state_dicts, merge_tensors
from .ops.assign import assign, assign_heads
from .ops.covariance import Covariance, correlation, covariance
from .ops.gram import gram
from .ops.kth_magnitude import kth_magnitude
from .ops.merge_deltas import merge_deltas
from .ops.permute import permute, permute_all
from .ops.rank_mask import rank_mask
from .ops.variance_mask import variance_mask
from .ops.weighted_rows import weighted_rows
from .ops.weighted_sum import weighted_sum
from .ops.zip_match import zip_match
from .ops.zip_weights import zip_weights, zip_weights_all
from .version import __version__ as __version__

__all__ = [
    "ArgumentError",
    "BackendError",
    "Band",
    "Bernoulli",
    "CheckpointError",
    "ConfigError",
    "ConfigWarning",
    "Covariance",
    "MagPrune",
    "Manifest",
    "Mask",
    "Match",
    "MergekernError",
    "PartialZip",
    "Spaces",
    "Statistics",
    "Threshold",
    "Verification",
    "apply",
    "assign",
    "assign_heads",
    "collect_statistics",
    "consensus_mask",
    "correlation",
    "covariance",
    "declare_spaces",
    "discover_spaces",
    "emr",
    "emr_state_dicts",
    "gram",
    "kth_magnitude",
    "load_masks",
    "load_zip",
    "masked",
    "match",
    "merge_checkpoints",
    "merge_deltas",
    "merge_state_dicts",
    "merge_sweep",
    "merge_tensors",
    "methods",
    "permute",
    "permute_all",
    "plan_merge",
    "rank_mask",
    "repair",
    "save_masks",
    "tall_masks",
    "variance_mask",
    "verify",
    "weighted_rows",
    "weighted_sum",
    "zip_match",
    "zip_models",
    "zip_weights",
    "zip_weights_all",
]
