"""Tens of thousands of mutated safetensors headers and configurations: no crash, no hang.

`python -m bench.fuzz --count 10000` prints what came of each kind, and every finding with the
number of its case, which `python tests/fuzzing.py KIND NUMBER NUMBER+1` runs again. Its status is
1 if there is one.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from bench import paths  # noqa: F401

import fuzzing


def main(
    count: Annotated[int, typer.Option(help="cases of each kind")] = 10_000,
    first: Annotated[int, typer.Option(help="number of the first case")] = 0,
) -> None:
    found = False
    for kind in ("safetensors", "configuration"):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            report = fuzzing.run(kind, first, count, Path(folder))
        print(
            f"{kind}: {count} cases, {report.outcomes['refused']} refused in one line, "
            f"{report.outcomes['accepted']} accepted, {len(report.findings)} findings; at most "
            f"{report.memory / 2**20:.0f} MiB, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        for case, what in report.findings.items():
            print(f"case {case}: {what}")
        found |= bool(report.findings)
    raise typer.Exit(found)


if __name__ == "__main__":
    typer.run(main)
