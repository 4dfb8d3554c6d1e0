"""mergekern verify OUT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..engine.collector import paused
from ..engine.defaults import DEFAULT_MEMORY


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder that `mergekern merge` made")],
    inputs: Annotated[
        bool, typer.Option("--inputs", help="read the inputs again, too, and compare them")
    ] = False,
    replay: Annotated[
        list[str] | None,
        typer.Option(help='merge tensors of these names again and compare, such as "*.attn.*"'),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="bound on tensors under way in a replay")
    ] = DEFAULT_MEMORY,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="problems only")] = False,
) -> None:
    """Compare an output with its manifest: every tensor, every file; inputs and results if asked.

    Exit code 1 if anything is not as recorded.
    """
    with paused():
        from ..engine.verify import verify as compare

    found = compare(
        out,
        inputs=inputs,
        replay=replay or (),
        memory=memory,
        progress=not quiet,
    )
    for problem in found.problems:
        print(problem)
    if not quiet:
        for note in found.notes:
            print(f"note: {note}")
        compared = [f"{found.tensors} tensors", f"{found.files} files"]
        if inputs:
            compared.append(f"{found.inputs} tensors of the inputs")
        if replay:
            compared.append(f"{found.replayed} tensors merged again")
        outcome = f"{len(found.problems)} not as recorded" if found.problems else "all as recorded"
        print(f"{found.out}: {', '.join(compared)}: {outcome}")
    if found.problems:
        raise typer.Exit(1)
