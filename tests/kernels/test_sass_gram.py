"""gram as machine code."""

from __future__ import annotations

import re

import pytest

from kernels.sass import Kernel, Sass, assert_lean, compile_cases, compile_cuda

TYPES = ("bf16", "fp16", "fp32", "fp64")
CASES = [(x, based) for x in TYPES for based in (False, True)]


def dots(x: str, based: bool) -> Kernel:
    from mergekern.backends.triton import gram

    return Kernel(
        module="gram",
        name="dots_kernel",
        signature={
            "partial": "*fp64",
            "table": "*i64",
            **dict.fromkeys(("tensors", "pairs", "rows", "width", "chunks"), "i32"),
        },
        constants={
            "IN": x,
            "BASED": based,
            "WIDE": True,
            "CHUNK": gram.LONGEST,
            "ROWS": 1,
            "COLUMNS": gram.LANES,
        },
        divisible=("partial", "table", "width"),
        options=gram.LAUNCH,
    )


def total(rows: int) -> Kernel:
    from mergekern.backends.triton import gram

    sizes = ("n", "tensors", "pairs", "rows", "chunks")
    return Kernel(
        module="gram",
        name="sums_kernel",
        signature={
            "out": "*fp64",
            "partial": "*fp64",
            "table": "*i64",
            **dict.fromkeys(sizes, "i32"),
        },
        constants={"ROWS": rows, "BLOCK": gram.SUMMED // rows},
        divisible=("out", "partial", "table"),
        options=gram.LAUNCH,
    )


@pytest.fixture(scope="module")
def compiled() -> dict[tuple, Sass]:
    return compile_cases(CASES, dots)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_dots(compiled: dict[tuple, Sass], case: tuple[str, bool]) -> None:
    sass = compiled[case]
    # 24 sums in double of each thread take 48 registers, and what is read ahead the rest.
    assert_lean(sass, 128)
    assert sass.ops["LDG.E.128"] > 0, sass
    assert sass.ops["LDG.E.U16"] == sass.ops["LDG.E"] == 0, sass
    assert sass.count("DFMA", "FFMA") == 0, sass
    assert sass.count("DMUL") >= 3 * 8, sass  # three products of 8 elements


def test_total() -> None:
    for sass in compile_cases([(rows,) for rows in (1, 8, 512)], total).values():
        assert_lean(sass)
        assert sass.count("DMUL", "DFMA") == 0, sass


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda(arch: str) -> None:
    kernels = compile_cuda("gram.cu", arch=arch)
    # Types, two or four vectors or four and four, wide or not, with a base or not; two of sums.
    assert len(kernels) == 4 * 3 * 2 * 2 + 2
    for name, sass in kernels.items():
        if "sums_kernel" in name:
            assert_lean(sass, 40)
            assert sass.ops["LDG.E.64"] >= 8, (name, sass)  # read ahead
            continue
        n, cross, wide, based = re.findall(r"L[ib](\d)E", name)
        # Of two vectors, four blocks run on a multiprocessor, three with a base.
        pairs = {("2", "0"): 64, ("2", "1"): 80, ("4", "0"): 112, ("4", "1"): 152}
        assert_lean(sass, 208 if cross == "1" else pairs[n, based])
        if wide == "1":
            vectors = int(n) * (1 + int(cross)) + int(based)
            assert sass.ops["LDG.E.128"] == vectors, (name, sass)
        sums = 16 if cross == "1" else 3 if n == "2" else 10
        assert sass.count("DMUL") == 0, (name, sass)
        assert sass.count("DFMA") % sums == 0, (name, sass)
