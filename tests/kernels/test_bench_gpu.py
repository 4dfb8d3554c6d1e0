"""`python -m bench.gpu` is run where there is a GPU, seldom: that its rows are right shows here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from mergekern import dispatch

from kernels.sass import ROOT

# The folder comes last: what is installed is measured, not what lies beside bench/.
RUN = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
{}
runpy.run_module("bench.gpu", run_name="__main__", alter_sys=True)
"""
BREAK = """
from mergekern.backends.torch import permute
right = permute.permute
def wrong(out, *others):
    right(out, *others)
    out.view(-1)[0] += 1
permute.permute = wrong
"""


def measured(path: Path, *options: str, before: str = "") -> tuple[int, list[dict]]:
    """Exit status and rows of a run at small sizes on the CPU."""
    given = ["--measure", "--small", "--device", "cpu", "--out", path, *options]
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(before), ROOT, *given],
        env={**os.environ, "TRITON_INTERPRET": "0", "MERGEKERN_HOST_CUDA": ""},
        capture_output=True,
        text=True,
    )
    assert path.exists(), done.stderr
    return done.returncode, json.loads(path.read_text())["rows"]


def test_every_op_on_every_backend_of_this_machine(tmp_path: Path) -> None:
    status, rows = measured(tmp_path / "rows.json")
    assert [row for row in rows if "failed" in row] == []
    assert status == 0
    expected = {
        (op, backend)
        for op in dispatch.OPS
        for backend in ("torch", "cpu")
        if dispatch.why_not(backend, op, torch.device("cpu")) is None
    }
    assert {(row["op"], row["backend"]) for row in rows} == expected
    assert all(row["error"] <= 1 and row["share"] > 0 for row in rows)


def test_a_wrong_result_fails(tmp_path: Path) -> None:
    status, rows = measured(tmp_path / "rows.json", "permute", before=BREAK)
    assert status == 1
    assert {row["backend"] for row in rows if "failed" in row} == {"torch"}


def test_what_is_not_reached_in_time_fails(tmp_path: Path) -> None:
    status, rows = measured(tmp_path / "rows.json", "gram", "--seconds", "0")
    assert status == 1
    assert {row["failed"] for row in rows} == {"not reached in 0 s"}
