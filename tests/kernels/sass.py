"""What can be said of a GPU kernel without a GPU: the machine code is what the source meant.

An exit status proves none of that, so tests assert on the SASS. Kernels are compiled for sm_90.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from required import unavailable

ROOT = Path(__file__).resolve().parents[2]

# 80 registers leave room for 768 threads on a multiprocessor, enough loads in flight for its share
# of the memory bandwidth.
REGISTERS = 80


def run(command: Sequence[str | Path], *, given: str | None = None, **env: str) -> str:
    """The output of a command that must succeed, in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=clean | env, input=given)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Sass(NamedTuple):
    """The machine code of one kernel: how often each opcode occurs, and what it occupies."""

    ops: Counter[str]
    registers: int
    stack: int
    shared: int

    def count(self, *names: str) -> int:
        """Instructions whose opcode is one of `names`, modifiers aside (FADD has FADD.FTZ)."""
        return sum(n for op, n in self.ops.items() if op.split(".")[0] in names)


def assert_lean(sass: Sass, registers: int = REGISTERS) -> None:
    """Nothing spilled, nothing through generic addresses, and within the register limit."""
    assert sass.count("LDL", "STL") == 0, sass
    assert sass.stack == 0, sass
    assert sass.count("LD", "ST") == 0, sass
    assert sass.registers <= registers, sass


def assert_plain_arithmetic(sass: Sass, plain: Sass, divides: bool) -> None:
    """Products and sums are rounded one by one; `plain` is the same kernel without division."""
    if not divides:
        assert sass.count("FFMA", "DFMA") == 0, sass
        assert sass.count("FMUL", "DMUL") > 0, sass
        return
    # A correctly rounded division is made of FMA, an approximate one is not; every sum of the
    # plain kernel must still be there beside it.
    assert sass.count("FFMA", "DFMA") > 0, sass
    assert sass.count("FADD", "DADD") - sass.ops["FADD.FTZ"] == plain.count("FADD", "DADD")


# ---- compilers -------------------------------------------------------------------------------


@functools.cache
def nvidia_tools() -> Path:
    """Where Triton keeps cuobjdump and nvdisasm; toolkits often come without them."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        unavailable("triton", "triton is not installed, and cuobjdump comes with it")
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    if not (tools / "cuobjdump").exists():
        unavailable("triton", f"this triton has no cuobjdump in {tools}")
    return tools


def disassemble(cubin: Path) -> dict[str, Sass]:
    """Every kernel of a cubin."""
    tools = nvidia_tools()
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"  # cuobjdump calls nvdisasm
    code = run([tools / "cuobjdump", "--dump-sass", cubin], PATH=path)
    usage = run([tools / "cuobjdump", "--dump-resource-usage", cubin], PATH=path)
    kernels = {}
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", code, re.DOTALL):
        opcode = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
        ops = Counter(re.findall(opcode, body, re.MULTILINE))
        used = re.search(
            rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
        )
        assert used, usage
        kernels[name] = Sass(ops, *map(int, used.groups()))
    assert kernels, code
    return kernels


def compile_cuda(source: str, *options: str, arch: str = "90") -> dict[str, Sass]:
    """The kernels of a file of csrc/cuda, compiled without the --fmad=false of setup.py.

    The source alone must rule out contraction.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        unavailable("cuda", "nvcc is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", *options]
        run([nvcc, *flags, "-cubin", "-o", cubin, ROOT / "csrc" / "cuda" / source])
        return disassemble(cubin)


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel and how it is launched.

    signature: "*bf16", "*i64", "i32", "fp32" ... for each argument that is no constant, in order.
    constants: the constexpr arguments; element types as "bf16", "fp64", "i8" .... divisible:
    what the launcher would find to be divisible by 16.
    """

    module: str  # below mergekern.backends.triton
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


# Triton is either interpreted or compiled in a process, as it was when a kernel file was imported.
_COMPILE = """
import importlib, json, sys
from pathlib import Path
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    "bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64,
    "i8": tl.int8, "i16": tl.int16, "i32": tl.int32, "i64": tl.int64,
}
for i, case in enumerate(json.load(sys.stdin)):
    module = importlib.import_module("mergekern.backends.triton." + case["module"])
    kernel = getattr(module, case["name"])
    constants = {
        k: TYPES.get(v, v) if isinstance(v, str) else v for k, v in case["constants"].items()
    }
    names = kernel.arg_names
    given = case["signature"] | dict.fromkeys(constants, "constexpr")
    assert set(given) == set(names), sorted(set(given) ^ set(names))
    source = ASTSource(
        kernel,
        {name: given[name] for name in names},
        {(names.index(k),): v for k, v in constants.items()},
        {(names.index(k),): [["tt.divisibility", 16]] for k in case["divisible"]},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case["options"])
    Path(sys.argv[1], f"{i}.cubin").write_bytes(compiled.asm["cubin"])
"""


def compile_triton(kernels: Sequence[Kernel]) -> list[Sass]:
    """Each of them compiled, in the order given."""
    nvidia_tools()
    with tempfile.TemporaryDirectory() as folder:
        run(
            [sys.executable, "-c", _COMPILE, folder],
            given=json.dumps([asdict(each) for each in kernels]),
            TRITON_CACHE_DIR=str(Path(folder, "cache")),
        )
        compiled = []
        for i in range(len(kernels)):
            (sass,) = disassemble(Path(folder, f"{i}.cubin")).values()
            compiled.append(sass)
        return compiled


def compile_cases(
    cases: Sequence[tuple[Any, ...]], kernel: Callable[..., Kernel]
) -> dict[tuple[Any, ...], Sass]:
    """kernel(*case) compiled, for each of them; skips without triton."""
    nvidia_tools()
    return dict(zip(cases, compile_triton([kernel(*case) for case in cases]), strict=True))
