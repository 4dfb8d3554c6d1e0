"""Whole merges beside `mergekit-pytorch`, from a cold Python: a ViT-B, and thousands of tensors.

`python -m bench.table_mergekit` prints the table and keeps it under bench/results. Seconds of the
clock: the least of three runs of ours, the only one of mergekit's. The time that takes grows with
the square of the number of tensors, so it is given fewer of them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import paths  # noqa: F401

from bench_merge_checkpoints import (
    CONFIG,
    Process,
    Python,
    mergekern_merge,
    vit_base,
    write_models,
)
from bench_tiny_tensors import LINEAR
from report import describe

RESULTS = Path(__file__).parent / "results"
PEER = Path(sys.executable).with_name("mergekit-pytorch")
THEIRS, OURS = (1000, 2000, 4000), (1000, 4000, 20_000)


def ours(folder: Path, config: str) -> float:
    path = folder / "ours.yml"
    path.write_text(config.format(folder=folder, suffix=""))
    return min(mergekern_merge(path, folder / "out").seconds for _ in range(3))


def theirs(folder: Path, config: str) -> float:
    path = folder / "theirs.yml"
    path.write_text(config.format(folder=folder, suffix="/model.safetensors"))
    taken = Process(str(PEER), str(path), str(folder / "peer")).seconds
    shutil.rmtree(folder / "peer")
    return taken


def rows() -> Iterator[dict[str, Any]]:
    yield {"name": "import torch", "mergekern": min(Python("import torch").seconds for _ in "123")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, vit_base(768, 12), torch.bfloat16)
        yield {
            "name": "ViT-B, ties of 3",
            "mergekern": ours(folder, CONFIG),
            "mergekit": theirs(folder, CONFIG),
        }
    raw = LINEAR.replace("/a", "/a{suffix}").replace("/b", "/b{suffix}").replace("/c", "/c{suffix}")
    for count in sorted({*OURS, *THEIRS}):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            names = [f"layers.{i}.weight" for i in range(count)]
            write_models(folder, dict.fromkeys(names, (4,)), torch.bfloat16)
            row: dict[str, Any] = {"name": f"{count} tensors of 4 elements, linear of 3"}
            if count in OURS:
                row["mergekern"] = ours(folder, raw)
            if count in THEIRS:
                row["mergekit"] = theirs(folder, raw)
            yield row


def cells(row: Mapping[str, Any]) -> list[str]:
    both = "mergekern" in row and "mergekit" in row
    times = [f"{row[who]:.2f}" if who in row else "" for who in ("mergekern", "mergekit")]
    return [row["name"], *times, f"{row['mergekit'] / row['mergekern']:.1f}" if both else ""]


def main() -> None:
    table = Table(title="whole merges from a cold Python, seconds")
    for title in ("merge", "mergekern", "mergekit", "times"):
        table.add_column(title, justify="left" if title == "merge" else "right")
    found = []
    for row in rows():
        found.append(row)
        table.add_row(*cells(row))
        print(row, flush=True)
    Console(width=120).print(table)
    text = json.dumps({"machine": describe(), "rows": found}, indent=1)
    (RESULTS / "large-mergekit.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
