"""mergekern: the compiled engine under model merging.

A public name is imported when it is first used: `import mergekern` by itself loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .adapters.files import load_adapter, save_adapter
    from .adapters.merge import merge_adapters
    from .adapters.study import study_adapters
    from .align.declare import declare_spaces
    from .align.discover import discover_spaces
    from .align.matching.match import Match, match
    from .align.merging.apply import apply
    from .align.merging.partial import PartialZip
    from .align.merging.repair import repair
    from .align.regmean import regmean
    from .align.spaces import Spaces
    from .align.statistics.collect import collect_statistics
    from .align.statistics.statistics import Statistics
    from .align.zip_models import zip_models
    from .engine.fold import fold_adapter
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
    from .methods.coefficients import MergedModel
    from .methods.emr import emr, emr_state_dicts
    from .methods.masks import consensus_mask, masked, tall_masks
    from .methods.merge import merge_state_dicts, merge_tensors
    from .methods.soup import greedy_soup
    from .ops.assign import assign, assign_heads
    from .ops.coefficient_gradients import coefficient_gradients
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

__all__ = [
    "Adapter",
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
    "MergedModel",
    "MergekernError",
    "PartialZip",
    "Spaces",
    "Statistics",
    "Threshold",
    "Verification",
    "apply",
    "assign",
    "assign_heads",
    "coefficient_gradients",
    "collect_statistics",
    "consensus_mask",
    "correlation",
    "covariance",
    "declare_spaces",
    "discover_spaces",
    "emr",
    "emr_state_dicts",
    "fold_adapter",
    "gram",
    "greedy_soup",
    "kth_magnitude",
    "load_adapter",
    "load_masks",
    "load_zip",
    "masked",
    "match",
    "merge_adapters",
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
    "regmean",
    "repair",
    "save_adapter",
    "save_masks",
    "study_adapters",
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

_MODULES = {
    "adapters.adapter": "Adapter",
    "adapters.files": "load_adapter save_adapter",
    "adapters.merge": "merge_adapters",
    "adapters.study": "study_adapters",
    "align.declare": "declare_spaces",
    "align.discover": "discover_spaces",
    "align.matching.match": "Match match",
    "align.merging.apply": "apply",
    "align.merging.partial": "PartialZip",
    "align.merging.repair": "repair",
    "align.regmean": "regmean",
    "align.spaces": "Spaces",
    "align.statistics.collect": "collect_statistics",
    "align.statistics.statistics": "Statistics",
    "align.zip_models": "zip_models",
    "engine.fold": "fold_adapter",
    "engine.manifest": "Manifest",
    "engine.run": "merge_checkpoints merge_sweep plan_merge",
    "engine.verify": "Verification verify",
    "engine.zip_folder": "load_zip",
    "errors": "ArgumentError BackendError CheckpointError ConfigError ConfigWarning MergekernError",
    "keep": "Band Bernoulli MagPrune Mask Threshold",
    "methods": "methods",
    "methods.bits": "load_masks save_masks",
    "methods.coefficients": "MergedModel",
    "methods.emr": "emr emr_state_dicts",
    "methods.masks": "consensus_mask masked tall_masks",
    "methods.merge": "merge_state_dicts merge_tensors",
    "methods.soup": "greedy_soup",
    "ops.assign": "assign assign_heads",
    "ops.coefficient_gradients": "coefficient_gradients",
    "ops.covariance": "Covariance correlation covariance",
    "ops.gram": "gram",
    "ops.kth_magnitude": "kth_magnitude",
    "ops.merge_deltas": "merge_deltas",
    "ops.permute": "permute permute_all",
    "ops.rank_mask": "rank_mask",
    "ops.variance_mask": "variance_mask",
    "ops.weighted_rows": "weighted_rows",
    "ops.weighted_sum": "weighted_sum",
    "ops.zip_match": "zip_match",
    "ops.zip_weights": "zip_weights zip_weights_all",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


class _Package(ModuleType):
    """The package: a public name is looked up where it lives, and kept."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # `methods` is a function: the import of the folder of that name would put itself there.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
