"""A progress bar on stderr: bytes done, GB/s, time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields `advance(bytes)`, which may be called from any thread."""
    if not shown:
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("merging"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=4,
    ) as progress:
        task = progress.add_task("merging", total=total)
        yield lambda size: progress.advance(task, size)
