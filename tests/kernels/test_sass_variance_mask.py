"""variance_mask as machine code."""

from __future__ import annotations

import pytest

from kernels.sass import REGISTERS, Kernel, Sass, assert_lean, compile_cases, compile_cuda

CASES = [(x, everything) for x in ("bf16", "fp32", "fp64") for everything in (False, True)]


def kernel(x: str, everything: bool) -> Kernel:
    from mergekern.backends.triton.keys import BLOCK, LAUNCH

    signature = {
        "bits": "*fp64" if everything else "*u8",
        "sums": "*fp64",
        "addresses": "*i64",
        "base": f"*{x}",
        "n": "i32",
        "threshold": "i64" if x == "fp64" else "i32",
        "cut": "i64",
        "numel": "i32",
    }
    constants = {"ALL": everything, "IN": x, "WIDE": True, "BASE": True, "ROUNDED": False}
    return Kernel(
        module="variance_mask",
        name="variance_mask_kernel",
        signature=signature,
        constants=constants | {"VARIANCE": True, "BLOCK": BLOCK},
        divisible=("bits", "sums", "addresses", "base", "numel"),
        options=LAUNCH,
    )


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[str, bool], Sass]:
    return compile_cases(CASES, kernel)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{'all' if c[1] else 'trimmed'}")
def test_triton(kernels: dict[tuple[str, bool], Sass], case: tuple[str, bool]) -> None:
    sass = kernels[case]
    assert_lean(sass, 128 if case[0] == "fp64" else REGISTERS)  # values of twice the size
    assert sass.ops["LDG.E.128"] > 0, sass
    assert sass.ops["LDG.E.U16"] == 0, sass


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda(arch: str) -> None:
    kernels = compile_cuda("variance_mask.cu", arch=arch)
    assert len(kernels) == 4  # types
    for name, sass in kernels.items():
        assert_lean(sass, 80)
        assert sass.ops["LDG.E.128"] > 0, (name, sass)
        assert sass.count("ATOM", "ATOMG", "RED", "REDG") == 0, (name, sass)
    # Squares are rounded before they are added: FMA are those of divisions.
    plain = compile_cuda("variance_mask.cu", "--fmad=false", arch=arch)
    fused = [[s.count("FFMA", "DFMA") for s in k.values()] for k in (kernels, plain)]
    assert fused[0] == fused[1]
