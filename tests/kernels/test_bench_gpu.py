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


def measured(path: Path, *options: str) -> tuple[int, list[dict]]:
    command = [sys.executable, "-m", "bench.gpu", "--measure", "--small", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", path, *options],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
    )
    assert path.exists(), done.stderr
    return done.returncode, json.loads(path.read_text())["rows"]


def test_every_op_on_every_backend_of_this_machine(tmp_path: Path) -> None:
    status, rows = measured(tmp_path / "rows.json")
    assert [row for row in rows if "failed" in row] == []
    assert status == 0
    cpu = torch.device("cpu")
    expected = {
        (op, backend)
        for op in dispatch.OPS
        for backend in ("torch", "cpu")
        if dispatch.why_not(backend, op, cpu) is None
    }
    assert {(row["op"], row["backend"]) for row in rows} == expected
    assert all(row["error"] <= 1 and row["share"] > 0 for row in rows)


BROKEN = """
import runpy, sys
from mergekern.backends.torch import permute
right = permute.permute
def wrong(out, *others):
    right(out, *others)
    out.view(-1)[0] += 1
permute.permute = wrong
sys.argv = ["bench.gpu", *sys.argv[1:]]
runpy.run_module("bench.gpu", run_name="__main__")
"""


def test_a_wrong_result_fails(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, "-c", BROKEN, "--measure", "--small", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", path, "permute"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONSAFEPATH": ""},
    )
    assert done.returncode == 1, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {row["backend"] for row in rows if "failed" in row} == {"torch"}
