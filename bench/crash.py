"""Merges killed at random moments, then resumed: how many end in the bytes of an uninterrupted run.

`python -m bench.crash --count 200` goes round the methods. Each run is killed from outside, at a
moment that is drawn evenly over the time of a whole one, and the same merge is run again; those
that had ended by then do not count. The table says how far the killed ones had come; the figures
are kept under bench/results.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench import paths  # noqa: F401
from mergekern.engine.journal import read_journals

from engine import sliced
from engine.faults import Run, content, control, done
from report import describe

RESULTS = Path(__file__).parent / "results"
SIZE = 30  # times the models of the tests: some hundred slices


def phase(out: Path) -> str:
    """Where a run was killed."""
    if out.exists():
        return "after the commit"
    folder = control(out)
    if not folder.exists():
        return "before anything was written"
    finished = len(read_journals(folder)[1])
    if (folder / "out" / "mergekern_manifest.json").exists():
        return "in the commit"
    return "midway" if finished else "before the first slice"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.crash")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    killed: Counter[str] = Counter()
    equal = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = sliced.write_models(folder / "models", SIZE)
        wholes = {}
        for method in sliced.METHODS:
            job = sliced.job(models, folder / method / "out", method, memory="4MiB")
            done(job)  # a first child waits for the process that all are forked from
            shutil.rmtree(job.out.parent)
            start = time.perf_counter()
            done(job)
            wholes[method] = time.perf_counter() - start, content(job.out)
        while killed.total() < options.count:
            method = sliced.METHODS[killed.total() % len(sliced.METHODS)]
            lasted, whole = wholes[method]
            job = sliced.job(models, folder / "killed" / "out", method, memory="4MiB")
            child = Run(job)
            time.sleep(rng.uniform(0, lasted))
            child.process.kill()
            if child.end().code == -signal.SIGKILL:
                killed[phase(job.out)] += 1
                done(job)
                left = list(job.out.parent.glob(".out.*"))
                equal += content(job.out) == whole and not left
            shutil.rmtree(job.out.parent, ignore_errors=True)
    for where, count in killed.most_common():
        print(f"{count:5} killed {where}")
    print(f"{equal} of {options.count} outputs equal those of uninterrupted runs")
    about = {"machine": describe(), "count": options.count, "equal": equal, "killed": dict(killed)}
    (RESULTS / "large-crash.json").write_text(json.dumps(about, indent=1) + "\n")
    return int(equal < options.count)


if __name__ == "__main__":
    raise SystemExit(main())
