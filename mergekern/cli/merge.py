"""mergekern merge CONFIG OUT"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..engine.defaults import DEFAULT_MEMORY, DEFAULT_SHARD_SIZE
from ..errors import MergekernError
from .stopping import Stopped

if TYPE_CHECKING:
    from ..engine.progress import Bar
    from ..engine.run import Manifest

_PLACE, _RESULT, _SHOWN = "Memory and device", "Result", "What is shown"


def merge(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="mergekit's YAML")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to make; must not exist")],
    memory: Annotated[
        str,
        typer.Option(help="bound on tensors under way: 500MB, 8GiB", rich_help_panel=_PLACE),
    ] = DEFAULT_MEMORY,
    device: Annotated[
        str, typer.Option(help="where to compute: cpu, cuda, cuda:1", rich_help_panel=_PLACE)
    ] = "cpu",
    backend: Annotated[
        str,
        typer.Option(
            help="auto, or a backend that `mergekern doctor` lists", rich_help_panel=_PLACE
        ),
    ] = "auto",
    shard_size: Annotated[
        str, typer.Option(help="largest weight file, such as 5GB", rich_help_panel=_RESULT)
    ] = DEFAULT_SHARD_SIZE,
    seed: Annotated[
        int, typer.Option(help="key of random masks (DARE)", rich_help_panel=_RESULT)
    ] = 0,
    host: Annotated[
        str | None,
        typer.Option(
            help="reproduce this tool's rounding and selection, such as mergekit",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="no progress, no summary", rich_help_panel=_SHOWN),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="name every file; tracebacks of errors",
            rich_help_panel=_SHOWN,
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="events as JSON lines on stdout: plan, progress, done, error",
            rich_help_panel=_SHOWN,
        ),
    ] = False,
) -> None:
    """Merge checkpoints as a configuration says.

    Prints where the result is, what was merged and copied, and every file that was left out.
    """
    from ..engine.progress import JsonLines, bar
    from ..engine.run import merge_checkpoints

    events = JsonLines() if as_json else None
    shown: Bar = events or bar(shown=not quiet)
    try:
        manifest = merge_checkpoints(
            config,
            out,
            device=device,
            memory=memory,
            shard_size=shard_size,
            seed=seed,
            backend=backend,
            host=host,
            progress=shown,
        )
    except Stopped as stopped:
        stopped.text += f", {shown.share} done; the same command continues where it stopped"
        if events:
            events.event("error", kind="Stopped", message=stopped.text)
        raise
    except (MergekernError, OSError) as error:
        if events:
            events.event("error", kind=type(error).__name__, message=str(error))
        raise
    if events:
        events.event("done", **dataclasses.asdict(manifest))
    elif not quiet:
        _report(manifest, verbose)


def _report(manifest: Manifest, verbose: bool) -> None:
    moved = (manifest.bytes_read + manifest.bytes_written) / 1e9
    print(
        f"{manifest.out}: {manifest.method}, {manifest.merged} tensors merged, "
        f"{manifest.copied} copied, {moved:.2f} GB in {manifest.seconds:.2f} s"
    )
    if manifest.dropped:
        print(f"dropped as the configuration says: {', '.join(manifest.dropped)}")
    if manifest.left_out:
        print(f"not carried along from the base folder: {', '.join(manifest.left_out)}")
    if verbose:
        print(f"weights: {', '.join(manifest.weights)}")
        print(f"carried along: {', '.join(manifest.carried) or 'nothing'}")
