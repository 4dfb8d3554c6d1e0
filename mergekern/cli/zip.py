"""mergekern zip --model NAME --data DATA --out OUT WEIGHTS..."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..engine.collector import paused
from ..engine.defaults import DEFAULT_MEMORY
from ..errors import ArgumentError

if TYPE_CHECKING:
    from ..engine.zip_manifest import ZipManifest

_FILES = "files (.safetensors, .bin, .pt) or model folders, two or more"


def zip(
    model: Annotated[
        str,
        typer.Option(
            help="path/to/file.py:factory or package.module:factory, a callable without arguments "
            "that returns the module; or a folder with the config.json of transformers"
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help=".npz, .npy or .safetensors: x, images, the only array, or the model's inputs by "
            "name; a folder of those, or of images"
        ),
    ],
    models: Annotated[list[Path] | None, typer.Argument(metavar="WEIGHTS...", help=_FILES)] = None,
    out: Annotated[Path | None, typer.Option(help="folder to make; must not exist")] = None,
    weights: Annotated[list[Path] | None, typer.Option(help="the same as WEIGHTS")] = None,
    method: Annotated[str, typer.Option(help="zip, permute, identity or weights")] = "zip",
    until: Annotated[
        str | None, typer.Option(help="partial zip: the last space that is shared")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="share of its similarity that a merged feature keeps")
    ] = 0.3,
    beta: Annotated[
        float, typer.Option(help="share of merges that may fall within a model")
    ] = 0.125,
    outputs: Annotated[
        list[str] | None,
        typer.Option(help="fixed; free where outputs may change order; or names of those fixed"),
    ] = None,
    repair: Annotated[
        str, typer.Option(help="auto: BatchNorm's statistics anew, else REPAIR; none")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="samples in a batch, at most")] = 64,
    limit: Annotated[int | None, typer.Option(help="samples used, drawn at random")] = None,
    seed: Annotated[int, typer.Option(help="order of the samples, and of matching by weights")] = 0,
    mask: Annotated[
        str | None, typer.Option(help="input that is 0 at padding, such as attention_mask")
    ] = None,
    size: Annotated[int | None, typer.Option(help="images: side of the square, in pixels")] = None,
    mean: Annotated[
        str | None, typer.Option(help="images: a number, or one for each channel: .5,.5,.5")
    ] = None,
    std: Annotated[str | None, typer.Option(help="images: as --mean")] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="file of statistics: read if it is there, else written")
    ] = None,
    memory: Annotated[str, typer.Option(help="bound on the statistics")] = DEFAULT_MEMORY,
    device: Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1")] = "cpu",
    picture: Annotated[bool, typer.Option(help="draw zip.png (needs matplotlib)")] = True,
    dry_run: Annotated[bool, typer.Option(help="list the spaces and stop")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no summary")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="tracebacks of errors")] = False,
) -> None:
    """Merge networks that were trained apart: align their features, then average.

    Writes the weights, labels of features, a manifest (zip.json) and a picture; prints how well
    each space of features was matched.
    """
    with paused():
        from ..engine.samples import Pixels
        from ..engine.zip import Source, Zip, discover, zip_checkpoints

    given = outputs or ["fixed"]
    source = Source(
        model,
        data,
        given[0] if given in (["fixed"], ["free"]) else given,
        batch_size,
        limit,
        seed,
        Pixels(size, _numbers("mean", mean), _numbers("std", std)),
        device,
    )
    if dry_run:
        print(discover(source))
        return
    if out is None:
        raise ArgumentError.of("zip", "there is no output", "none", "--out, or --dry-run")
    manifest = zip_checkpoints(
        source,
        [*(weights or []), *(models or [])],
        out,
        Zip(method, until, alpha, beta, mask, repair, statistics, memory),
        picture=picture,
        progress=not quiet and sys.stderr.isatty(),
    )
    if not quiet:
        _report(manifest)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        expected = "numbers with commas between"
        raise ArgumentError.of("zip", f"{option} is no list", repr(text), expected) from None


def _report(manifest: ZipManifest) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Mean correlation of features of the first model with those of the others")
    table.add_column("space")
    for header in ("features", "heads", "in place", "merged", "merged within %"):
        table.add_column(header, justify="right")
    for name, space in manifest.spaces.items():
        within = None if space.merged_within is None else 100 * space.merged_within
        cells = [_shown(space.before, 3), _shown(space.after, 3), _shown(within, 1)]
        note = "" if space.merged else " (in the heads)"
        table.add_row(Text(name + note), str(space.size), str(space.heads), *cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=1_000_000)  # no name is cut short in a file or a pipe
    console.print(table)
    approximate = {s.approximate for s in manifest.spaces.values() if s.merged and s.approximate}
    if manifest.method == "zip":
        for reason in sorted(approximate):
            print(f"a zip is approximate: {reason}")
    if manifest.left_out:
        print(f"not used: {', '.join(manifest.left_out)}")
    kind = f"a partial zip until {manifest.until}" if manifest.until else manifest.method
    steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in manifest.seconds.items())
    print(
        f"{manifest.out}: {kind} of {manifest.models} models, {manifest.samples} samples, "
        f"{sum(manifest.seconds.values()):.2f} s ({steps})"
    )
    if manifest.until:
        print(f"load it by mergekern.load_zip({str(manifest.out)!r}, model)")


def _shown(number: float | None, digits: int) -> str:
    return "-" if number is None else f"{number:.{digits}f}"
