"""Compiles csrc/cuda for the host: `python tests/kernels/build_host_cuda.py OUT`.

The kernels are C++ there, with the headers of host_cuda in the place of CUDA's; what comes out is a
mergekern._cuda that serves CPU tensors, one system thread running all threads of a grid. It is what
is imported where MERGEKERN_HOST_CUDA names OUT. Objects that are newer than every source are kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
FLAGS = [
    "-O1",
    "-g0",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",  # kernels move elements as uint4
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # unroll
    f"-I{HERE / 'host_cuda'}",
    f"-I{CUDA}",
]
PYTHON = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def run(command: Sequence[str | Path]) -> None:
    subprocess.run(command, check=True)


def compiled(source: Path, folder: Path, changed: float) -> Path:
    """The object of a source, made anew if it is older than `changed`."""
    target = folder / f"{source.name}.o"
    if target.exists() and target.stat().st_mtime > max(changed, source.stat().st_mtime):
        return target
    made = target.with_suffix(".new")
    run(["g++", *FLAGS, *PYTHON, "-x", "c++", "-c", source, "-o", made])
    if source.suffix == ".cu":  # what is static in a kernel file is shared memory: see block.cpp
        run(["objcopy", "--rename-section", ".bss=mk_shared", made])
    made.replace(target)
    return target


def build(sources: Sequence[Path], target: Path) -> None:
    """A shared library of the sources and of the emulator."""
    target.parent.mkdir(parents=True, exist_ok=True)
    headers = [
        path
        for folder in (CUDA, CUDA.parent, HERE / "host_cuda")
        for path in folder.iterdir()
        if path.suffix in (".h", ".cuh")
    ]
    changed = max(path.stat().st_mtime for path in [*headers, Path(__file__)])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        every = [*sources, *sorted((HERE / "host_cuda").glob("*.cpp"))]
        objects = list(pool.map(lambda s: compiled(s, target.parent, changed), every))
    run(["g++", "-shared", *objects, "-o", target])


if __name__ == "__main__":
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    build(sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")]), Path(sys.argv[1], f"_cuda{suffix}"))
