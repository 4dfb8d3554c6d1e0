"""mergekern merge CONFIG OUT"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..engine.manifest import Manifest
from ..engine.run import DEFAULT_MEMORY, DEFAULT_SHARD_SIZE, merge_checkpoints


def merge(
    config: Annotated[Path, typer.Argument(help="mergekit's YAML")],
    out: Annotated[Path, typer.Argument(help="folder to make; must not exist")],
    device: Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1")] = "cpu",
    memory: Annotated[
        str, typer.Option(help="bound on tensors under way, such as 500MB or 8GiB")
    ] = DEFAULT_MEMORY,
    shard_size: Annotated[
        str, typer.Option(help="largest weight file, such as 5GB")
    ] = DEFAULT_SHARD_SIZE,
    seed: Annotated[int, typer.Option(help="key of random masks (DARE)")] = 0,
    backend: Annotated[
        str, typer.Option(help="auto, or a backend that `mergekern doctor` lists")
    ] = "auto",
    host: Annotated[
        str | None,
        typer.Option(help="reproduce this tool's rounding and selection, such as mergekit"),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="go on with what an interrupted run of the same merge has done")
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no summary")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="name every file; tracebacks of errors")
    ] = False,
) -> None:
    """Merge checkpoints as a configuration says.

    Prints where the result is, what was merged and copied, and every file that was left out.
    """
    manifest = merge_checkpoints(
        config,
        out,
        device=device,
        memory=memory,
        shard_size=shard_size,
        seed=seed,
        backend=backend,
        host=host,
        resume=resume,
        progress=not quiet and sys.stderr.isatty(),
    )
    if not quiet:
        _report(manifest, verbose)


def _report(manifest: Manifest, verbose: bool) -> None:
    if not manifest.bytes_written:
        print(f"{manifest.out}: complete already")
        return
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
