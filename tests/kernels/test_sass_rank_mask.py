"""rank_mask as machine code."""

from __future__ import annotations

import pytest

from kernels.sass import REGISTERS, Kernel, Sass, assert_lean, compile_cases, compile_cuda

CASES = [(name, key) for name in ("bin", "rank_mask") for key in ("i32", "i64")]


def kernel(name: str, key: str) -> Kernel:
    from mergekern.backends.triton.keys import BLOCK, LAUNCH

    signature = {"keys": f"*{key}", "rows": "*i64", "numel": "i32", "length": "i32"}
    if name == "bin":
        signature["counts"] = "*i32"
    else:
        signature |= {"bits": "*u8", "sums": "*fp64", "ends": "*i32", "limits": "*i32"}
        signature |= {"seed": "u64", "first": "i64"}
    return Kernel(
        module="rank_mask",
        name=f"{name}_kernel",
        signature=signature,
        constants={"inner": 1, "LONG": False, "HALF": 2048, "BLOCK": BLOCK},  # a Linear layer
        divisible=[*(k for k, v in signature.items() if v.startswith("*")), "numel", "length"],
        options=LAUNCH,
    )


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[str, str], Sass]:
    return compile_cases(CASES, kernel)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_triton(kernels: dict[tuple[str, str], Sass], case: tuple[str, str]) -> None:
    sass = kernels[case]
    # Draws cost more than loads here: two programs of 256 threads fit.
    assert_lean(sass, REGISTERS if case[0] == "bin" else 128)
    assert sass.ops["LDG.E.128"] > 0, sass  # keys
    assert sass.count("CALL") == 0, sass  # divisions of 64 bits
    if case[0] == "bin":  # nothing waits for results of atomics, or for their order
        assert sass.count("RED", "REDG") > 0, sass
        assert sass.count("ATOM", "ATOMG", "MEMBAR") == 0, sass


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda(arch: str) -> None:
    kernels = compile_cuda("rank_mask.cu", arch=arch)
    assert len(kernels) == 2 * 2  # bins and masks, keys of 32 and 64 bits
    for name, sass in kernels.items():
        counts = "bin_kernel" in name
        assert_lean(sass, 32 if counts else 96)
        assert (sass.count("RED", "REDG") > 0) == counts, (name, sass)
        assert sass.count("ATOM", "ATOMG", "DFMA") == 0, (name, sass)
