"""covariance as machine code."""

from __future__ import annotations

import pytest

from kernels.sass import Kernel, Sass, assert_lean, compile_cuda, compile_triton, nvidia_tools

# Two sums of 128 x 128 floats and one of a run take 192 registers of each of 256 threads; one
# program fills a multiprocessor, so all 255 that a thread may have are free to use.
TILE_REGISTERS = 255


def multiply(x: str, mixed: bool, deep: bool) -> Kernel:
    from mergekern.backends.moments import SPLIT_WIDTH, TILE
    from mergekern.backends.triton import covariance_kernels as kernels

    sizes = ("n", "span", "padded_x", "padded_y", "panels_x", "panels_y")
    pointers = {"sums": "*fp64", "tiles": "*i32", "x": f"*{x}", "y": f"*{x}"}
    pointers |= {"deep_x": "*i32", "deep_y": "*i32"}
    width = SPLIT_WIDTH if mixed or deep else TILE
    return Kernel(
        module="covariance_kernels",
        name="multiply_kernel",
        signature=pointers | dict.fromkeys(sizes, "i32"),
        constants={"MIXED": mixed, "DEEP": deep, "WIDTH": width, "UPCAST": False},
        divisible=(*pointers, "span", "padded_x", "padded_y"),
        options=kernels.TENSOR_CORES,
    )


def measure(x: str) -> Kernel:
    from mergekern.backends.moments import MEASURED
    from mergekern.backends.triton import covariance_kernels as kernels

    pointers = {"x": f"*{x}", "offsets": "*i64", "firsts": "*fp64", "sums": "*fp64"}
    pointers |= {"squares": "*fp64", "keys": "*i32"}
    return Kernel(
        module="covariance_kernels",
        name="measure_kernel",
        signature=pointers | dict.fromkeys(("n", "width", "side"), "i32"),
        constants={"stride": 1, "ZERO": False, "WIDE": True, "ROWS": MEASURED},
        divisible=(*pointers, "width", "side"),
        options=kernels.LAUNCH,
    )


def pack(x: str, split: bool) -> Kernel:
    from mergekern.backends.triton import covariance_kernels as kernels

    pointers = {"packed": "*bf16" if split else f"*{x}", "deep": "*i32", "x": f"*{x}"}
    pointers |= {"offsets": "*i64", "shifts": "*fp32", "scales": "*fp32"}
    sizes = ("n", "width", "at", "end", "part", "padded", "panels")
    return Kernel(
        module="covariance_kernels",
        name="pack_kernel",
        signature=pointers | dict.fromkeys(sizes, "i32"),
        constants={"stride": 1, "ZERO": False, "WIDE": True, "SPLIT": split},
        divisible=(*pointers, "width", "at", "end", "part", "padded"),
        options=kernels.LAUNCH,
    )


def merge(width: int) -> Kernel:
    from mergekern.backends.triton import covariance_kernels as kernels

    pointers = dict.fromkeys(("products", "sums", "center_x", "center_y"), "*fp64")
    pointers |= {"tiles": "*i32"}
    return Kernel(
        module="covariance_kernels",
        name="merge_kernel",
        signature=pointers | dict.fromkeys(("splits", "width_x", "width_y"), "i32"),
        constants={"WIDTH": width, "TRIANGLE": True, "FIRST": True},
        divisible=(*pointers, "width_x", "width_y"),
        options=kernels.LAUNCH,
    )


@pytest.fixture(scope="module")
def compiled() -> dict[str, Sass]:
    nvidia_tools()  # skips without triton
    kernels = {
        "plain bf16": multiply("bf16", mixed=False, deep=False),
        "plain fp16": multiply("fp16", mixed=False, deep=False),
        "shallow": multiply("bf16", mixed=True, deep=False),
        "deep": multiply("bf16", mixed=True, deep=True),
        "float32": multiply("bf16", mixed=False, deep=True),
        "measure bf16": measure("bf16"),
        "measure fp32": measure("fp32"),
        "pack bf16": pack("bf16", split=True),
        "pack fp32": pack("fp32", split=True),
        "copy bf16": pack("bf16", split=False),
        "merge": merge(128),
        "merge split": merge(64),
    }
    return dict(zip(kernels, compile_triton(list(kernels.values())), strict=True))


@pytest.mark.parametrize(
    ("case", "dots", "opcode"),
    [
        ("plain bf16", 1, "HGMMA.64x128x16.F32.BF16"),
        ("plain fp16", 1, "HGMMA.64x128x16.F32"),
        ("shallow", 1, "HGMMA.64x64x16.F32.BF16"),
        ("deep", 6, "HGMMA.64x64x16.F32.BF16"),
        ("float32", 6, "HGMMA.64x64x16.F32.BF16"),
    ],
)
def test_products_are_formed_on_tensor_cores(
    compiled: dict[str, Sass], case: str, dots: int, opcode: str
) -> None:
    sass = compiled[case]
    assert_lean(sass, TILE_REGISTERS)
    assert sass.ops[opcode] == sass.count("HGMMA") == 4 * dots, sass  # 64 rows, 16 at a time
    # Operands go to shared memory by themselves, 16 bytes at a time; only tables are loaded.
    assert sass.ops["LDGSTS.E.BYPASS.128"] == sass.count("LDGSTS") > 0, sass
    assert sass.count("LDG") <= 4, sass
    assert sass.ops["STG.E.128"] == sass.count("STG") > 0, sass
    # The promotion: seven additions for each of the sums of a thread, none contracted.
    width = 128 if case.startswith("plain") else 64
    assert sass.count("FADD") == 7 * 128 * width // 256, sass
    assert sass.count("FFMA", "FMUL") == 0, sass


@pytest.mark.parametrize("case", ["measure bf16", "measure fp32"])
def test_columns_are_added_up_in_double(compiled: dict[str, Sass], case: str) -> None:
    sass = compiled[case]
    assert_lean(sass, 128)
    assert sass.count("DFMA", "FFMA") == 0, sass
    assert sass.count("DADD") > 0, sass
    assert sass.ops["LDG.E.128"] > 0, sass
    assert sass.ops["LDG.E.U16"] <= 1, sass  # of the first row each thread takes one feature


@pytest.mark.parametrize("case", ["pack bf16", "pack fp32"])
def test_packing_is_not_contracted(compiled: dict[str, Sass], case: str) -> None:
    sass = compiled[case]
    assert_lean(sass)
    assert sass.count("FFMA") == 0, sass
    assert sass.count("FMUL") > 0, sass
    assert sass.ops["LDG.E.128"] > 0, sass
    assert sass.ops["LDG.E.U16"] == 0, sass
    assert sass.ops["STG.E.128"] == sass.count("STG") > 0, sass


@pytest.mark.parametrize("case", ["copy bf16", "merge", "merge split"])
def test_the_rest_is_lean(compiled: dict[str, Sass], case: str) -> None:
    assert_lean(compiled[case])
    assert compiled[case].count("DFMA", "FFMA") == 0


def test_merges_are_wide(compiled: dict[str, Sass]) -> None:
    for case in ("merge", "merge split"):
        assert compiled[case].ops["LDG.E.128"] > 0, compiled[case]


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda_products_are_formed_on_tensor_cores(arch: str) -> None:
    kernels = compile_cuda("covariance_multiply.cu", arch=arch)
    assert len(kernels) == 4
    for name, sass in kernels.items():
        half, deep, narrow = "3f16" in name, "Lb1E" in name, "Li64E" in name
        assert_lean(sass, 224 if narrow else TILE_REGISTERS)
        # A stage of 32 rows: two steps of 16, fragments of 16 x 8 products, six of parts.
        fragments = 2 * (8 if narrow else 16)
        opcode = "HMMA.16816.F32" + ("" if half else ".BF16")
        assert sass.ops[opcode] == sass.count("HMMA") == fragments * (6 if deep else 1), sass
        assert sass.count("LDSM") == sass.ops["LDSM.16.MT88.4"], sass
        assert sass.count("LDSM") == 2 * ((4 if narrow else 6) * (3 if deep else 1)), sass
        assert sass.ops["LDGSTS.E.BYPASS.128"] + sass.ops["LDGSTS.E.BYPASS.128.ZFILL"] > 0, sass
        assert all("128" in op for op in sass.ops if op.startswith("LDGSTS")), sass
        assert sass.ops["STG.E.128"] == sass.count("STG") == fragments, sass
        # The promotion: seven additions for each of the sums of a thread, none contracted.
        assert sass.count("FADD") == 7 * 2 * fragments, sass
        assert sass.count("FFMA", "FMUL") == 0, sass


@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda_rest_is_lean(arch: str) -> None:
    kernels = compile_cuda("covariance.cu", arch=arch)
    assert len(kernels) == 3 + 5 + 1  # measure, pack with and, of 16 bits, without parts, merge
    for name, sass in kernels.items():
        assert_lean(sass, 128 if "measure" in name else 64)  # 16 sums in double
        assert sass.ops["LDG.E.128"] > 0, (name, sass)
        assert sass.count("FFMA") == 0, (name, sass)
        if "measure" not in name:
            assert sass.count("DFMA") == 0, (name, sass)
        if "pack" in name:
            assert sass.ops["STG.E.128.STRONG.GPU"] == (3 if "Lb1E" in name else 1), (name, sass)
