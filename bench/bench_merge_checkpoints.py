"""Whole jobs from a cold Python: three ViT-B checkpoints and a base."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

CONFIG = """merge_method: ties
base_model: {folder}/base{suffix}
models:
  - model: {folder}/a{suffix}
    parameters: {{weight: 1.0, density: 0.2}}
  - model: {folder}/b{suffix}
    parameters: {{weight: 1.0, density: 0.2}}
  - model: {folder}/c{suffix}
    parameters: {{weight: 1.0, density: 0.2}}
dtype: bfloat16
"""


def vit_base(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ViT; width 768 and depth 12 make ViT-B's 86 M parameters."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 197, width),
        "embeddings.patch_embeddings.weight": (width, 3, 16, 16),
        "embeddings.patch_embeddings.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    for i in range(depth):
        layer = f"encoder.layer.{i}."
        for name in ("query", "key", "value", "output"):
            shapes[f"{layer}attention.{name}.weight"] = (width, width)
            shapes[f"{layer}attention.{name}.bias"] = (width,)
        shapes[f"{layer}mlp.fc1.weight"] = (4 * width, width)
        shapes[f"{layer}mlp.fc1.bias"] = (4 * width,)
        shapes[f"{layer}mlp.fc2.weight"] = (width, 4 * width)
        shapes[f"{layer}mlp.fc2.bias"] = (width,)
        for name in ("before", "after"):
            shapes[f"{layer}norm_{name}.weight"] = (width,)
            shapes[f"{layer}norm_{name}.bias"] = (width,)
    return shapes


def write_models(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=g) * 0.02 for name, shape in shapes.items()}
    for model in ("base", "a", "b", "c"):
        noise = 0.0 if model == "base" else 1e-3
        tensors = {
            name: (x + noise * torch.randn(x.shape, generator=g)).to(dtype)
            for name, x in base.items()
        }
        (folder / model).mkdir()
        save_file(tensors, folder / model / "model.safetensors", metadata={"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps({"hidden_size": 768}))


class Process:
    """One run of a command: wall seconds and its output."""

    def __init__(self, *command: str) -> None:
        start = time.perf_counter()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        self.seconds = time.perf_counter() - start
        self.output = done.stdout
        assert done.returncode == 0, self.output


class Python(Process):
    """A cold Python that also tells its peak resident memory.

    Asked for by itself: what the parent is told of a child includes the moment before exec, when
    the child still was the parent.
    """

    TELL = """
with open("/proc/self/status") as f:
    print([line.split()[1] for line in f if line.startswith("VmHWM")][0])
"""

    def __init__(self, code: str, *arguments: str) -> None:
        super().__init__(sys.executable, "-c", code + self.TELL, *arguments)
        self.peak = int(self.output.split()[-1]) * 1024


MERGE = """
import sys
from mergekern.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
"""


def mergekern_merge(config: Path, out: Path, *options: str) -> Python:
    shutil.rmtree(out, ignore_errors=True)
    return Python(MERGE, "merge", str(config), str(out), "--quiet", *options)


@pytest.fixture
def importing() -> Python:
    return Python("import torch")


def bench_merge_vit_base(benchmark, timed: bool, tmp_path: Path, importing: Python) -> None:
    """ties of three bf16 ViT-B and a base, from a cold Python to a synced folder."""
    shapes = vit_base(768, 12) if timed else vit_base(32, 2)
    write_models(tmp_path, shapes, torch.bfloat16)
    config = tmp_path / "ties.yml"
    config.write_text(CONFIG.format(folder=tmp_path, suffix=""))
    out = tmp_path / "out"
    memory = 256 * 2**20

    runs = [mergekern_merge(config, out, "--memory", "256MiB") for _ in range(3 if timed else 1)]
    benchmark.pedantic(mergekern_merge, args=(config, out), rounds=1)
    ours = min(run.seconds for run in runs)
    assert load_file(out / "model.safetensors").keys() == shapes.keys()
    peak = max(run.peak for run in runs)
    assert peak <= importing.peak + memory, f"{peak} bytes resident, torch takes {importing.peak}"
    info = benchmark.extra_info
    info["ms"], info["error"] = 1e3 * ours, 0.0
    info["extra_mb"] = (peak - importing.peak) / 1e6
    info["import_ms"] = 1e3 * importing.seconds
    peer = Path(sys.executable).with_name("mergekit-pytorch")
    if timed and peer.exists():
        raw = tmp_path / "raw.yml"
        raw.write_text(CONFIG.format(folder=tmp_path, suffix="/model.safetensors"))
        info["mergekit"] = Process(str(peer), str(raw), str(tmp_path / "peer")).seconds / ours
