"""The README's table of ops and backends: `python -m bench.backends` writes it anew.

What serves an op is asked of dispatch; what was measured on GPUs is read from bench/results/gpu-*.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekern import dispatch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- python -m bench.backends writes this -->\n", "<!-- until here -->\n"
COLUMNS = ("cpu", "torch", "triton", "cuda")


def measured() -> list[dict[str, Any]]:
    """Results of `python -m bench.gpu`, by file name."""
    paths = sorted((ROOT / "bench" / "results").glob("gpu-*.json"))
    return [json.loads(path.read_text()) for path in paths]


def table(results: Sequence[dict[str, Any]]) -> str:
    devices = [result["machine"]["device"] for result in results]
    lines = ["| op | " + " | ".join([*(f"`{c}`" for c in COLUMNS), *devices]) + " |"]
    lines.append("| --- " * (1 + len(COLUMNS) + len(devices)) + "|")
    for op in dispatch.OPS:
        served = [
            "yes" if op in dispatch.KERNELS.get(backend, dispatch.OPS) else ""
            for backend in COLUMNS
        ]
        lines.append(
            "| " + " | ".join([f"`{op}`", *served, *(_best(op, r) for r in results)]) + " |"
        )
    return "\n".join(lines) + "\n"


def _best(op: str, result: dict[str, Any]) -> str:
    """Of each case the fastest backend, and its share of what the device can do."""
    cases: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        if row["op"] == op and "ms" in row:
            best = cases.get(row["name"])
            cases[row["name"]] = row if best is None or row["ms"] < best["ms"] else best
    return "; ".join(f"{name}: {r['share']:.2f} ({r['backend']})" for name, r in cases.items())


def written(text: str, results: Sequence[dict[str, Any]]) -> str:
    """The README with its table."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"README has no {BEGIN.strip()}"
    assert end, f"README has no {END.strip()}"
    return before + BEGIN + table(results) + END + after


if __name__ == "__main__":
    README.write_text(written(README.read_text(), measured()))
