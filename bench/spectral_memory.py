"""Memory of whole merges by singular values: eight models of ViT-L's shape and their base.

`python -m bench.spectral_memory` writes 0.6 GB of bfloat16 noise for each, merges them in a cold
process within --memory, and prints the peak of what was resident, that of a process that only
imports, and the seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench import paths  # noqa: F401

from bench_merge_checkpoints import vit_base
from processes import IMPORT, MERGE, python

MODELS = 8


def write(folder: Path, layers: int) -> dict[str, Any]:
    """The files, a model in memory at a time, and the configuration of their merge."""
    shapes = vit_base(1024, layers)
    for i in range(MODELS + 1):
        g, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(i)
        content = {name: 0.02 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
        for x in content.values():
            x += (1e-3 if i else 0.0) * torch.randn(x.shape, generator=noise)
        model = {name: x.bfloat16() for name, x in content.items()}
        save_file(model, folder / f"{i}.safetensors", {"format": "pt"})
    models = [{"model": str(folder / f"{i + 1}.safetensors")} for i in range(MODELS)]
    return {"base_model": str(folder / "0.safetensors"), "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.spectral_memory")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("methods", nargs="*", default=["tsv_m"])
    options = parser.parse_args()
    idle = python(IMPORT)
    print(f"import alone: {idle.peak >> 20} MiB", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write(folder, options.layers)
        for method in options.methods:
            path, out = folder / "merge.json", folder / "out"
            path.write_text(json.dumps({"merge_method": method, **config}))
            limits = ("--memory", options.memory, "--statistics", "none", "--quiet")
            ended = python(MERGE, path, out, *limits)
            shutil.rmtree(out)
            print(
                f"{method}: {ended.read / 1e9:.2f} GB read, {ended.written / 1e9:.2f} GB written, "
                f"peak {ended.peak >> 20} MiB, {(ended.peak - idle.peak) >> 20} over import, "
                f"{ended.seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
