"""Mutants, examined: refused in one line, or read and merged, in bounded time and memory.

`run` has another process take the cases one by one, so that a crash, a hang or too much memory is
a finding like any other. `python fuzzing.py KIND FIRST LAST` is that process; it writes into the
current folder.
"""

from __future__ import annotations

import json
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import mutants

SECONDS = 5.0  # of the processor, for one case
WAITING = 600.0  # seconds until the next case is done; the machine may be busy
MEMORY = 1 << 30  # beside what the process has when it begins
LONGEST = 10_000  # characters of an error, which may hold a text of 4096 twice


class Report(NamedTuple):
    outcomes: Counter[str]  # of refused, accepted
    findings: dict[int, str]  # case -> what it did
    memory: int  # bytes at the most


def run(kind: str, first: int, count: int, folder: Path) -> Report:
    report = Report(Counter(), {}, 0)
    last = first + count
    while first < last:
        outcomes, memory, end = _cases(kind, first, last, folder)
        first += len(outcomes)
        report.outcomes.update(outcomes)
        report = report._replace(memory=max(report.memory, memory))
        if first < last:
            report.findings[first] = end
            first += 1
    return report


def _cases(kind: str, first: int, last: int, folder: Path) -> tuple[list[str], int, str]:
    """Outcomes until a case ends or blocks the process; memory; what that case did."""
    known = [str(Path(mutants.__file__).parent), os.environ.get("PYTHONPATH", "")]
    child = subprocess.Popen(
        [sys.executable, __file__, kind, str(first), str(last)],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(known)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    assert child.stdout is not None
    assert child.stderr is not None
    hearing = [
        threading.Thread(
            target=lambda out: [lines.put(x) for x in (*out, "")], args=[child.stdout]
        ),
        threading.Thread(target=lambda out: said.append(out.read()), args=[child.stderr]),
    ]
    with child:
        for thread in hearing:
            thread.start()
        outcomes: list[str] = []
        memory = 0
        try:
            while line := lines.get(timeout=WAITING):
                memory, outcome = json.loads(line)
                outcomes += [outcome] if outcome else []
            end = f"exit {child.wait()}"
        except queue.Empty:
            child.kill()
            end = f"no end within {WAITING:g} s"
        for thread in hearing:
            thread.join()
    if not memory:
        raise RuntimeError(f"before the first case: {end}: {said[0]}")
    return outcomes, memory, f"{end}: {said[0][-3000:]}"


# ---- the process that takes them ---------------------------------------------------------------


def _take(kind: str, first: int, last: int) -> None:
    import torch
    from safetensors.torch import save_file

    import mergekern.engine.run  # noqa: F401  (not at the expense of the first case)

    warnings.simplefilter("ignore")
    names = ["layer.0.w", "layer.1.w", "layer.1.b", "norm.w", "head.w"]
    for i, model in enumerate(("a", "b", "base")):
        Path(model).mkdir(exist_ok=True)
        content = {name: torch.full((2, 3), i + j / 8) for j, name in enumerate(names)}
        save_file(content, Path(model, "model.safetensors"))
    status = Path("/proc/self/status").read_text()
    used = int(re.findall(r"VmSize:\s+(\d+) kB", status)[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    _tell("")
    for case in range(first, last):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whose signal ends the process
        _tell(_outcome(kind, random.Random(f"{kind} {case}")))


def _tell(outcome: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps((peak, outcome)), flush=True)


def _outcome(kind: str, rng: random.Random) -> str:
    """An error may list tensors, a line for each, after its one line."""
    from mergekern import MergekernError

    try:
        {"safetensors": _read, "configuration": _plan}[kind](rng)
    except MergekernError as error:
        _, *listed = str(error).split("\n")
        if len(str(error)) > LONGEST or not all(line.startswith("  ") for line in listed):
            raise AssertionError(f"no line of at most {LONGEST} characters") from error
        return "refused"
    return "accepted"


def _read(rng: random.Random) -> None:
    """All tensors of a file; of some files, a merge."""
    from safetensors.torch import load_file

    from mergekern import merge_checkpoints
    from mergekern.engine.checkpoint import Checkpoint

    path = Path("m.safetensors")
    path.write_bytes(mutants.safetensors(rng))
    found = Checkpoint(path)
    for key in found.signatures:
        found.read(key)
    found.close()
    if rng.random() < 0.1:
        models = [{"model": path, "parameters": {"weight": 1.0}}]
        config = {"merge_method": "linear", "models": models, "out_dtype": "float32"}
        shutil.rmtree("out", ignore_errors=True)
        merge_checkpoints(config, "out", progress=False)
        load_file("out/model.safetensors")


def _plan(rng: random.Random) -> None:
    """The plan of a configuration; of some, the merge."""
    from mergekern import merge_checkpoints
    from mergekern.engine.config import load_config
    from mergekern.engine.job import Job, Options

    path = Path("config.yml")
    path.write_bytes(mutants.configuration(rng))
    Job({"": load_config(path)}, Options(1 << 30, 1 << 30)).close()
    if rng.random() < 0.1:
        shutil.rmtree("out", ignore_errors=True)
        merge_checkpoints(path, "out", progress=False)


if __name__ == "__main__":
    _take(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
