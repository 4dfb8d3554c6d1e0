"""mergekern under mergekit: its methods on these kernels, its executor without quadratic steps.

Ways in: `install()` in Python; the commands `mergekern-yaml` and `mergekern-pytorch`; or, after
`mergekern hook on`, the variable MERGEKERN=1 with mergekit's own commands. docs/mergekit.md says
what differs from mergekit.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys

from ...errors import BackendError, MergekernError
from .._swaps import Swaps
from .calls import MODE, Counts, counts

SUPPORTED = ("0.1.4", "0.1.5")

_in_place: Swaps | None = None
_methods: tuple[str, ...] = ()


def install(*, host: bool | None = None) -> tuple[str, ...]:
    """Replace mergekit's methods and executor in this process; the names of the methods.

    host: False gives mergekern's most accurate results; True passes `host="mergekit"` to the
    methods that can reproduce mergekit's own rules; None asks the variable MERGEKERN_HOST (1).
    Called again, it only changes `host`. If anything fails, nothing stays replaced.

    Result: `uninstall()` puts every object back. Calls that mergekern cannot serve (`counts()`
    gives them with their reasons) go to mergekit's own code.
    Raises: BackendError if mergekit is missing or of another version than SUPPORTED.
    """
    global _in_place, _methods
    if _in_place is None:
        version = host_version()
        from . import executor, native, older

        with Swaps() as swaps:
            methods = (older if version == "0.1.4" else native).replace(swaps)
            executor.replace(swaps)
        _in_place, _methods = swaps, tuple(sorted(methods))
    MODE.host = os.environ.get("MERGEKERN_HOST") == "1" if host is None else host
    MODE.installed = True
    return _methods


def uninstall() -> None:
    """Put back every object that `install()` replaced; without it, nothing."""
    global _in_place, _methods
    MODE.installed = MODE.host = False
    if _in_place is not None:
        _in_place.take_back()
    _in_place, _methods = None, ()


def host_version() -> str:
    """The version of mergekit, which must be one of SUPPORTED."""
    known = " or ".join(SUPPORTED)
    remedy = f"pip install mergekit=={SUPPORTED[-1]}"
    try:
        version = importlib.metadata.version("mergekit")
    except importlib.metadata.PackageNotFoundError:
        raise BackendError(
            f"mergekit: not installed; got no package; expected {known} ({remedy})"
        ) from None
    if version not in SUPPORTED:
        raise BackendError(f"mergekit: unknown version; got {version}; expected {known} ({remedy})")
    return version


def _command(script: str) -> None:
    try:
        install()
    except MergekernError as error:
        print(f"mergekern: {error}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"mergekit.scripts.{script}").main()


def yaml_main() -> None:
    """mergekern-yaml: mergekit-yaml with the drop-in installed."""
    _command("run_yaml")


def pytorch_main() -> None:
    """mergekern-pytorch: mergekit-pytorch with the drop-in installed."""
    _command("merge_raw_pytorch")


__all__ = [
    "SUPPORTED",
    "Counts",
    "counts",
    "host_version",
    "install",
    "pytorch_main",
    "uninstall",
    "yaml_main",
]
