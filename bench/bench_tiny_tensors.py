"""Overhead alone: thousands of tensors of 4 elements, three models, from a cold Python."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from bench_merge_checkpoints import CONFIG, Python, mergekern_merge, write_models

LINEAR = """merge_method: linear
models:
  - model: {folder}/a
  - model: {folder}/b
  - model: {folder}/c
parameters: {{weight: 1.0}}
"""
CONFIGS = {"linear": LINEAR, "ties": CONFIG}


class Spent(NamedTuple):
    """What child processes took: seconds of the clock, and of processors, which a busy machine
    does not stretch."""

    seconds: float
    cpu: float


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def best(runs: int, call, *arguments: object) -> Spent:
    """The least of each over some runs of a `Process`."""
    found = []
    for _ in range(runs):
        before = _cpu()
        found.append(Spent(call(*arguments).seconds, _cpu() - before))
    return Spent(*map(min, zip(*found, strict=True)))


@pytest.mark.parametrize("count", [2500, 5000, 10_000, 20_000])
@pytest.mark.parametrize("method", CONFIGS)
def bench_tiny_tensors(benchmark, timed: bool, tmp_path: Path, method: str, count: int) -> None:
    """Time over that of `import torch`, whole and per tensor: the same per tensor if linear."""
    count = count if timed else count // 100
    runs = 3 if timed else 1
    names = [f"layers.{i}.weight" for i in range(count)]
    write_models(tmp_path, dict.fromkeys(names, (4,)), torch.bfloat16)
    config, out = tmp_path / "tiny.yml", tmp_path / "out"
    config.write_text(CONFIGS[method].format(folder=tmp_path, suffix=""))
    importing = best(runs, Python, "import torch")
    ours = best(runs, mergekern_merge, config, out)
    benchmark.pedantic(mergekern_merge, args=(config, out), rounds=1)
    assert len(load_file(out / "model.safetensors")) == count
    assert json.loads((out / "mergekern_manifest.json").read_text())["method"] == method
    info = benchmark.extra_info
    info["ms"], info["error"] = 1e3 * ours.seconds, 0.0
    info["over_import_ms"] = 1e3 * (ours.seconds - importing.seconds)
    info["cpu_over_import_ms"] = 1e3 * (ours.cpu - importing.cpu)
    info["us_each"] = 1e6 * (ours.cpu - importing.cpu) / count
