"""The kernels of kth_magnitude as machine code; those of variance_mask's selection are the same."""

from __future__ import annotations

import dataclasses

import pytest

from kernels.sass import (
    REGISTERS,
    Kernel,
    Sass,
    assert_lean,
    compile_cases,
    compile_cuda,
    compile_triton,
)

# name: (type of x, base, rounded, variance)
SOURCES = {
    "bf16": ("bf16", False, False, False),
    "bf16-base": ("bf16", True, False, False),
    "fp16-rounded": ("fp16", True, True, False),
    "fp32-base": ("fp32", True, False, False),
    "fp64": ("fp64", False, False, False),
    "bf16-variance": ("bf16", True, False, True),
}
TAKING_KEYS = ("keys", "sample", "count", "find", "histogram")
# Selections among keys that are kept take no tensors.
AMONG_KEPT = ("digit", "tie")


def taking_keys(name: str, source: str) -> Kernel:
    from mergekern.backends.triton.keys import BLOCK, LAUNCH

    x, base, rounded, variance = SOURCES[source]
    key = "*i64" if x == "fp64" else "*i32"
    own = {
        "keys": {"out": key, "vectors": "i32"},
        "sample": {"sample": key, "vectors": "i32", "runs": "i32"},
        "count": {
            "counts": "*i32",
            "kept": key,
            "edges": key,
            "of": "*i64",
            "brackets": "i32",
            "chunks": "i32",
            "steps": "i32",
            "room": "i32",
        },
        "find": {
            "index": "*i64",
            "wanted": "*i64",
            "chunk": "*i64",
            "before": "*i64",
            "of": "*i64",
            "chunks": "i32",
            "steps": "i32",
        },
        "histogram": {"counts": "*i64", "prefix": "i64", "shift": "i32", "over": "i32"},
    }[name]
    tensors = {"addresses": "*i64", "base": f"*{x}", "n": "i32", "numel": "i32"}
    constants = {"IN": x, "WIDE": True, "BASE": base, "ROUNDED": rounded, "VARIANCE": variance}
    constants["BLOCK"] = BLOCK
    if name == "histogram":
        constants["LANES"] = 8
    pointers = [k for k, v in (own | tensors).items() if v.startswith("*")]
    return Kernel(
        module="keys" if name == "keys" else "selecting",
        name=f"{name}_kernel",
        signature=own | tensors,
        constants=constants,
        divisible=[*pointers, "numel"],
        options=LAUNCH,
    )


def among_kept(name: str, key: str) -> Kernel:
    signature = {
        "state": "*i64",
        "histograms": "*i64",
        "kept": key,
        "counts": "*i32",
        "edges": key,
        "brackets": "i32",
        "chunks": "i32",
        "room": "i32",
        "round": "i32",
    }
    if name == "digit":
        signature["shift"] = "i32"
    else:
        signature |= {"found": "*i64", "ties": "*i32", "totals": "*i64", "wanted": "*i64"}
    constants = {"BLOCK": 1024} | ({"FIRST": False} if name == "digit" else {})
    return Kernel(
        module="selecting",
        name=f"{name}_kernel",
        signature=signature,
        constants=constants,
        divisible=[*(k for k, v in signature.items() if v.startswith("*")), "room"],
    )


CASES = [(name, source) for name in TAKING_KEYS for source in SOURCES]
CASES += [(name, key) for name in AMONG_KEPT for key in ("*i32", "*i64")]


def kernel(name: str, what: str) -> Kernel:
    return among_kept(name, what) if name in AMONG_KEPT else taking_keys(name, what)


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[str, str], Sass]:
    return compile_cases(CASES, kernel)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_triton(kernels: dict[tuple[str, str], Sass], case: tuple[str, str]) -> None:
    name, what = case
    sass = kernels[case]
    if name == "find":  # 8 bytes are reserved for some types; nothing reads or writes them
        assert sass.stack <= 8, sass
        sass = sass._replace(stack=0)
    # The pass compares and compacts: two programs of 256 threads fit, as many of the others as
    # their loads want.
    assert_lean(sass, 128 if name == "count" else REGISTERS)
    if name in ("keys", "count", "find", "histogram"):  # neighbours in memory, unlike samples
        assert sass.ops["LDG.E.128"] > 0, sass
        assert sass.ops["LDG.E.U16"] == 0, sass
    if name in ("digit", "histogram"):  # nothing waits for results of atomics, or for their order
        assert sass.count("RED", "REDG") > 0, sass
        assert sass.count("ATOM", "ATOMG", "MEMBAR") == 0, sass
    if name in TAKING_KEYS and "variance" not in what:  # differences alone
        assert sass.count("FMUL", "FFMA", "DMUL", "DFMA") == 0, sass


def test_squares_of_a_variance_are_rounded() -> None:
    plain = taking_keys("keys", "bf16-variance")
    fused = dataclasses.replace(plain, options=plain.options | {"enable_fp_fusion": True})
    rounded, contracted = compile_triton([plain, fused])
    # Divisions are made of FMA in both; one for each of the eight elements of a thread is a square.
    assert contracted.count("FFMA") - rounded.count("FFMA") >= 8, (rounded, contracted)


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda(arch: str) -> None:
    kernels = compile_cuda("kth_magnitude.cu", arch=arch)
    assert len(kernels) == 5 * 4 * 3  # kernels, types, exact and rounded differences, variances
    for name, sass in kernels.items():
        varies = "LNS0_4KindE2E" in name
        lean = 48 if "count_kernel" in name and ("4bf16" in name or "3f16" in name) else 72
        assert_lean(sass, 104 if varies else lean)
        if "sample_kernel" not in name:  # whose runs lie anywhere
            assert sass.ops["LDG.E.128"] > 0, (name, sass)
        if "histogram_kernel" in name:  # nothing waits for results of atomics, or for their order
            assert sass.count("RED", "REDG") > 0, (name, sass)
        assert sass.count("ATOM", "ATOMG", "MEMBAR") == 0, (name, sass)
        if not varies:  # differences alone; a position takes products of integers
            assert sass.count("FMUL", "FFMA", "DMUL", "DFMA") == 0, (name, sass)


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda_descent(arch: str) -> None:
    kernels = compile_cuda("kth_descent.cu", arch=arch)
    assert len(kernels) == 2 * 2  # bytes and ties, keys of 32 and 64 bits
    for name, sass in kernels.items():
        assert_lean(sass, 48)
        assert sass.count("ATOM", "ATOMG", "MEMBAR") == 0, (name, sass)
