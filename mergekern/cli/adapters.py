"""mergekern adapters ADAPTER... --out OUT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..engine.collector import paused
from ..engine.defaults import DEFAULT_MEMORY
from ..errors import ArgumentError


def adapters(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER...", help="LoRA adapters: folders of PEFT, files of kohya or diffusers"
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="the merged adapter, as the inputs are; with --into a folder; must not exist"
        ),
    ],
    into: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="a model: OUT is that model with the result in its weights"
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="cat, svd; knots_ or core_ before ta, ties or a method of `merge` with a base, or "
            "_svd behind one; PEFT's linear, ties, dare_linear, dare_ties, magnitude_prune"
        ),
    ] = "knots_ties",
    weight: Annotated[
        list[float] | None, typer.Option(help="one for all adapters, or one for each, in order")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="rank of the result, at most")] = None,
    density: Annotated[float | None, typer.Option(help="share of each task vector kept")] = None,
    lambda_: Annotated[
        float | None, typer.Option("--lambda", help="factor on the merged task vector")
    ] = None,
    union: Annotated[
        bool, typer.Option("--union", help="a module that an adapter lacks is unchanged by it")
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(
            help="knots: its absolute cut, thresholds and rules of signs; peft: its rules"
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help=f"with --into: bytes of slices under way ({DEFAULT_MEMORY})"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of random masks")] = 0,
    report: Annotated[
        Path | None,
        typer.Option(
            help="folder for report.png, of spectra, alignment and what is kept (needs "
            "matplotlib), and report.json"
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no summary")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="tracebacks of errors")] = False,
) -> None:
    """Merge LoRA adapters of one base into one, or into that base, without forming their matrices.

    Prints the ranks, and what a truncation left out. --method cat folds one adapter as it is.
    """
    if out.exists():
        raise ArgumentError.of("adapters", "OUT exists", out, "a folder to make")
    if memory is not None and into is None:
        raise ArgumentError.of("adapters", "--memory is for --into", memory, "both, or neither")
    with paused():
        from ..adapters.merge import merge_adapters
    if report is not None:  # the room of alignment takes half a second
        from ..adapters.picture import check_report

        check_report(report)

    given: dict[str, Any] = {"density": density, "lambda_": lambda_}
    merged = merge_adapters(
        folders,
        method,
        out=out,
        into=into,
        memory=DEFAULT_MEMORY if memory is None else memory,
        progress=not quiet,
        rank=rank,
        union=union,
        host=host,
        seed=seed,
        weight=weight[0] if weight and len(weight) == 1 else weight,
        **{name: value for name, value in given.items() if value is not None},
    )
    if report is not None:
        from ..adapters.picture import write_report
        from ..adapters.study import study_adapters

        title = f"{out}, by {method}"
        write_report(
            study_adapters(folders, merged), report, names=[*map(str, folders)], title=title
        )
    if quiet:
        return
    ranks = [f.rank for f in merged.modules.values()]
    print(f"{out}: {len(ranks)} modules of rank {min(ranks)} to {max(ranks)}, by {method}")
    if merged.lost:
        worst = max(merged.lost, key=lambda name: merged.lost[name])
        print(f"truncated: {merged.lost[worst]:.2%} of the norm left out at most, in {worst}")
