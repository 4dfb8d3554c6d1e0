"""All that a machine with a GPU can tell, in one command: `python -m bench.gpu`.

From a source checkout, with torch, triton, pytest and nvcc: builds the compiled modules in place,
runs the tests on every backend, compute-sanitizer over small sizes where it is installed, then
measures every op on every backend that serves it. Writes one JSON file under bench/results, row by
row, and prints one table. It stops by itself after about 8 minutes: what its share of them does
not reach is stopped, or a row that says so. `--device cpu --small` shows that rows run anywhere.

Times are of device events around a call, the median of many, the caches flushed before each; "of
the limit" is the least time that the bytes (or FLOPs) of cost() need at the bandwidth of a copy (or
the rate of torch.mm in bfloat16) in the same run, over that time. What fails is a row with its
reason, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mergekern
from bench import paths  # noqa: F401
from mergekern import dispatch

import gpu_alignment
import gpu_reductions
from gpu_rows import Place, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
GROUPS = (*gpu_reductions.GROUPS, *gpu_alignment.GROUPS)
LIMITS = {"build": 110, "tests": 200, "memcheck": 30, "racecheck": 30}  # seconds
MEASURING = 110
ROUNDS = 30
FLUSHED = 1 << 28  # bytes; the largest cache has 60 MB


# ---- steps before measuring ------------------------------------------------------------------


def step(name: str, command: list[str], **environment: str) -> dict[str, Any]:
    """Runs a command; its end, its time and the last lines that it printed."""
    limit = LIMITS[name]
    print(f"== {name}: {' '.join(command)}", flush=True)
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
        status, printed = str(done.returncode), done.stdout
    except subprocess.TimeoutExpired as late:
        out = late.stdout or b""
        printed = out.decode(errors="replace") if isinstance(out, bytes) else out
        status = f"stopped after {limit} s"
    seconds = time.perf_counter() - begin
    lines = printed.splitlines()
    print("\n".join(lines[-40:]), flush=True)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "name": name,
        "status": status,
        "seconds": round(seconds, 1),
        "end": lines[-1:],
        "failed": failed,
    }


def steps() -> Iterator[dict[str, Any]]:
    python = sys.executable
    build = [python, "setup.py", "build_ext", "--inplace"]
    yield step("build", build, MERGEKERN_BUILD="cuda")
    parallel = ["-n", "8"] if _installed("xdist") else []
    tests = [python, "-m", "pytest", "-q", "--maxfail=40", *parallel]
    tests += ["tests", "-p", "no:cacheprovider", "--ignore=tests/engine", "--ignore=tests/real"]
    real = {"TRITON_INTERPRET": "0", "MERGEKERN_HOST_CUDA": ""}
    yield step("tests", tests, **real, MERGEKERN_REQUIRE="cpu,cuda,triton")
    if shutil.which("compute-sanitizer"):
        small = ["-m", "bench.gpu", "--measure", "--small", "--out", os.devnull]
        for tool in ("memcheck", "racecheck"):
            check = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", python, *small]
            yield step(tool, check, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _installed(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


# ---- measuring -------------------------------------------------------------------------------


class Timer:
    """Milliseconds of calls on a device, and the two rates that limit them."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device, self.rounds = device, 2 if small else ROUNDS
        self._flush = torch.zeros(1 if small else FLUSHED, dtype=torch.uint8, device=device)
        nbytes = 1 << 16 if small else 1 << 30
        source, target = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
        self.copy = 2 * nbytes / self.median(lambda: target.copy_(source))
        n = 64 if small else 8192
        a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
        self.mm = 2 * n**3 / self.median(lambda: torch.mm(a, b))

    def median(self, call: Callable[[], Any]) -> float:
        """Seconds. Compilation and first allocations stay outside."""
        for _ in range(2):
            call()
        return statistics.median(self._one(call) for _ in range(self.rounds))

    def _one(self, call: Callable[[], Any]) -> float:
        self._flush.fill_(1)
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def launches(call: Callable[[], Any]) -> int:
    """Kernels that a call starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)


def measure(timer: Timer, row: Row, backend: str) -> dict[str, Any]:
    about = {"op": row.op, "name": row.name, "backend": backend, "share_wanted": row.share}
    about |= {"times_plain_wanted": row.wanted, "launches_wanted": row.launches}
    try:
        error = row.check(row.call(backend))
    except Exception as failure:  # noqa: BLE001 - a row of a table, and an exit status
        return about | {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0]}
    about["error"] = error
    if not error <= 1:
        return about | {"failed": f"error is {error} times its bound"}
    seconds = timer.median(lambda: row.call(backend))
    limit = max(row.cost.bytes / timer.copy, row.cost.flops / timer.mm)
    about |= {"ms": 1e3 * seconds, "gbs": row.cost.bytes / seconds / 1e9, "share": limit / seconds}
    if row.plain is not None:
        about["times_plain"] = timer.median(row.plain) / seconds
    if row.launches is not None and timer.device.type == "cuda":
        about["launches"] = launches(lambda: row.call(backend))
    return about


def rows(place: Place, timer: Timer, only: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Of every op and backend; those not begun in that time have failed."""
    end = time.perf_counter() + seconds
    for group in GROUPS:
        for row in group(place):
            if only and row.op not in only:
                continue
            for backend in dispatch.BACKENDS[1:]:
                if dispatch.why_not(backend, row.op, place.device) is not None:
                    continue
                if time.perf_counter() < end:
                    yield measure(timer, row, backend)
                else:
                    late = {"failed": f"not reached in {seconds:.0f} s"}
                    yield {"op": row.op, "name": row.name, "backend": backend} | late
        if place.device.type == "cuda":
            torch.cuda.empty_cache()


# ---- the report ------------------------------------------------------------------------------


def describe(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    triton = sys.modules.get("triton") if _installed("triton") else None
    nvcc = shutil.which("nvcc")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True) if nvcc else None
    release = re.search(r"release ([\d.]+)", version.stdout) if version else None
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "nvcc": release[1] if release else None,
        "python": platform.python_version(),
        "mergekern": mergekern.__version__,
        "commit": commit.stdout.strip() or None,
    }


def show(result: dict[str, Any]) -> None:
    console = Console(width=140)
    about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    console.print(about, highlight=False)
    for each in result["steps"]:
        console.print(f"{each['name']}: {each['status']}, {each['seconds']} s {each['end']}")
    console.print(f"copy {result['copy_gbs']:.0f} GB/s, mm {result['mm_tflops']:.0f} TFLOP/s")
    table = Table()
    titles = ("op", "case", "backend", "ms", "GB/s", "of the limit", "vs plain", "launches", "")
    for title in titles:
        table.add_column(title, no_wrap=title == "case")
    for row in result["rows"]:
        cells = [row["op"], row["name"], row["backend"]]
        cells += [_cell(row, "ms", "{:.3f}"), _cell(row, "gbs", "{:.0f}")]
        cells += [_against(row, "share"), _against(row, "times_plain")]
        table.add_row(*cells, _launches(row), row.get("failed", ""))
    console.print(table)


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    return form.format(row[key]) if row.get(key) is not None else ""


def _against(row: dict[str, Any], key: str) -> str:
    wanted = row.get(f"{key}_wanted")
    return _cell(row, key, "{:.2f}") + (f" (>= {wanted:.2f})" if wanted and key in row else "")


def _launches(row: dict[str, Any]) -> str:
    wanted = row.get("launches_wanted")
    return _cell(row, "launches", "{}") + (f" (<= {wanted})" if "launches" in row else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that show nothing but results")
    parser.add_argument("--measure", action="store_true", help="no build, no tests")
    parser.add_argument("--seconds", type=float, default=MEASURING, help="of measuring, at most")
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu-DEVICE.json")
    parser.add_argument("ops", nargs="*", help="only these")
    options = parser.parse_args()
    device = torch.device(options.device)
    before = [] if options.measure else list(steps())
    if not options.measure:  # in a process that has not loaded what was built meanwhile
        command = [sys.executable, "-m", "bench.gpu", "--measure", *sys.argv[1:]]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, **_told(before)}).returncode
    timer = Timer(device, options.small)
    result: dict[str, Any] = {
        "machine": describe(device),
        "steps": json.loads(os.environ.get(_STEPS, "[]")),
        "copy_gbs": timer.copy / 1e9,
        "mm_tflops": timer.mm / 1e12,
        "rows": [],
    }
    name = re.sub(r"\W+", "-", result["machine"]["device"].lower())
    path = options.out or RESULTS / f"gpu-{name}.json"
    for row in rows(Place(device, options.small), timer, options.ops, options.seconds):
        result["rows"].append(row)
        path.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    failed = [r for r in result["rows"] if "failed" in r]
    failed += [s for s in result["steps"] if s["status"] != "0"]
    return 1 if failed else 0


_STEPS = "MERGEKERN_BENCH_STEPS"


def _told(before: list[dict[str, Any]]) -> dict[str, str]:
    return {_STEPS: json.dumps(before)}


if __name__ == "__main__":
    sys.exit(main())
