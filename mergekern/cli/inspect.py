"""mergekern inspect PATH"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ..engine.collector import paused


def inspect(
    path: Annotated[Path, typer.Argument(help="weight file or model folder")],
    filter: Annotated[str, typer.Option(help="only tensors whose name contains this")] = "",
) -> None:
    """List the tensors of a checkpoint: name, dtype, shape, size."""
    with paused():
        import torch
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        from ..check import name_of
        from ..engine.checkpoint import Checkpoint
        from ..engine.files import nbytes

    checkpoint = Checkpoint(path)
    table = Table("tensor", "dtype", "shape")
    table.add_column("bytes", justify="right")
    sizes: Counter[str] = Counter()
    elements = shown = 0
    for key, signature in checkpoint.signatures.items():
        if filter not in key:
            continue
        dtype, size = name_of(signature.dtype), nbytes(signature)
        sizes[dtype] += size
        elements += torch.Size(signature.shape).numel()
        shown += 1
        table.add_row(Text(key), dtype, str(list(signature.shape)), f"{size:,}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=1_000_000)  # no name is cut short in a file or a pipe
    console.print(table)
    by_dtype = ", ".join(f"{size / 1e6:.2f} MB {dtype}" for dtype, size in sizes.items())
    console.print(f"{shown} tensors, {elements:,} elements, {by_dtype or '0 MB'}", highlight=False)
    checkpoint.close()
