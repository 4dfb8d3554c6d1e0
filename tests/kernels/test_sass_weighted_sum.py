"""weighted_sum as machine code, by nvcc and by Triton."""

from __future__ import annotations

import re

import pytest

from kernels.sass import (
    Kernel,
    Sass,
    assert_lean,
    assert_plain_arithmetic,
    compile_cases,
    compile_cuda,
)


def test_cuda() -> None:
    pairs = {}
    for name, sass in compile_cuda("weighted_sum.cu").items():
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


SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
LARGE = 1 << 24
CASES = [
    (x, out, size, divide)
    for x, out, size in [
        ("bf16", "bf16", 1 << 16),
        ("bf16", "bf16", LARGE),
        ("fp16", "fp32", LARGE),
        ("fp32", "fp32", LARGE),
        ("fp32", "bf16", LARGE),
        ("fp64", "bf16", LARGE),
    ]
    for divide in (False, True)
]


def kernel(x: str, out: str, size: int, divide: bool) -> Kernel:
    from mergekern.backends.triton.weighted_sum import LAUNCH, block_size

    return Kernel(
        module="weighted_sum",
        name="weighted_sum_kernel",
        signature={
            "out": f"*{out}",
            "addresses": "*i64",
            "factors": "*fp32" if SIZES[x] == 2 else "*fp64",
            "n": "i32",
            "numel": "i32",
        },
        constants={"IN": x, "WIDE": True, "DIVIDE": divide, "BLOCK": block_size(size, SIZES[x])},
        divisible=("out", "addresses", "factors", "numel"),
        options=LAUNCH,
    )


@pytest.fixture(scope="module")
def triton_kernels() -> dict[tuple, Sass]:
    return compile_cases(CASES, kernel)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_triton(triton_kernels: dict[tuple, Sass], case: tuple) -> None:
    x, out, size, divide = case
    sass, plain = triton_kernels[case], triton_kernels[x, out, size, False]
    assert_lean(sass)
    # Loads of the tensors: as many as in CUDA, each of 16 bytes, and none of single elements.
    assert sass.ops["LDG.E.128"] > 0, sass
    assert sass.ops["LDG.E.U16"] == 0, sass
    # A thread writes what became of 16 bytes read at a time, or of 32 in large tensors.
    wide = "STG.E.64" if (x, out) == ("fp64", "bf16") else "STG.E.128"
    assert sass.count("STG") == sass.ops[wide], sass
    assert_plain_arithmetic(sass, plain, divide)
    assert (sass.count("DMUL") > 0) == x.startswith(("fp32", "fp64")), sass
