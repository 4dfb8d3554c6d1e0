"""ZipIt's matching and statistics by mergekern: `install()`, then the original scripts.

The names of `matching_functions` and `metric_calculators` below are replaced in these modules of a
ZipIt checkout on sys.path, and where `model_merger` and `utils` have bound them; `uninstall` puts
the originals back. Or import them from here: `from mergekern.integrations.zipit import
match_tensors_zipit`. The other names stay the original's.

Groups and permutations are the original's wherever these are defined: the covariance is more exact
here, which may decide between similarities that are equal in float32. See the functions for what
the original gets wrong; install(host=True) gives its own results there too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from .._swaps import Swaps, host_module, require_parameters, within
from . import matching_functions as _matching
from .matching_functions import (
    add_bias_to_mats,
    match_tensors_identity,
    match_tensors_permute,
    match_tensors_zipit,
)
from .metric_calculators import CovarianceMetric, compute_correlation

_NAMES = {
    "matching_functions": (
        "compute_correlation",
        "match_tensors_identity",
        "match_tensors_permute",
        "match_tensors_zipit",
    ),
    "metric_calculators": ("CovarianceMetric", "compute_correlation"),
}
_BINDING = ("model_merger", "utils")  # modules that may have imported some of these names

_installed: list[Swaps] = []


def install(*, host: bool = False) -> None:
    """Replace ZipIt's functions; does nothing where that is done already.

    host: reproduce what the original gets wrong, too (see `match_tensors_zipit`).
    Raises: BackendError if ZipIt is not on sys.path, or its functions have other parameters.
    """
    if _installed:
        return
    with Swaps() as swaps:
        originals: dict[Any, Any] = {}
        for module, names in _NAMES.items():
            theirs = host_module("ZipIt", module)
            for name in names:
                new = globals()[name]
                require_parameters("ZipIt", theirs, name, new)
                originals[swaps.attribute(theirs, name, new)] = new
        for module in _BINDING:
            bound = vars(sys.modules[module]) if module in sys.modules else {}
            for name, value in [*bound.items()]:
                if (inspect.isroutine(value) or inspect.isclass(value)) and value in originals:
                    swaps.attribute(sys.modules[module], name, originals[value])
        swaps.item(_matching.exact, "host", host)
        _installed.append(swaps)


def uninstall() -> None:
    """Put ZipIt's own functions back; does nothing where they are."""
    while _installed:
        _installed.pop().take_back()


@contextmanager
def accelerated(*, host: bool = False) -> Iterator[None]:
    """ZipIt by mergekern inside the block, as it was before afterwards."""
    with within(_installed, partial(install, host=host), uninstall):
        yield


__all__ = [
    "CovarianceMetric",
    "accelerated",
    "add_bias_to_mats",
    "compute_correlation",
    "install",
    "match_tensors_identity",
    "match_tensors_permute",
    "match_tensors_zipit",
    "uninstall",
]
