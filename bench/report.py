"""Runs the benchmarks and prints one table: `mergekern bench [names] [--json FILE]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mergekern import __version__, dispatch

COLUMNS = (
    ("ms", "ms", "{:.2f}"),
    ("over_import_ms", "ms over import", "{:.0f}"),
    ("cpu_over_import_ms", "CPU ms over import", "{:.0f}"),
    ("us_each", "CPU us a tensor", "{:.0f}"),
    ("gbs", "GB/s", "{:.1f}"),
    ("copy_gbs", "copy GB/s", "{:.1f}"),
    ("times_limit", "x limit", "{:.2f}"),
    ("times_new", "x limit+pages", "{:.2f}"),
    ("allowed", "allowed", "{:.1f}"),
    ("pages_ms", "pages ms", "{:.1f}"),
    ("torch", "vs torch", "{:.1f}"),
    ("mergekit", "vs mergekit", "{:.1f}"),
    ("wanted", "wanted", "{:.0f}"),
    ("peft", "vs peft", "{:.1f}"),
    ("fusion_bench", "vs fusion-bench", "{:.1f}"),
    ("scipy", "vs scipy", "{:.1f}"),
    ("zipit", "vs zipit", "{:.0f}"),
    ("zipit_1", "vs zipit, 1 thread", "{:.0f}"),
    ("float32", "vs float32", "{:.2f}"),
    ("mm_16_bit", "vs 16-bit mm", "{:.1f}"),
    ("einsum", "vs einsum", "{:.0f}"),
    ("extra_mb", "extra MB", "{:.0f}"),
    ("fusion_bench_mb", "fusion-bench's", "{:.0f}"),
    ("error", "error / bound", "{:.2g}"),
    ("host_error", "host's", "{:.2g}"),
)
NOTES = (
    "x limit: time over the least time that the bytes (or FLOPs) of cost() need at the copy "
    "bandwidth (or GEMM rate), each round against the copy just before it, the median; 1 is the "
    "limit. ms: the best round. pages: what the pages of a new result cost, cleared by the system "
    "at the first write; x limit+pages counts them as a part of the limit. vs: how "
    "many times faster than that tool (peers run on 32 Mi elements at most, on 4 Mi where they "
    "sort, and are compared per element). allowed, wanted: what is aimed at. Rows without a limit "
    "are whole processes from a cold Python."
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="mergekern bench")
    parser.add_argument("names", nargs="*", help="only benchmarks whose name contains one of these")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-enable"]
        command += ["--benchmark-only", f"--benchmark-json={results}", "--benchmark-quiet"]
        command += ["-k", " or ".join(options.names)] if options.names else []
        # The installed package is measured, not the source folder that pytest runs in.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, cwd=root, env=environment)
        if done.returncode:
            return done.returncode
        rows = json.loads(results.read_text())["benchmarks"]
    rows = [{"name": r["name"].removeprefix("bench_"), **r["extra_info"]} for r in rows]
    machine = describe()
    show(machine, rows)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def describe() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        processor = models[0].partition(":")[2].strip() if models else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "mergekern": __version__,
        "backend": dispatch.select("auto", "weighted_sum", torch.device("cpu"), torch.float32),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    console = Console(width=190)
    table = Table()
    table.add_column("benchmark", no_wrap=True)
    shown = [c for c in COLUMNS if any(c[0] in row for row in rows)]
    for _, title, _ in shown:
        table.add_column(title, justify="right")
    for row in rows:
        cells = [form.format(row[key]) if key in row else "" for key, _, form in shown]
        table.add_row(row["name"].replace("[", " ").replace("]", ""), *cells)
    console.print(", ".join(f"{k} {v}" for k, v in machine.items()), highlight=False)
    console.print(table)
    console.print(NOTES, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
