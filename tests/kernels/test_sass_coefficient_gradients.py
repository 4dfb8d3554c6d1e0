"""coefficient_gradients as machine code: what training gives, a float32 gradient."""

from __future__ import annotations

import pytest

from kernels.sass import Kernel, Sass, assert_lean, compile_cases, compile_cuda

CASES = [(x, based) for x in ("bf16", "fp32") for based in (False, True)]


def products(x: str, based: bool) -> Kernel:
    from mergekern.backends.triton import gram

    return Kernel(
        module="coefficient_gradients",
        name="products_kernel",
        signature={
            "partial": "*fp64",
            "grad": "*fp32",
            "table": "*i64",
            **dict.fromkeys(("n", "numel"), "i32"),
        },
        constants={
            "IN": x,
            "BASED": based,
            "WIDE": True,
            "CHUNK": gram.LONGEST,
            "LANES": gram.LANES,
        },
        divisible=("partial", "grad", "table", "numel"),
        options=gram.LAUNCH,
    )


@pytest.fixture(scope="module")
def compiled() -> dict[tuple, Sass]:
    return compile_cases(CASES, products)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_products(compiled: dict[tuple, Sass], case: tuple[str, bool]) -> None:
    sass = compiled[case]
    assert_lean(sass)
    assert sass.ops["LDG.E.128"] > 0, sass
    assert sass.ops["LDG.E.U16"] == sass.ops["LDG.E"] == 0, sass
    assert sass.count("DFMA", "FFMA") == 0, sass
    assert sass.count("DMUL") >= 8, sass


def test_cuda() -> None:
    kernels = compile_cuda("coefficient_gradients.cu")
    assert len(kernels) == 4 * 2  # types of the models and of the gradient
    for name, sass in kernels.items():
        assert_lean(sass, 88)  # a float64 gradient of eight elements takes sixteen of them
        assert sass.ops["LDG.E.128"] >= 6, (name, sass)  # grad, base and four models
        assert sass.count("DMUL") == 0, (name, sass)
        assert sass.count("DFMA") % 4 == 0, (name, sass)
