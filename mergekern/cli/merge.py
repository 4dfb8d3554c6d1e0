"""mergekern merge CONFIG OUT"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engine.collector import paused
from ..engine.defaults import DEFAULT_MEMORY, DEFAULT_SHARD_SIZE
from ..engine.ranks import is_first
from ..errors import ArgumentError, MergekernError
from .stopping import Stopped

if TYPE_CHECKING:
    from ..engine.manifest import Manifest
    from ..engine.outlook import Outlook
    from ..engine.plan import Plan
    from ..engine.progress import Bar, JsonLines

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
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="merge what fits, copy the rest from the base: 'vision_model.*'; repeatable",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="copy what fits from the base: '*.bias'; repeatable",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=V,V..",
            help="several merges from one read, each in a folder of OUT: density=0.1,0.2",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    statistics: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="where thresholds are kept for the next merge of these models; "
            "none: nowhere; by default beside OUT",
            rich_help_panel=_PLACE,
        ),
    ] = "",
    report: Annotated[
        str | None,
        typer.Option(
            metavar="html|png",
            help="put a page of norms, cosines, kept and conflicting shares into OUT",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="go on with what an interrupted run of the same merge has done",
            rich_help_panel=_RESULT,
        ),
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="say what would be read and written and how long it would take, and stop",
            rich_help_panel=_SHOWN,
        ),
    ] = False,
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

    Prints where the result is, what was merged and copied, and every file that was left out. A
    merge that is interrupted goes on where it stopped when the same command is given again.
    """
    with paused():
        from ..engine.manifest import MANIFEST
        from ..engine.memory import return_freed
        from ..engine.progress import JsonLines, bar
        from ..engine.run import merge_checkpoints, merge_sweep, plan_merge

    options: dict[str, Any] = {
        "memory": memory,
        "shard_size": shard_size,
        "device": device,
        "seed": seed,
        "backend": backend,
        "host": host,
        "only": only or (),
        "skip": skip or (),
    }
    quiet = quiet or not is_first()  # one rank speaks, but for errors
    kept = {"none": False, "": True}.get(statistics, statistics)
    events = JsonLines() if as_json and is_first() else None
    shown: Bar = events or bar(shown=not quiet)
    return_freed()
    try:
        points = None if sweep is None else _swept(sweep)
        if dry_run:
            _foretell(*plan_merge(config, out, sweep=points, **options), events)
            return
        options |= {
            "resume": resume,
            "statistics": kept,
            "report": report,
            "progress": shown,
            "distributed": True,
        }
        if points is None:
            manifests = [merge_checkpoints(config, out, **options)]
        else:
            manifests = list(merge_sweep(config, out, points, **options).values())
    except Stopped as stopped:
        again = "the same command" if resume else "the same command without --no-resume"
        stopped.text += f", {shown.share} done; {again} continues where it stopped"
        if events:
            events.event("error", kind="Stopped", message=stopped.text)
        raise
    except (MergekernError, OSError) as error:
        if events:
            events.event("error", kind=type(error).__name__, message=str(error))
        raise
    for manifest in manifests:
        if events:
            about = dataclasses.asdict(manifest)
            events.event("done", manifest=manifest.out / MANIFEST, **about)
        elif not quiet:
            _report(manifest, verbose)


def _swept(given: Sequence[str]) -> dict[str, list[str]]:
    """{"density": ["0.1", "0.2"]} of "density=0.1,0.2"."""
    points: dict[str, list[str]] = {}
    for each in given:
        name, equals, values = each.partition("=")
        if not equals or name in points:
            raise ArgumentError.of("--sweep", "not understood", repr(each), "density=0.1,0.2, once")
        points[name] = values.split(",")
    return points


def _foretell(plan: Plan, outlook: Outlook, events: JsonLines | None) -> None:
    """What a dry run says: amounts, and times by the rates that were measured."""
    if events:
        figures = {k: v if math.isfinite(v) else None for k, v in vars(outlook).items()}
        seconds = round(outlook.seconds, 3)
        count = len(plan.tasks)
        events.event("plan", tensors=count, **figures, seconds=seconds, details=plan.describe())
        return
    merged = sum(task.arguments is not None for task in plan.tasks)
    passes = "one pass" if outlook.passes == 1 else f"{outlook.passes} passes"
    print(f"{plan.method}: {merged} tensors to merge, {len(plan.tasks) - merged} to copy")
    print(
        f"reads {_size(outlook.bytes_read)} in {passes}, writes {_size(outlook.bytes_written)}, "
        f"needs at least {outlook.peak / 2**20:.1f} MiB of --memory"
    )
    rates = {
        "reading": outlook.read_rate,
        "computing": outlook.compute_rate,
        "writing": outlook.write_rate,
    }
    at = ", ".join(f"{k} {_size(v)}/s" for k, v in rates.items() if math.isfinite(v))
    print(f"takes about {timedelta(seconds=round(outlook.seconds))} at {at}")


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _report(manifest: Manifest, verbose: bool) -> None:
    if not manifest.bytes_written:
        print(f"{manifest.out}: complete already")
        return
    moved = _size(manifest.bytes_read + manifest.bytes_written)
    print(
        f"{manifest.out}: {manifest.method}, {manifest.merged} tensors merged, "
        f"{manifest.copied} copied, {moved} in {manifest.seconds:.2f} s"
    )
    if manifest.dropped:
        print(f"dropped as the configuration says: {', '.join(manifest.dropped)}")
    if manifest.left_out:
        print(f"not carried along from the base folder: {', '.join(manifest.left_out)}")
    if verbose:
        print(f"weights: {', '.join(manifest.weights)}")
        print(f"carried along: {', '.join(manifest.carried) or 'nothing'}")
