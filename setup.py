"""Builds mergekern._cpu (C++) and, where nvcc is found, mergekern._cuda.

MERGEKERN_BUILD chooses: `auto` (default) builds what the tools at hand can build and says in one
line what it left out; `python` builds neither; `cpu` and `cuda` must succeed or the install fails.
Only tools decide, never hardware. MERGEKERN_CUDA_ARCHS lists GPU architectures (default "80 90").
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODES = ("auto", "python", "cpu", "cuda")
MODE = os.environ.get("MERGEKERN_BUILD", "auto")
if MODE not in MODES:
    sys.exit(f"MERGEKERN_BUILD: unknown value; got {MODE!r}; expected one of {', '.join(MODES)}")

# No contraction to FMA and no -ffast-math: results are specified step by step.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside_home = str(Path(home) / "bin" / "nvcc") if home else None
    return shutil.which(beside_home or "nvcc") or shutil.which("nvcc")


def cuda_root(nvcc: str) -> Path:
    """The toolkit's folder: two levels above the nvcc that really runs."""
    probe = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    for line in probe.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(nvcc).resolve().parent.parent


def cpu_extension() -> Extension:
    import pybind11

    return Extension(
        "mergekern._cpu",
        sources=sorted(str(p) for p in Path("csrc").glob("*.cpp")),
        depends=sorted(str(p) for p in Path("csrc").glob("*.h")),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=CXX_FLAGS,
        language="c++",
    )


def cuda_extension(nvcc: str) -> Extension:
    import pybind11

    root = cuda_root(nvcc)
    lib = next((d for d in (root / "lib64", root / "lib") if d.is_dir()), root / "lib64")
    return Extension(
        "mergekern._cuda",
        sources=sorted(str(p) for p in Path("csrc/cuda").glob("*.cpp")),
        depends=sorted(
            str(p) for g in ("cuda/*.cu*", "cuda/*.h", "*.h") for p in Path("csrc").glob(g)
        ),
        include_dirs=[pybind11.get_include(), str(root / "include")],
        library_dirs=[str(lib)],
        libraries=["cudart_static", "rt", "pthread", "dl"],
        extra_compile_args=CXX_FLAGS,
        language="c++",
    )


class BuildExtensions(build_ext):
    """Compiles .cu files with nvcc first; in `auto` mode a failure is one printed line."""

    def build_extension(self, ext: Extension) -> None:
        required = MODE == "cuda" or (MODE == "cpu" and ext.name.endswith("_cpu"))
        try:
            if ext.name.endswith("_cuda"):
                ext.extra_objects = self.compile_cuda()
            super().build_extension(ext)
        except Exception as error:
            if required:
                raise
            print(f"mergekern: {ext.name} not built ({error}); install goes on without it")
            self.skipped = [*getattr(self, "skipped", []), ext.name]

    def copy_extensions_to_source(self) -> None:
        built = [e for e in self.extensions if e.name not in getattr(self, "skipped", [])]
        self.extensions = built
        super().copy_extensions_to_source()

    def compile_cuda(self) -> list[str]:
        nvcc = find_nvcc()
        assert nvcc is not None
        archs = os.environ.get("MERGEKERN_CUDA_ARCHS", "80 90").split()
        flags = ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        newest = max(archs, key=lambda a: int("".join(filter(str.isdigit, a))))
        if newest.isdigit():  # PTX of the newest portable architecture serves later GPUs
            flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)

        def compiled(source: Path) -> str:
            target = str(Path(self.build_temp) / f"{source.stem}.cu.o")
            subprocess.run([nvcc, *flags, "-c", str(source), "-o", target], check=True)
            return target

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(compiled, sorted(Path("csrc/cuda").glob("*.cu"))))


extensions = []
if MODE != "python":
    extensions.append(cpu_extension())
    nvcc = find_nvcc() if MODE in ("auto", "cuda") else None
    if nvcc:
        extensions.append(cuda_extension(nvcc))
    elif MODE == "cuda":
        sys.exit("MERGEKERN_BUILD=cuda: nvcc was not found on PATH or under CUDA_HOME")
    else:
        print("mergekern: mergekern._cuda not built (no nvcc)")

ParallelCompile("MAX_JOBS").install()
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtensions})
