"""tsv_m, iso_c, iso_cts and svc against dense SVDs in float64, and what their mathematics says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.methods.singular import spectrum

from accuracy import assert_bits_equal, assert_within
from methods.spectral_oracle import ORACLES, Oracle, assert_merged, family, taus

NAMES = tuple(ORACLES)
WHOLE = ("tsv_m", "iso_c")  # do not tell rows from columns


# ---- formulas --------------------------------------------------------------------------------

SHAPES = [(31, 17), (17, 31), (24, 24), (8, 8), (40, 3), (64, 63)]


@pytest.mark.parametrize("out", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_formula(name: str, shape: tuple[int, int], n: int, out: torch.dtype) -> None:
    base, xs = family(min(n, *shape), *shape)
    got = mk.merge_tensors(xs, name, base=base, out_dtype=out)
    assert_merged(got, base, ORACLES[name](taus(base, xs)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    base, xs = family(3, 31, 17, dtype=dtype)
    got = mk.merge_tensors(xs, name, base=base)
    assert got.dtype == dtype
    assert_merged(got, base, ORACLES[name](taus(base, xs)))


def test_the_gram_matrix_serves_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more columns than a block of it has; an SVD is for what it cannot resolve."""
    base, xs = family(2, 520, 400)
    monkeypatch.delattr(torch.linalg, "qr")
    got = mk.merge_tensors(xs, "iso_c", base=base, out_dtype=torch.float64)
    monkeypatch.undo()
    assert_merged(got, base, ORACLES["iso_c"](taus(base, xs)))


@pytest.mark.parametrize("common", [0.0, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(31, 17), (17, 31)])
def test_common_space(shape: tuple[int, int], common: float) -> None:
    base, xs = family(3, *shape)
    got = mk.merge_tensors(xs, "iso_cts", base=base, common=common, out_dtype=torch.float64)
    assert_merged(got, base, ORACLES["iso_cts"](taus(base, xs), common=common))
    if common == 1:
        whole = mk.merge_tensors(xs, "iso_c", base=base, out_dtype=torch.float64)
        assert_merged(whole, base, ORACLES["iso_cts"](taus(base, xs), common=common))


@pytest.mark.parametrize(("scale", "alpha"), [(0.3, 1.0), (1.0, 0.1), (2.0, 0.5), (-0.7, 1.0)])
def test_calibration(scale: float, alpha: float) -> None:
    base, xs = family(4, 17, 31)
    options: dict[str, Any] = {"lambda": scale, "alpha": alpha}
    for host in (None, "fusion_bench"):
        got = mk.merge_tensors(xs, "svc", base=base, out_dtype=torch.float64, host=host, **options)
        assert_merged(got, base, ORACLES["svc"](taus(base, xs), scale, alpha))


def test_calibration_of_tiny_responses() -> None:
    """Those below 1e-6 count as that for FusionBench, so that here nothing is counted twice."""
    base, xs = family(3, 9, 9)
    small = [2.0**-40 * (x - base) for x in xs]
    zero = torch.zeros_like(base)
    got = mk.merge_tensors(small, "svc", base=zero, out_dtype=torch.float64)
    assert_merged(got, zero, ORACLES["svc"](taus(zero, small)))
    got = mk.merge_tensors(small, "svc", base=zero, out_dtype=torch.float64, host="fusion_bench")
    total = torch.stack(taus(zero, small)).sum(0)
    assert_merged(got, zero, Oracle(total, 2.0**-45 * float(total.norm())))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "svc"])
def test_weights_and_lambda(name: str) -> None:
    base, xs = family(3, 31, 17)
    weight = [1.0, -0.5, 3.0]
    got = mk.merge_tensors(xs, name, base=base, weight=weight, lambda_=0.7, out_dtype=torch.float64)
    weighted = [w * tau for w, tau in zip(weight, taus(base, xs), strict=True)]
    assert_merged(got, base, ORACLES[name](weighted), 0.7)


# ---- small singular directions ----------------------------------------------------------------


def graded(n: int, *, rows: int = 60, columns: int = 40, decades: float) -> list[Tensor]:
    """Matrices in float64 whose singular values fall evenly on a logarithmic scale."""
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(n):
        u = torch.linalg.qr(torch.randn(rows, columns, generator=g).double()).Q
        v = torch.linalg.qr(torch.randn(columns, columns, generator=g).double()).Q
        made.append((u * torch.logspace(0, -decades, columns, dtype=torch.float64)) @ v.T)
    return made


@pytest.mark.parametrize("decades", [1, 2, 3, 3.5, 4, 5, 6])
@pytest.mark.parametrize("k", [40, 39, 10])
def test_singular_vectors_are_right_to_the_tolerance(k: int, decades: float) -> None:
    """Down to the smallest, where a float32 Gram matrix knows nothing and a float64 one too little.

    Against the vectors that made the matrix, of values a tenth of a decade and more apart.
    """
    g = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(60, 40, generator=g).double()).Q
    v = torch.linalg.qr(torch.randn(40, 40, generator=g).double()).Q
    s = torch.logspace(0, -decades, 40, dtype=torch.float64)
    found = spectrum((u * s) @ v.T, 2.0**-23, k)
    apart = 1 - 10 ** (-decades / 39)
    # What made the matrix is itself off by rounding, 2**-52 s_1 / s relative to the gap.
    bound = (2.0**-23 + 2.0**-50 * 10**decades) / apart
    for theirs, own in ((u, found.u), (v, found.v)):
        signs = (theirs[:, :k] * own).sum(0).sign()
        assert_within(own * signs, theirs[:, :k], torch.tensor(bound).double())
    assert_within(found.s, s[:k], 2.0**-23 * s[:k] + 2.0**-50)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 23), (torch.float64, 42)])
@pytest.mark.parametrize("name", ["iso_c", "tsv_m", "iso_cts"])
def test_ill_conditioned_task_vectors(name: str, dtype: torch.dtype, bits: int) -> None:
    """Of five decades: what is merged is right to 2**-23, or 2**-42, the smallest included."""
    xs = [x.to(dtype) for x in graded(2, decades=5)]
    zero = torch.zeros_like(xs[0])
    got = mk.merge_tensors(xs, name, base=zero, out_dtype=torch.float64)
    oracle = ORACLES[name](taus(zero, xs))
    size = float(torch.linalg.matrix_norm(oracle.merged, 2))
    assert_within(got, oracle.merged, torch.tensor(2.0**-bits * size).double())


def test_values_that_count_as_0_are_left_out() -> None:
    """Of a sum of rank 5 the polar factor has rank 5; the mean is over all 17 values."""
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(31, 5, generator=g), torch.randn(5, 17, generator=g)
    x = (b.double() @ a.double()).float()
    for y in (x, x.T.contiguous()):
        zero = torch.zeros_like(y)
        u, s, vh = torch.linalg.svd(y.double(), full_matrices=False)
        expected = float(s[:5].sum()) / 17 * u[:, :5] @ vh[:5]
        for name in ("iso_c", "iso_cts"):  # beside the common space nothing is but rounding
            got = mk.merge_tensors([y / 2, y / 2], name, base=zero, out_dtype=torch.float64)
            # Rounding of y to float32 turns its vectors, but equally in both.
            error = 2.0**-23 * float(s[0] / s[4]) * float(s[0])
            assert_within(got, expected, torch.tensor(error).double())
            assert int((torch.linalg.svdvals(got) > 1e-9 * got.norm()).sum()) == 5


@pytest.mark.parametrize("name", NAMES)
def test_equal_models(name: str) -> None:
    """Side by side their vectors have rank k: isometries there, and no noise beside."""
    base, (x,) = family(1, 24, 12)
    tau = taus(base, [x])[0]
    got = mk.merge_tensors([x] * 3, name, base=base, out_dtype=torch.float64) - base.double()
    u, s, vh = torch.linalg.svd(tau, full_matrices=False)
    if name == "tsv_m":  # s u v^T / 3 from each of the three
        expected = (u[:, :4] * s[:4]) @ vh[:4]
    elif name == "svc":  # counted three times by each
        expected = tau
    elif name == "iso_c":
        expected = 3 * s.mean() * u @ vh
    else:  # nine common directions; beside them one, found three times
        own = (3 * s[:9].sum() + 3 * s[9]) / 12
        expected = own * u[:, :10] @ vh[:10]
    size = float(s[0] / s[-1]) ** 2 * float(s.sum())
    assert_within(got, expected, torch.tensor(2.0**-44 * size).double())


# ---- what the mathematics says ----------------------------------------------------------------


def test_one_model_is_itself_by_tsv_m() -> None:
    base, (x,) = family(1, 31, 17)
    got = mk.merge_tensors([x], "tsv_m", base=base, lambda_=0.5, out_dtype=torch.float64)
    assert_merged(got, base, Oracle(x.double() - base.double(), 2.0**-40), 0.5)


@pytest.mark.parametrize("shape", [(31, 17), (17, 31)])
@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_models_does_not_matter(name: str, shape: tuple[int, int]) -> None:
    base, xs = family(4, *shape)
    got = mk.merge_tensors(xs[::-1], name, base=base, out_dtype=torch.float64)
    assert_merged(got, base, ORACLES[name](taus(base, xs)))


@pytest.mark.parametrize("name", WHOLE)
def test_transposed_models_give_the_transposed_result(name: str) -> None:
    base, xs = family(3, 31, 17)
    whole = mk.merge_tensors(xs, name, base=base)
    # Views and copies: strides change nothing either.
    for turned in ([x.T for x in xs], [x.T.contiguous() for x in xs]):
        assert_bits_equal(mk.merge_tensors(turned, name, base=base.T), whole.T)


@pytest.mark.parametrize("name", NAMES)
def test_orthogonal_bases_pass_through(name: str) -> None:
    g = torch.Generator().manual_seed(5)
    q = torch.linalg.qr(torch.randn(31, 31, generator=g).double()).Q
    r = torch.linalg.qr(torch.randn(17, 17, generator=g).double()).Q
    base, xs = family(3, 31, 17, dtype=torch.float64)
    turned = mk.merge_tensors([q @ x @ r for x in xs], name, base=q @ base @ r)
    oracle = ORACLES[name](taus(base, xs))
    # The products above round by 2**-52 of 31 and 17 terms, and that is not small in a task vector.
    assert_merged(turned, q @ base @ r, Oracle(q @ oracle.merged @ r, 2.0**8 * oracle.error), 1.0)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "svc"])
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_scaled_task_vectors_give_the_scaled_result(name: str, scale: float) -> None:
    base, xs = family(3, 31, 17)
    vectors = [x - base for x in xs]
    zero = torch.zeros_like(base)
    got = mk.merge_tensors([scale * v for v in vectors], name, base=zero)
    oracle = ORACLES[name](taus(zero, vectors))
    assert_merged(got / scale, zero, oracle)


@pytest.mark.parametrize("shape", [(31, 17), (17, 31), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_models_equal_to_the_base_give_the_base(
    name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    base, xs = family(2, *shape, dtype=dtype)
    assert_bits_equal(mk.merge_tensors([base] * 3, name, base=base), base)
    if name != "svc":
        one = mk.merge_tensors([xs[0], base], name, base=base)  # the other has no direction
        assert one.isfinite().all()
    assert_bits_equal(mk.merge_tensors(xs, name, base=base, lambda_=0), base)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (3, 40), (40, 3), (1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_more_models_than_rows(name: str, shape: tuple[int, int]) -> None:
    base, xs = family(5, *shape)
    got = mk.merge_tensors(xs, name, base=base, out_dtype=torch.float64)
    vectors = taus(base, xs)
    if name == "tsv_m":
        oracle = Oracle(torch.stack(vectors).mean(0), 2.0**-50)
        assert_bits_equal(mk.merge_tensors(xs, name, base=base, host="fusion_bench"), base)
    else:
        oracle = ORACLES[name](vectors)
    assert_merged(got, base, oracle)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_matrices_without_elements(name: str, shape: tuple[int, int]) -> None:
    base, xs = torch.zeros(shape), [torch.zeros(shape)] * 2
    assert_bits_equal(mk.merge_tensors(xs, name, base=base), base)
