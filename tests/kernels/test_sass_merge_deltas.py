"""merge_deltas, l1_norms and count_kept as machine code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from kernels.sass import REGISTERS, Kernel, Sass, assert_lean, compile_cases, compile_cuda


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda(arch: str) -> None:
    kernels = compile_cuda("merge_deltas.cu", arch=arch)
    assert len(kernels) == 4 * 2 * 2  # types, with an election or not, stepwise or not
    for name, sass in kernels.items():
        # Two blocks on a multiprocessor, but for elections of float64: one.
        assert_lean(sass, 208 if "IdLb1E" in name else 128)
        assert sass.ops["LDG.E.128"] > 0, (name, sass)
        assert sass.ops["STG.E.128"] > 0, (name, sass)
    if arch != "90":  # contraction is decided before the architecture is
        return
    plain = compile_cuda("merge_deltas.cu", "--fmad=false", arch=arch)
    fused = [[s.count("FFMA", "DFMA") for s in k.values()] for k in (kernels, plain)]
    assert fused[0] == fused[1]  # those of divisions; sums of products are never contracted


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda_sums(arch: str) -> None:
    kernels = compile_cuda("delta_sums.cu", arch=arch)
    assert len(kernels) == 2 * 4 * 2  # norms and counts, types, differences rounded or not
    for name, sass in kernels.items():
        assert_lean(sass)
        assert sass.ops["LDG.E.128"] > 0, (name, sass)
        assert sass.count("FFMA", "DFMA") == 0, (name, sass)


SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
TRIMMED, BANDED, DRAWN, UNALIGNED, STORED = (1 << i for i in range(5))


@dataclass
class Merge:
    """A call of merge_deltas, as the constants of its kernel."""

    n: int = 3
    x: str = "bf16"
    out: str = "bf16"
    keep: int = 0
    elect: str = "everyone"
    mean: bool = False
    more: dict[str, Any] = field(default_factory=dict)
    registers: int = REGISTERS


# Eight models stay in 64 registers of a thread, four of float64 likewise: two programs of 256
# threads fit then, or one where draws are made as well, with nine loads of 16 bytes each in flight.
MERGES = {
    "arithmetic": Merge(),
    "arithmetic of 8": Merge(n=8),
    "arithmetic fp32": Merge(x="fp32", out="fp32"),
    "arithmetic bf16 to fp32": Merge(out="fp32"),
    "ties": Merge(keep=TRIMMED, elect="sum", mean=True),
    "ties fp32": Merge(x="fp32", out="fp32", keep=TRIMMED, elect="sum", mean=True),
    "ties fp64": Merge(4, "fp64", "fp64", TRIMMED, "sum", True, registers=128),
    "ties of 8": Merge(n=8, keep=TRIMMED, elect="sum", mean=True, registers=128),
    "ties of 9": Merge(n=9, keep=TRIMMED, elect="sum", mean=True),
    "breadcrumbs": Merge(keep=TRIMMED | BANDED, elect="sum"),
    "dare": Merge(keep=DRAWN),
    "dare fp32": Merge(x="fp32", out="fp32", keep=DRAWN),
    "dare ties of 8": Merge(n=8, keep=DRAWN, elect="count", mean=True, registers=168),
    "dare of a slice": Merge(keep=DRAWN | UNALIGNED),
    "masks": Merge(keep=STORED),
    "elected maximum": Merge(
        x="fp16",
        out="fp16",
        keep=TRIMMED | STORED,
        elect="count",
        more={"MAX": True, "AFTER": True, "ZERO": "none"},
    ),
    "host": Merge(
        keep=DRAWN | STORED,
        elect="present",
        mean=True,
        more={"STEPWISE": True, "RESCALE": "over", "ALONE": True, "SCALE": True},
        registers=128,
    ),
    "deltas": Merge(
        x="fp32",
        elect="sum",
        more={"BASE": False, "STEPWISE": True, "RESCALE": "times", "ZERO": "negative"},
    ),
}


def shared(x: str, keep: int) -> dict[str, Any]:
    from mergekern.backends.triton.keys import BLOCK

    constants = {"IN": x, "WIDE": True, "BASE": True, "KEEP": keep, "STEPWISE": False}
    return constants | {"BLOCK": BLOCK}


def kernel(name: str, signature: dict[str, str], constants: dict[str, Any]) -> Kernel:
    from mergekern.backends.triton.keys import LAUNCH

    signature = signature | {"base": f"*{constants['IN']}", "rules": "*i64", "numel": "i32"}
    pointers = [k for k, v in signature.items() if v.startswith("*")]
    divisible = [*pointers, "numel"]
    return Kernel("merge_deltas", f"{name}_kernel", signature, constants, divisible, LAUNCH)


def merge_kernel(name: str) -> Kernel:
    from mergekern.backends.triton.merge_deltas import unrolled

    case = MERGES[name]
    acc = "fp64" if case.x == "fp64" else "fp32"
    constants = shared(case.x, case.keep) | {
        "N": case.n,
        "RESCALE": "none",
        "ELECT": case.elect,
        "ZERO": "positive",
        "AFTER": False,
        "MAX": False,
        "ALONE": False,
        "NORMALIZE": case.mean,
        "SCALE": False,
        "UNROLL": unrolled(case.n, SIZES[acc]),
    }
    signature = {"out": f"*{case.out}", "factors": f"*{acc}"}
    return kernel("merge_deltas", signature, constants | case.more)


@pytest.fixture(scope="module")
def merges() -> dict[str, Sass]:
    return {
        name: sass for (name,), sass in compile_cases([(m,) for m in MERGES], merge_kernel).items()
    }


@pytest.mark.parametrize("name", MERGES)
def test_merge_deltas(merges: dict[str, Sass], name: str) -> None:
    case, sass = MERGES[name], merges[name]
    assert_lean(sass, case.registers)
    # An election takes no second read of as many models as registers hold.
    terms = case.n if case.n <= 8 else 2  # one a loop
    reads = case.more.get("BASE", True) + terms
    assert sass.ops["LDG.E.128"] == reads * SIZES[case.x] // 2, sass
    assert sass.ops["LDG.E.U16"] == 0, sass
    assert sass.count("STG") == sass.ops["STG.E.128"] == SIZES[case.out] // 2, sass
    if not case.mean and case.more.get("RESCALE") != "over":  # which divide, by FMA
        assert sass.count("FFMA", "DFMA", "CALL") == 0, sass
        assert sass.count("FMUL", "DMUL") > 0, sass
    if case.x == case.out:  # every thread stores what it has read
        assert sass.shared == 0, sass


def test_eight_elements_share_their_draws(merges: dict[str, Sass]) -> None:
    """A Philox block is 20 products of 32 by 32 bits; element by element it would be 160."""

    def products(name: str) -> int:
        return merges[name].ops["IMAD.HI.U32"] + merges[name].ops["IMAD.WIDE.U32"]

    # Without draws there are those of addresses.
    assert products("dare") - products("arithmetic") <= 3 * 20
    # Of float32 a thread loads four neighbours: two threads make the draws of eight.
    assert products("dare fp32") - products("arithmetic fp32") <= 3 * 2 * 20


COUNTS = [(name, x) for name in ("l1_norms", "count_kept") for x in ("bf16", "fp32", "fp64")]


def count_kernel(name: str, x: str) -> Kernel:
    signatures = {
        "l1_norms": {"sums": "*fp64", "n": "i32"},
        "count_kept": {"counts": "*i32", "n": "i32", "first": "i32", "last": "i32"},
    }
    return kernel(name, signatures[name], shared(x, TRIMMED))


@pytest.fixture(scope="module")
def counts() -> dict[tuple[str, str], Sass]:
    return compile_cases(COUNTS, count_kernel)


@pytest.mark.parametrize("case", COUNTS, ids="-".join)
def test_counts(counts: dict[tuple[str, str], Sass], case: tuple[str, str]) -> None:
    sass = counts[case]
    assert_lean(sass, 128 if case[1] == "fp64" else REGISTERS)  # values of twice the size
    assert sass.ops["LDG.E.128"] == 2 * SIZES[case[1]] // 2, sass  # base and x
    assert sass.ops["LDG.E.U16"] == 0, sass
    assert sass.count("ATOM", "ATOMG", "RED", "REDG") == 0, sass
