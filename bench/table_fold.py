"""An adapter folded into a ViT-B: ours through the engine beside PEFT in memory.

`python -m bench.table_fold` prints both and writes them under bench/results. The base has 86 M
parameters in one file, the adapter rank 16 on queries, keys, values, outputs and MLPs. PEFT's part
is what a script does: load the base, load the adapter, merge_and_unload, save. Each is a process
of its own; seconds are those of the processor beyond the imports, peaks those beyond what the
process held after them. Errors are the largest against float64, of the largest weight.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergekern as mk
from bench import paths  # noqa: F401

from adapters.random_adapters import factors
from bench_merge_checkpoints import vit_base
from report import describe

RESULTS = Path(__file__).parent / "results" / "fold-cpu.json"
RANK, SCALE = 16, 0.3
_MEASURED = """
import json, sys, time
import torch
torch.set_num_threads(1)
base, adapter, out, bench = sys.argv[1:]
sys.path.append(bench)
from measure import peak_extra
{imports}
def work():
{work}
start = time.process_time()
peak = peak_extra(work)
seconds = time.process_time() - start
print(json.dumps({{"seconds": seconds, "peak MiB": None if peak is None else peak / 2**20}}))
"""
OURS = _MEASURED.format(
    imports="from mergekern import fold_adapter",
    work="    fold_adapter(adapter, base, out, memory='64MiB', progress=False)",
)
# A module of what the base holds stands for the model that a script would have.
THEIRS = _MEASURED.format(
    imports="""
import peft
from safetensors.torch import load_file, save_file

def child(owner, name, weight):
    if name not in owner._modules:
        with torch.device("meta"):
            two = weight is not None and weight.ndim == 2
            new = torch.nn.Linear(*reversed(weight.shape)) if two else torch.nn.Module()
        owner.add_module(name, new)
    return owner._modules[name]
""",
    work="""
    tensors = load_file(base)
    model = torch.nn.Module()
    for name, x in tensors.items():
        *path, last = name.split(".")
        owner = model
        for i, part in enumerate(path):
            owner = child(owner, part, tensors.get(".".join([*path[: i + 1], "weight"])))
        setattr(owner, last, torch.nn.Parameter(x, requires_grad=False))
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    save_file(merged.state_dict(), out)
""",
)


def write_inputs(folder: Path, dtype: torch.dtype) -> mk.Adapter:
    shapes = vit_base(768, 12)
    g = torch.Generator().manual_seed(0)
    base = {name: (0.02 * torch.randn(s, generator=g)).to(dtype) for name, s in shapes.items()}
    save_file(base, folder / "base.safetensors")
    changed = [n for n, s in shapes.items() if len(s) == 2 and n.startswith("encoder")]
    modules = {
        name.removesuffix(".weight"): factors(
            shapes[name][0], shapes[name][1:], RANK, i, 1e-3 * SCALE, dtype
        )
        for i, name in enumerate(changed)
    }
    config = {"target_modules": list(modules), "base_model_name_or_path": None}
    adapter = mk.Adapter(modules, config=config)
    mk.save_adapter(adapter, folder / "adapter")
    return adapter


def worst(folder: Path, out: Path, adapter: mk.Adapter) -> float:
    """The largest error of a weight, of the largest exact one."""
    before, after = load_file(folder / "base.safetensors"), load_file(out)
    error = largest = 0.0
    for module, f in adapter.modules.items():
        exact: Tensor = before[f"{module}.weight"].double() + f.delta()
        error = max(error, float((after[f"{module}.weight"].double() - exact).abs().max()))
        largest = max(largest, float(exact.abs().max()))
    return error / largest


def measured(code: str, folder: Path, out: Path) -> dict[str, float]:
    bench = str(Path(__file__).parent)
    given = [str(folder / "base.safetensors"), str(folder / "adapter"), str(out), bench]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *given],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(dtype: torch.dtype) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = write_inputs(folder, dtype)
        found: dict[str, Any] = {}
        outs = {"mergekern": folder / "ours", "peft": folder / "theirs.safetensors"}
        for who, code in (("mergekern", OURS), ("peft", THEIRS)):
            found[who] = measured(code, folder, outs[who])
        files = (outs["mergekern"] / "model.safetensors", outs["peft"])
        for who, file in zip(found, files, strict=True):
            found[who]["error"] = worst(folder, file, adapter)
        return found


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.table_fold").parse_args()
    out: dict[str, Any] = {"machine": describe()}
    for dtype in (torch.float32, torch.bfloat16):
        out[str(dtype)] = row(dtype)
        print(dtype, json.dumps(out[str(dtype)], indent=1), flush=True)
    RESULTS.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
