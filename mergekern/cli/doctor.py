"""mergekern doctor"""

from __future__ import annotations

import platform

from .. import __version__
from ..engine.collector import paused


def doctor() -> None:
    """Say for every backend and op whether it is available here, or why not."""
    with paused():
        import torch
        from rich.console import Console
        from rich.table import Table

        from ..dispatch import BACKENDS, OPS, emulating, why_not

    console = Console()
    console.print(
        f"mergekern {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {_threads()} threads",
        highlight=False,
    )
    table = Table("op", *BACKENDS)
    reasons: dict[str, None] = {}
    for op in OPS:
        cells = []
        for backend in BACKENDS:
            emulated = backend == "cuda" and emulating()
            device = "cuda" if backend in ("cuda", "triton") and not emulated else "cpu"
            reason = why_not(backend, op, device)
            cells.append("-" if reason else "emulated" if emulated else "yes")
            if reason:
                reasons[reason] = None
        table.add_row(op, *cells)
    console.print(table)
    for reason in reasons:
        console.print(reason, highlight=False, soft_wrap=True)


def _threads() -> int:
    import torch

    from ..dispatch import why_not

    if why_not("cpu", "weighted_sum", "cpu"):
        return torch.get_num_threads()
    from ..backends.cpu.runtime import threads

    return threads()
