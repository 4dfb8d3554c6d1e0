"""MERGEKERN=1 for mergekit's own commands: a start-up line in site-packages, off unless asked for.

`write()` puts one line into site-packages. At every start of Python it looks at MERGEKERN and does
nothing unless that is 1. Then it runs this file alone, which must import nothing heavy: it waits
for `mergekit.merge_methods` to be imported, and installs the drop-in after that.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

AWAITED = "mergekit.merge_methods"
# Nothing when the variable is unset, and nothing when mergekern is gone.
LINE = (
    'import os; os.environ.get("MERGEKERN") == "1" and exec("'
    "import importlib.util, os, runpy; s = importlib.util.find_spec('mergekern'); "
    "p = s and os.path.join(os.path.dirname(s.origin), 'integrations', 'mergekit', 'hook.py'); "
    "p and os.path.isfile(p) and runpy.run_path(p)['wait']()"
    '")\n'
)


def path() -> Path:
    """The file that holds the line; site-packages of the running Python."""
    return Path(sysconfig.get_path("purelib")) / "mergekern_mergekit.pth"


def write() -> Path:
    """Let MERGEKERN=1 install the drop-in in every Python of this environment."""
    path().write_text(LINE)
    return path()


def remove() -> Path:
    """Take the line away; nothing else was written."""
    path().unlink(missing_ok=True)
    return path()


class Waiting(MetaPathFinder):
    """Finds nothing itself; has the drop-in installed once mergekit's methods are imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_install(module: ModuleType) -> None:
                execute(module)
                _install()

            spec.loader.exec_module = then_install  # type: ignore[method-assign]
        return spec


def _install() -> None:
    from mergekern import MergekernError
    from mergekern.integrations import mergekit

    try:
        mergekit.install()
    except MergekernError as error:
        warnings.warn(f"MERGEKERN=1 has no effect: {error}", RuntimeWarning, stacklevel=2)


def wait() -> None:
    """Install now if mergekit's methods are imported already, else as soon as they are."""
    if AWAITED in sys.modules:
        _install()
    else:
        sys.meta_path.insert(0, Waiting())
