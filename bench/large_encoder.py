"""Merges of encoders of InternViT-6B's shape beside `cat` and `dd` of the same files.

`python -m bench.large_encoder` writes a base and three experts of 13 of its 48 layers, 3.2 GB each,
into MERGEKERN_BENCH_CACHE (or a folder that is removed), merges them by several methods in cold
processes, prints a table and keeps the figures under bench/results. `--out /dev/shm/x` leaves out
the disk.

In each round the inputs are read by cat, a model is written by dd, and the merge does both; "share"
is the time of cat and dd over that of the merge, the median of the rounds. "from disk" says that
inputs were in the system's cache; "over plan" are bytes read and written over those of the plan.
Some seconds go by before each: a virtual machine hands freed memory back to its host, whatever runs
next is slowed down when it takes it again, and what runs at once is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import mergekern as mk
from bench import paths  # noqa: F401
from mergekern.check import parse_size

import intern_vit
from processes import IMPORT, MERGE, Ended, cat, dd, python
from report import describe

SETTLE = 5  # seconds
RESULTS = Path(__file__).parent / "results"
ALL = ("base", *intern_vit.EXPERTS)


def configs(models: Path) -> dict[str, dict[str, Any]]:
    """What is merged, by the name of the row."""
    base = str(models / "base")
    experts = [{"model": str(models / name)} for name in intern_vit.EXPERTS]
    plain = {"models": experts, "parameters": {"weight": 1.0}}
    trimmed = {"models": experts, "parameters": {"weight": 1.0, "density": 0.2}}
    return {
        "linear": {"merge_method": "linear", **plain},
        "karcher": {"merge_method": "karcher", "models": experts},
        "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": base, **plain},
        "ties": {"merge_method": "ties", "base_model": base, **trimmed},
        "ties_global": {"merge_method": "ties_global", "base_model": base, **trimmed},
    }


class Bench:
    def __init__(self, models: Path, out: Path, memory: str, rounds: int) -> None:
        self.models, self.out, self.memory, self.rounds = models, out, memory, rounds
        self.idle = python(IMPORT)
        python(IMPORT)  # everything that is imported is in the system's cache by now

    def row(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        files = self._files(config)
        plan, outlook = mk.plan_merge(config, self.out / "merged", memory=self.memory)
        rounds = [self._round(config, files, i) for i in range(self.rounds)]
        merges = [merge for _, _, merge in rounds]
        middle = statistics.median
        return {
            "name": name,
            "cat_s": middle(read.seconds for read, _, _ in rounds),
            "dd_s": middle(written.seconds for _, written, _ in rounds),
            "merge_s": middle(merge.seconds for merge in merges),
            "share": middle((r.seconds + w.seconds) / m.seconds for r, w, m in rounds),
            "gbs": (outlook.bytes_read + plan.bytes_written)
            / 1e9
            / middle(m.seconds for m in merges),
            "over_import_mib": (max(m.peak for m in merges) - self.idle.peak) / 2**20,
            "peak_mib": max(m.peak for m in merges) / 2**20,
            "read_gb": outlook.bytes_read / 1e9,
            "written_gb": plan.bytes_written / 1e9,
            "read_over_plan": middle(m.read - self.idle.read for m in merges) / outlook.bytes_read,
            "written_over_plan": middle(m.written for m in merges) / plan.bytes_written,
            "from_disk_gb": middle(m.from_disk for m in merges) / 1e9,
        }

    def _files(self, config: dict[str, Any]) -> list[Path]:
        used = ALL if "base_model" in config else intern_vit.EXPERTS
        return [file for name in used for file in _weights(self.models / name)]

    def _round(
        self, config: dict[str, Any], files: Sequence[Path], number: int
    ) -> tuple[Ended, Ended, Ended]:
        cat(files)  # brings back what the last output has driven out of the system's cache
        read = cat(files)
        copied = _weights(self.models / "base")
        self._clear()
        if number % 2:
            merge = self.merge(config)
            self._clear()
            return read, dd(copied, self.out / "copied"), merge
        written = dd(copied, self.out / "copied")
        self._clear()
        return read, written, self.merge(config)

    def merge(self, config: dict[str, Any], *options: str) -> Ended:
        path = self.out / "merge.json"
        path.write_text(json.dumps(config))
        options = ("--statistics", "none", "--memory", self.memory, "--quiet", *options)
        ended = python(MERGE, path, self.out / "merged", *options)
        over, limit = ended.peak - self.idle.peak, parse_size("memory", self.memory)
        assert over <= limit, f"{over} bytes over what an idle process has, of {limit} allowed"
        return ended

    def _clear(self) -> None:
        for name in ("merged", "copied"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        os.sync()
        time.sleep(SETTLE)

    def second_point(self, config: dict[str, Any]) -> dict[str, Any]:
        """A merge whose thresholds the one before has found, over that one; lambda differs."""
        ratios, seconds = [], []
        kept = self.out / "statistics"
        for _ in range(self.rounds):
            pair = []
            for scale in (1.0, 0.7):
                cat(self._files(config))
                self._clear()
                given = {**config, "parameters": {**config["parameters"], "lambda": scale}}
                pair.append(self.merge(given, "--statistics", str(kept)).seconds)
            shutil.rmtree(kept)
            seconds.append(pair)
            ratios.append(pair[1] / pair[0])
        name = f"{config['merge_method']}, second point"
        return {"name": name, "seconds": seconds, "second_over_first": statistics.median(ratios)}


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


COLUMNS = (
    ("read_gb", "read GB", "{:.2f}"),
    ("written_gb", "written GB", "{:.2f}"),
    ("cat_s", "cat s", "{:.2f}"),
    ("dd_s", "dd s", "{:.2f}"),
    ("merge_s", "merge s", "{:.2f}"),
    ("share", "share", "{:.2f}"),
    ("gbs", "GB/s", "{:.2f}"),
    ("peak_mib", "peak MiB", "{:.0f}"),
    ("over_import_mib", "over import MiB", "{:.0f}"),
    ("read_over_plan", "read over plan", "{:.4f}"),
    ("written_over_plan", "written over plan", "{:.4f}"),
    ("from_disk_gb", "from disk GB", "{:.2f}"),
    ("second_over_first", "second over first", "{:.2f}"),
)


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="an encoder of InternViT-6B's shape")
    table.add_column("method", no_wrap=True)
    shown = [c for c in COLUMNS if any(c[0] in row for row in rows)]
    for _, title, _ in shown:
        table.add_column(title, justify="right")
    for row in rows:
        cells = [form.format(row[key]) if key in row else "" for key, _, form in shown]
        table.add_row(row["name"], *cells)
    Console(width=170).print(table)


def rows_of(bench: Bench, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for name, config in configs(bench.models).items():
        if name in names:
            yield bench.row(name, config)
    if "ties_global" in names:
        yield bench.second_point(configs(bench.models)["ties_global"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.large_encoder")
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--out", type=Path, help="where outputs go; beside the models by default")
    parser.add_argument("--name", default="large-encoder", help="of the file of results")
    parser.add_argument("methods", nargs="*", default=list(configs(Path())))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(os.environ.get("MERGEKERN_BENCH_CACHE", folder))
        models = intern_vit.write(cache, options.layers)
        with tempfile.TemporaryDirectory(dir=options.out or cache) as out:
            bench = Bench(models, Path(out), options.memory, options.rounds)
            rows = list(rows_of(bench, options.methods))
    show(rows)
    about = {"layers": options.layers, "rounds": options.rounds, "memory": options.memory}
    about["import_peak_mib"] = bench.idle.peak / 2**20
    text = json.dumps({"machine": describe(), **about, "rows": rows}, indent=1)
    (RESULTS / f"{options.name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
