"""weighted_rows as machine code, by nvcc and by Triton."""

from __future__ import annotations

import pytest

from kernels.sass import REGISTERS, Kernel, Sass, assert_lean, compile_cases, compile_cuda


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda(arch: str) -> None:
    kernels = compile_cuda("weighted_rows.cu", arch=arch)
    assert len(kernels) == 4 * 4 * 2  # input types, output types, packs in a row or anywhere
    for name, sass in kernels.items():
        # Eight elements of different rows have eight double weights where floats become 16 bits.
        assert_lean(sass, REGISTERS + 16)
        assert sass.ops["LDG.E.128"] > 0, (name, sass)
        assert sass.ops["STG.E.128"] > 0, (name, sass)
        assert sass.count("FFMA", "DFMA") == 0, (name, sass)  # every product is rounded
        assert sass.count("FMUL", "DMUL") > 0, (name, sass)
        assert sass.ops["I2F.U64.RP"] == 0, (name, sass)  # a division of 64 bits


SIZES = {"bf16": 2, "fp32": 4, "fp64": 8}
CASES = [(x, lie) for x in ("bf16", "fp32", "fp64") for lie in ("row", "columns", "anywhere")]


def kernel(x: str, lie: str) -> Kernel:
    from mergekern.backends.triton.keys import LAUNCH

    signature = {
        "out": f"*{x}",
        "addresses": "*i64",
        "factors": "*fp32" if x == "bf16" else "*fp64",
        "n": "i32",
        "numel": "i32",
        "k": "i32",
        "inner": "i32",
    }
    divisible = ["out", "addresses", "factors", "numel"]
    divisible += {"row": ["k", "inner"], "columns": ["k"], "anywhere": []}[lie]
    return Kernel(
        module="weighted_rows",
        name="weighted_rows_kernel",
        signature=signature,
        constants={
            "IN": x,
            "WIDE": True,
            "GROUP": 16 // SIZES[x],
            "LIE": lie,
            "LONG": False,
            "BLOCK": 32 * LAUNCH["num_warps"] * 16 // SIZES[x],
        },
        divisible=divisible,
        options=LAUNCH,
    )


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[str, str], Sass]:
    return compile_cases(CASES, kernel)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_triton(kernels: dict[tuple[str, str], Sass], case: tuple[str, str]) -> None:
    _, lie = case
    sass = kernels[case]
    assert_lean(sass)
    assert sass.count("STG") == sass.ops["STG.E.128"] == 1, sass
    assert sass.ops["LDG.E.U16"] == 0, sass
    assert sass.count("FFMA", "DFMA") == 0, sass  # every product is rounded
    assert sass.count("FMUL", "DMUL") > 0, sass
    assert sass.count("CALL") == 0, sass  # divisions of 64 bits
    loads = sass.count("LDG") - sass.ops["LDG.E.128"]
    if lie != "anywhere":  # one division for a group, one weight or 16-byte loads of them
        assert sass.count("MUFU") == 1, sass
        assert loads <= 2 * sass.ops["LDG.E.128"], sass
    if lie == "columns":  # beside these, addresses
        assert sass.ops["LDG.E"] == 0, sass
        assert 2 * loads <= sass.ops["LDG.E.128"], sass
