"""PEFT's adapter merging by mergekern: `with accelerated(): model.add_weighted_adapter(...)`.

`install` replaces the five functions that `peft.tuners.lora.model` binds, the same five and
`magnitude_based_pruning` in `peft.utils.merge_utils` (so `prune` as well), and the method of
`LoraModel` that makes the factors of `svd` and `..._svd` (not before PEFT 0.21, which counts scales
twice there); `uninstall` puts PEFT's own back. The other names of merge_utils stay: each is one or
two elementwise steps on tensors that exist already, so there is nothing to gain; so do `cat` and
the combinations of factors, which call these functions on small tensors. A name that was imported
before `install` stays PEFT's.

Equal to PEFT 0.19 to 0.21, for finite values and up to four task tensors (torch sums more in an
order of its own): every bit where PEFT computes in float32 or float64, random draws included,
unless a trim has to choose among equal magnitudes; lowest index first here, undefined there. Where
PEFT rounds products to 16 bits (16-bit weights) there is one rounding here, to PEFT's result type.

The SVD combinations give the best product of the rank, where PEFT has that of an SVD in float32:
nearer to it in float64, and other factors of it, up to signs and where singular values are equal.
What `ties_svd` and its like truncate has PEFT's bits, but for the rules above.

What mergekern does not serve goes to PEFT's own function, counted in `fallbacks` with its reason;
`served` counts the rest.
"""

from __future__ import annotations

import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import BackendError
from .._swaps import within
from .adapters import METHOD, svd_weighted_adapter
from .fallback import LORA, LORA_MODEL, UTILS, fallbacks, originals, served
from .functions import (
    FUNCTIONS,
    dare_linear,
    dare_ties,
    magnitude_based_pruning,
    magnitude_prune,
    task_arithmetic,
    ties,
)

SUPPORTED = ((0, 19), (0, 22))  # first version, and the first one after the last
SVD_SINCE = (0, 21)  # before, PEFT counts scales twice there and does not transpose embeddings

_REPLACED: dict[tuple[str, str], Callable[..., Any]] = {
    **{(UTILS, name): function for name, function in FUNCTIONS.items()},
    **{(LORA, name): f for name, f in FUNCTIONS.items() if name != "magnitude_based_pruning"},
    (LORA_MODEL, METHOD): svd_weighted_adapter,
}


def install() -> None:
    """Replace PEFT's functions by those below; does nothing where that is done already.

    Raises: BackendError if PEFT is missing or of a version this file was not compared with.
    """
    if originals:
        return
    replaced = dict(_REPLACED)
    if _version() < SVD_SINCE:
        del replaced[LORA_MODEL, METHOD]
    originals.update({at: getattr(pkgutil.resolve_name(at[0]), at[1]) for at in replaced})
    for (owner, name), ours in replaced.items():
        setattr(pkgutil.resolve_name(owner), name, ours)


def uninstall() -> None:
    """Put PEFT's own functions back; does nothing where they are."""
    while originals:
        (owner, name), function = originals.popitem()
        setattr(pkgutil.resolve_name(owner), name, function)


@contextmanager
def accelerated() -> Iterator[None]:
    """PEFT by mergekern inside the block, as it was before afterwards, whatever happens inside."""
    with within(originals, install, uninstall):
        yield


def _version() -> tuple[int, int]:
    """Of PEFT, if it is one of those that are supported."""
    low, high = (".".join(map(str, v)) for v in SUPPORTED)
    need = f"peft: this drop-in needs peft >= {low}, < {high}"
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise BackendError(f"{need}; it is not installed (pip install 'peft<{high}')") from None
    major, minor = (int(part) for part in version.split(".")[:2])
    if not SUPPORTED[0] <= (major, minor) < SUPPORTED[1]:
        raise BackendError(f"{need}; got {version}")
    return major, minor


__all__ = [
    "FUNCTIONS",
    "SUPPORTED",
    "accelerated",
    "dare_linear",
    "dare_ties",
    "fallbacks",
    "install",
    "magnitude_based_pruning",
    "magnitude_prune",
    "served",
    "task_arithmetic",
    "ties",
    "uninstall",
]
