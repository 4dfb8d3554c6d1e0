"""What can be said of the GPU kernels without a GPU: they build, load, and the machine code is
what the source meant. An exit status proves none of that, so the assertions are on the SASS.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = os.environ.get("MERGEKERN_REQUIRE", "").replace(",", " ").split()

# 80 registers leave room for 768 threads on a multiprocessor, enough loads in flight for its share
# of the memory bandwidth.
REGISTERS = 80


def unavailable(backend: str, reason: str) -> NoReturn:
    if backend in REQUIRED:
        pytest.fail(f"MERGEKERN_REQUIRE names {backend}, but {reason}")
    pytest.skip(reason)


def run(command: list[str | Path], **env: str) -> str:
    """The output of a command that must succeed, in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=clean | env)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- SASS ------------------------------------------------------------------------------------


class Sass(NamedTuple):
    """The machine code of one kernel: how often each opcode occurs, and what it occupies."""

    ops: Counter[str]
    registers: int
    stack: int

    def count(self, *names: str) -> int:
        """Instructions whose opcode is one of `names`, modifiers aside (FADD has FADD.FTZ)."""
        return sum(n for op, n in self.ops.items() if op.split(".")[0] in names)


def nvidia_tools() -> Path:
    """Where Triton keeps cuobjdump and nvdisasm; toolkits often come without them."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        unavailable("triton", "triton is not installed, and cuobjdump comes with it")
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    if not (tools / "cuobjdump").exists():
        unavailable("triton", f"this triton has no cuobjdump in {tools}")
    return tools


def disassemble(cubin: Path, tools: Path) -> dict[str, Sass]:
    """Every kernel of a cubin."""
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"  # cuobjdump calls nvdisasm
    code = run([tools / "cuobjdump", "--dump-sass", cubin], PATH=path)
    usage = run([tools / "cuobjdump", "--dump-resource-usage", cubin], PATH=path)
    kernels = {}
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", code, re.DOTALL):
        opcode = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
        ops = Counter(re.findall(opcode, body, re.MULTILINE))
        used = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+)", usage)
        assert used, usage
        kernels[name] = Sass(ops, int(used[1]), int(used[2]))
    assert kernels, code
    return kernels


def assert_lean(sass: Sass) -> None:
    """Nothing spilled, nothing through generic addresses, and within the register limit."""
    assert sass.count("LDL", "STL") == 0, sass
    assert sass.stack == 0, sass
    assert sass.count("LD", "ST") == 0, sass
    assert sass.registers <= REGISTERS, sass


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


# ---- the CUDA module -------------------------------------------------------------------------

WITHOUT_DEVICE = """
import mergekern._cpu  # registers some of the same C++ types in the same process
from mergekern import _cuda

print(_cuda.why_not())
f32 = _cuda.DType.f32
try:
    _cuda.weighted_sum(
        out=16, out_dtype=f32, xs=16, x_dtype=f32, weights=16, n=3, numel=1000, divisor=1.0,
        wide=True, device=7, stream=0,
    )
except RuntimeError as error:
    print(error)
"""


def test_cuda_module_without_a_device() -> None:
    if importlib.util.find_spec("mergekern._cuda") is None:
        unavailable("cuda", "mergekern._cuda is not built: MERGEKERN_BUILD=cuda with nvcc on PATH")
    reason, error = run(
        [sys.executable, "-c", WITHOUT_DEVICE], CUDA_VISIBLE_DEVICES=""
    ).splitlines()
    assert re.fullmatch(
        r"no usable CUDA driver \(cudaGetDeviceCount: .+\); install one that serves CUDA \d+\.\d"
        r"|no CUDA device is visible; see CUDA_VISIBLE_DEVICES",
        reason,
    )
    assert error.startswith(
        "weighted_sum: CUDA failed on device 7 with 3 inputs of 1000 elements; got cudaError"
    )


@pytest.fixture(scope="module")
def cuda_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sass]:
    tools = nvidia_tools()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        unavailable("cuda", "nvcc is not on PATH")
    cubin = tmp_path_factory.mktemp("cuda") / "weighted_sum.cubin"
    source = ROOT / "csrc" / "cuda" / "weighted_sum.cu"
    # Without the --fmad=false of setup.py: the source alone must rule out contraction.
    flags = ["-O3", "-std=c++17", "-gencode=arch=compute_90,code=sm_90"]
    run([nvcc, *flags, "-cubin", "-o", cubin, source])
    return disassemble(cubin, tools)


def test_cuda_weighted_sum(cuda_kernels: dict[str, Sass]) -> None:
    pairs = {}
    for name, sass in cuda_kernels.items():
        match = re.search(r"weighted_sum_kernelI(.+)Lb([01])E", name)
        assert match, name
        pairs[match[1], match[2] == "1"] = sass
    assert len(pairs) == 4 * 4 * 2  # input types, output types, with and without division
    for (types, divides), sass in pairs.items():
        assert_lean(sass)
        assert sass.ops["LDG.E.128"] > 0, (types, sass)
        assert sass.ops["STG.E.128"] > 0, (types, sass)
        assert_plain_arithmetic(sass, pairs[types, False], divides)
        assert (sass.count("DMUL") > 0) == types.startswith(("f", "d")), (types, sass)


# ---- the Triton kernel -----------------------------------------------------------------------

COMPILE = """
import sys
import torch, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mergekern.backends.triton.common import DTYPES
from mergekern.backends.triton.weighted_sum import LAUNCH, block_size, weighted_sum_kernel

POINTERS = {"f32": "*fp32", "f64": "*fp64", "f16": "*fp16", "bf16": "*bf16"}
TYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}

folder, *cases = sys.argv[1:]
for case in cases:
    x, out, size, divide = case.split("-")
    dtype = TYPES[x]
    constants = {
        "IN": DTYPES[dtype],
        "WIDE": True,
        "DIVIDE": divide == "divide",
        "BLOCK": block_size(int(size), dtype.itemsize),
    }
    signature = {
        "out": POINTERS[out],
        "addresses": "*i64",
        "factors": "*fp32" if TYPES[x].itemsize == 2 else "*fp64",
        "n": "i32",
        "numel": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    names = list(signature)
    # What the launcher finds out by itself: aligned pointers, and a size divisible by 16.
    divisible = {(names.index(k),): [["tt.divisibility", 16]]
                 for k in ("out", "addresses", "factors", "numel")}
    source = ASTSource(
        weighted_sum_kernel,
        signature,
        {(names.index(k),): v for k, v in constants.items()},
        divisible,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=LAUNCH)
    Path(folder, case + ".cubin").write_bytes(compiled.asm["cubin"])
"""

LARGE = 1 << 24
TRITON_CASES = [
    f"{x}-{out}-{size}-{divide}"
    for x, out, size in [
        ("bf16", "bf16", 1 << 16),
        ("bf16", "bf16", LARGE),
        ("f16", "f32", LARGE),
        ("f32", "f32", LARGE),
        ("f32", "bf16", LARGE),
        ("f64", "bf16", LARGE),
    ]
    for divide in ("plain", "divide")
]


@pytest.fixture(scope="module")
def triton_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sass]:
    tools = nvidia_tools()
    folder = tmp_path_factory.mktemp("triton")
    run(
        [sys.executable, "-c", COMPILE, folder, *TRITON_CASES],
        TRITON_CACHE_DIR=str(folder / "cache"),
    )
    kernels = {}
    for case in TRITON_CASES:
        (kernels[case],) = disassemble(folder / f"{case}.cubin", tools).values()
    return kernels


@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_weighted_sum(triton_kernels: dict[str, Sass], case: str) -> None:
    sass = triton_kernels[case]
    plain = triton_kernels[case.replace("divide", "plain")]
    assert_lean(sass)
    # Loads of the tensors: as many as in CUDA, each of 16 bytes, and none of single elements.
    assert sass.ops["LDG.E.128"] > 0, sass
    assert sass.ops["LDG.E.U16"] == 0, sass
    assert sass.count("STG") == sum(n for op, n in sass.ops.items() if op in wide_stores(case))
    assert_plain_arithmetic(sass, plain, plain is not sass)
    assert (sass.count("DMUL") > 0) == case.startswith(("f32", "f64")), sass


def wide_stores(case: str) -> set[str]:
    """A thread writes what became of 16 bytes read at a time, or of 32 in large tensors."""
    return {"STG.E.64"} if case.startswith("f64-bf16") else {"STG.E.128"}
