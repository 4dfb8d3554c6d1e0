"""permute as machine code, by nvcc and by Triton."""

from __future__ import annotations

import pytest

from kernels.sass import Kernel, Sass, assert_lean, compile_cases, compile_cuda


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda(arch: str) -> None:
    kernels = compile_cuda("permute.cu", arch=arch)
    assert len(kernels) == 5 * 3  # units; rows that stay together, gathers, staged gathers
    for name, sass in kernels.items():
        assert_lean(sass)
        # No arithmetic touches an element: the one product is that of a division's quotient.
        assert sass.count("FADD", "FMUL", "DADD", "F2F") == 0, (name, sass)
        assert sass.ops["I2F.U64.RP"] == 0, (name, sass)  # a division of 64 bits
        if "staged" in name:
            assert sass.ops["LDG.E.128"] > 0, (name, sass)
            assert sass.ops["STS.128"] > 0, (name, sass)
            assert sass.count("LDS") > 0, (name, sass)
            assert sass.ops["STG.E.128"] > 0, (name, sass)
        elif "uint4" in name:
            assert sass.ops["LDG.E.128"] == sass.count("STG") == sass.ops["STG.E.128"], (name, sass)


TYPES = {1: "i8", 2: "i16", 4: "i32", 8: "i64"}
CASES = [
    (unit, together, wide, width)
    for unit in TYPES
    for together, wide in ((True, True), (True, False), (False, False))
    for width in (64, 1 << 14)
]


def kernel(unit: int, together: bool, wide: bool, width: int) -> Kernel:
    from mergekern.backends.triton.permute import LAUNCH, tile_shape

    rows, columns = tile_shape(unit, width, wide)
    return Kernel(
        module="permute",
        name="permute_kernel",
        signature={"plans": "*i64", "owners": "*i32"},
        constants={
            "UNIT": TYPES[unit],
            "TOGETHER": together,
            "WIDE": wide,
            "ROWS": rows,
            "COLUMNS": columns,
        },
        divisible=("plans", "owners"),
        options=LAUNCH,
    )


@pytest.fixture(scope="module")
def kernels() -> dict[tuple, Sass]:
    return compile_cases(CASES, kernel)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_triton(kernels: dict[tuple, Sass], case: tuple) -> None:
    sass, wide = kernels[case], case[2]
    assert_lean(sass)
    if wide:
        assert sass.ops["LDG.E.128"] > 0, sass
        assert sass.count("STG") == sass.ops["STG.E.128"], sass
    # No arithmetic touches an element: a copy keeps the payload of a NaN.
    assert sass.count("FADD", "FMUL", "DADD", "DMUL", "F2F") == 0, sass
