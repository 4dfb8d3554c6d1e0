"""A progress bar on stderr: bytes done, GB/s, time left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Bar:
    """What is to be done and what is done, in bytes; may be called from any thread."""

    def expect(self, size: int) -> None:
        """So much more will be done."""

    def advance(self, size: int) -> None:
        """So much more is done."""


@contextlib.contextmanager
def bar(*, shown: bool) -> Iterator[Bar]:
    if not shown:
        yield Bar()
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
        task = progress.add_task("merging", total=0)

        class Shown(Bar):
            total = 0

            def expect(self, size: int) -> None:
                self.total += size
                progress.update(task, total=self.total)

            def advance(self, size: int) -> None:
                progress.advance(task, size)

        yield Shown()
