"""FusionBench's merging algorithms by mergekern: the same names, constructors and results.

`method._target_=mergekern.integrations.fusion_bench.TiesMergingAlgorithm` in the place of
FusionBench's path switches one on. Each class here is a subclass of FusionBench's own that
overrides `run`, and for CLIP's RegMean how moments are taken; nothing is patched, as FusionBench
binds its functions by name in dozens of modules. docs/fusion_bench.md says what is equal bit for
bit and what differs.
"""

from __future__ import annotations

import importlib

from ...errors import BackendError
from . import averages, emr, model_stock, regmean, spectral, task_vectors, wudi
from .knots import subspace_alignment
from .regmean import merging_with_regmean_weights, regmean_params_merge
from .wudi import wudi_merging

__all__ = [
    "merging_with_regmean_weights",
    "regmean_params_merge",
    "subspace_alignment",
    "wudi_merging",
]

# Name here: what overrides `run`, and where FusionBench has the class of that name.
_CLASSES: dict[str, tuple[type, str]] = {
    "SimpleAverageAlgorithm": (averages.SimpleAverage, "simple_average"),
    "WeightedAverageAlgorithm": (averages.WeightedAverage, "weighted_average.weighted_average"),
    "TaskArithmeticAlgorithm": (averages.TaskArithmetic, "task_arithmetic.task_arithmetic"),
    "TiesMergingAlgorithm": (task_vectors.Ties, "ties_merging.ties_merging"),
    "DareTaskArithmetic": (task_vectors.DareTaskArithmetic, "dare.task_arithmetic"),
    "DareTiesMerging": (task_vectors.DareTies, "dare.ties_merging"),
    "MagMaxAlgorithm": (averages.MagMax, "magmax.magmax"),
    "EMRMerging": (emr.EMR, "emr_merging.emr_merging"),
    "ModelStock": (model_stock.ModelStock, "model_stock.model_stock"),
    "WUDIMerging": (wudi.WUDI, "wudi.wudi"),
    "RegMeanAlgorithm": (regmean.RegMean, "regmean.regmean"),
    "RegMeanAlgorithmForCLIP": (regmean.RegMeanForCLIP, "regmean.clip_regmean"),
    "TaskSingularVectorMerging": (spectral.TSVM, "task_singular_vector.TSVM"),
    "IsotropicMergingInCommonSubspace": (spectral.IsoC, "isotropic_merging.iso"),
    "ISO_C_Merge": (spectral.IsoC, "isotropic_merging.iso"),
    "IsotropicMergingInCommonAndTaskSubspace": (spectral.IsoCTS, "isotropic_merging.iso"),
    "ISO_CTS_Merge": (spectral.IsoCTS, "isotropic_merging.iso"),
    "SingularValueCalibrationArithmeticTask": (
        spectral.CalibratedTaskArithmetic,
        "singular_value_calibration.task_arithmetic",
    ),
}


def __getattr__(name: str) -> type:
    """The subclass of that name, made when it is asked for: only then FusionBench is imported."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    ours, module = _CLASSES[name]
    try:
        host = getattr(importlib.import_module(f"fusion_bench.method.{module}"), name)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "fusion_bench":
            raise
        raise BackendError(
            f"fusion_bench: no {name}; got {error.msg}; expected fusion-bench 0.2.33 "
            "(pip install fusion-bench)"
        ) from None
    made = type(name, (ours, host), {"__module__": __name__, "__doc__": ours.__doc__})
    globals()[name] = made
    return made


def __dir__() -> list[str]:
    return sorted({*globals(), *_CLASSES})
