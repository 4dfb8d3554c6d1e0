"""PEFT's adapter merging by mergekern: `with accelerated(): model.add_weighted_adapter(...)`.

`install` replaces the five functions that `peft.tuners.lora.model` binds, the same five and
`magnitude_based_pruning` in `peft.utils.merge_utils` (so `prune` as well); `uninstall` puts PEFT's
own back. The other names of merge_utils stay: each is one or two elementwise steps on tensors that
exist already, so there is nothing to gain. A name that was imported before `install` stays PEFT's.

Equal to PEFT 0.19 to 0.21, for finite values and up to four task tensors (torch sums more in an
order of its own): every bit where PEFT computes in float32 or float64, random draws included,
unless a trim has to choose among equal magnitudes; lowest index first here, undefined there. Where
PEFT rounds products to 16 bits (16-bit weights) there is one rounding here, to PEFT's result type.

What mergekern does not serve goes to PEFT's own function, counted in `fallbacks` with its reason;
`served` counts the rest.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import BackendError
from .fallback import UTILS, fallbacks, originals, served
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

_LORA = "peft.tuners.lora.model"


def install() -> None:
    """Replace PEFT's functions by those below; does nothing where that is done already.

    Raises: BackendError if PEFT is missing or of a version this file was not compared with.
    """
    if originals:
        return
    _check_version()
    found = {}
    for module in (UTILS, _LORA):
        names = FUNCTIONS if module == UTILS else FUNCTIONS.keys() - {"magnitude_based_pruning"}
        for name in names:
            found[module, name] = getattr(importlib.import_module(module), name)
    originals.update(found)
    for module, name in found:
        setattr(importlib.import_module(module), name, FUNCTIONS[name])


def uninstall() -> None:
    """Put PEFT's own functions back; does nothing where they are."""
    while originals:
        (module, name), function = originals.popitem()
        setattr(importlib.import_module(module), name, function)


@contextmanager
def accelerated() -> Iterator[None]:
    """PEFT by mergekern inside the block, as it was before afterwards, whatever happens inside."""
    before = bool(originals)
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def _check_version() -> None:
    low, high = (".".join(map(str, v)) for v in SUPPORTED)
    need = f"peft: this drop-in needs peft >= {low}, < {high}"
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise BackendError(f"{need}; it is not installed (pip install 'peft<{high}')") from None
    major, minor = (int(part) for part in version.split(".")[:2])
    if not SUPPORTED[0] <= (major, minor) < SUPPORTED[1]:
        raise BackendError(f"{need}; got {version}")


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
