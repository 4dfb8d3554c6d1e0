"""zip_weights as machine code, by nvcc and by Triton."""

from __future__ import annotations

import pytest

from kernels.sass import Kernel, Sass, assert_lean, compile_cases, compile_cuda


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda(arch: str) -> None:
    kernels = compile_cuda("zip_weights.cu", arch=arch)
    plain = compile_cuda("zip_weights.cu", "--fmad=false", arch=arch)
    assert len(kernels) == 4 * 4  # types; packs, elements, gathers, staged gathers
    assert len(plain) == len(kernels)
    for (name, sass), unfused in zip(kernels.items(), plain.values(), strict=True):
        assert_lean(sass)
        # Divisions are made of FMA; the products are not.
        assert sass.count("FFMA", "DFMA") == unfused.count("FFMA", "DFMA"), (name, sass)
        assert sass.count("FMUL", "DMUL") > 0, (name, sass)
        assert sass.ops["I2F.U64.RP"] == 0, (name, sass)  # a division of 64 bits
        if "staged" in name:
            assert sass.ops["LDG.E.128"] > 0, (name, sass)
            assert sass.ops["STS.128"] > 0, (name, sass)
            assert sass.count("LDS") > 0, (name, sass)
        elif "rows_kernel" in name and "Li1E" not in name:
            assert sass.ops["LDG.E.128"] > 0, (name, sass)
            assert sass.count("STG") == sass.ops["STG.E.128"] == 1, (name, sass)


SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
CASES = [
    (dtype, stay, wide, width)
    for dtype in SIZES
    for stay, wide in ((True, True), (True, False), (False, False))
    for width in (16, 1 << 14)
]


def kernel(dtype: str, stay: bool, wide: bool, width: int, fused: bool = False) -> Kernel:
    from mergekern.backends.triton.zip_weights import LAUNCH, tile_shape

    rows, columns = tile_shape(SIZES[dtype], width, wide)
    return Kernel(
        module="zip_weights",
        name="zip_weights_kernel",
        signature={
            "plans": "*i64",
            "inputs": "*i64",
            "factors": "*fp32" if SIZES[dtype] == 2 else "*fp64",
            "owners": "*i32",
        },
        constants={"TYPE": dtype, "STAY": stay, "WIDE": wide, "ROWS": rows, "COLUMNS": columns},
        divisible=("plans", "inputs", "factors", "owners"),
        options=LAUNCH | ({"enable_fp_fusion": True} if fused else {}),
    )


@pytest.fixture(scope="module")
def kernels() -> dict[tuple, Sass]:
    return compile_cases([(*case, fused) for case in CASES for fused in (False, True)], kernel)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_triton(kernels: dict[tuple, Sass], case: tuple) -> None:
    sass, fused, wide = kernels[(*case, False)], kernels[(*case, True)], case[2]
    assert_lean(sass, registers=128)  # 512 threads on a multiprocessor
    if wide:
        assert sass.ops["LDG.E.128"] > 0, sass
        assert sass.count("STG") == sass.ops["STG.E.128"], sass
    # Divisions are made of FMA; the products are not.
    assert sass.count("FFMA", "DFMA") < fused.count("FFMA", "DFMA"), sass
    assert sass.count("FMUL", "DMUL") > fused.count("FMUL", "DMUL"), sass
