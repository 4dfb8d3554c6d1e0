"""gram in Triton as machine code."""

from __future__ import annotations

import pytest

from kernels.sass import Kernel, Sass, assert_lean, compile_cases

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
