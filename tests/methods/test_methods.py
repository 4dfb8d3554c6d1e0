"""Every merge method against its formula in float64, written here anew, and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import ArgumentError, merge_tensors
from mergekern.methods.geometry import slerp_coefficients

from accuracy import assert_bits_equal, assert_bytes_equal, assert_within, half_ulp
from methods.oracle import (
    U,
    assert_task_vectors,
    drawn_mask,
    family,
    magnitude_mask,
    normal,
)

TASK_VECTORS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


# ---- the table: names, scopes, defaults -------------------------------------------------------

TASK_DEFAULTS = {"density": 1.0, "lambda": 1.0, "int8_mask": False}
TABLE = {
    "linear": {"normalize": True},
    "slerp": {},
    "nuslerp": {"nuslerp_flatten": True, "nuslerp_row_wise": False},
    "multislerp": {"normalize_weights": True, "eps": 1e-8},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "model_stock": {"filter_wise": False},
    "passthrough": {"scale": 1.0},
    "task_arithmetic": {**TASK_DEFAULTS, "normalize": False, "rescale": False},
    "ties": {**TASK_DEFAULTS, "normalize": True, "rescale": False},
    "dare_linear": {**TASK_DEFAULTS, "normalize": False, "rescale": True},
    "dare_ties": {**TASK_DEFAULTS, "normalize": False, "rescale": True},
    "breadcrumbs": {**TASK_DEFAULTS, "gamma": 0.01, "normalize": False, "rescale": False},
    "breadcrumbs_ties": {**TASK_DEFAULTS, "gamma": 0.01, "normalize": False, "rescale": False},
    "della": {**TASK_DEFAULTS, "epsilon": 0.15, "normalize": True, "rescale": True},
    "della_linear": {**TASK_DEFAULTS, "epsilon": 0.15, "normalize": False, "rescale": True},
    "sce": {"select_topk": 1.0, "int8_mask": False},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
    # Not of mergekit.
    "magnitude_prune": {"density": 1.0, "lambda": 1.0},
    "ties_global": {"weight": 1.0, "density": 0.2, "merge_func": "mean", "lambda": 1.0},
}
NOTHING_REQUIRED = {
    "karcher",
    "model_stock",
    "passthrough",
    "sce",
    "ram",
    "ramplus_tl",
    "ties_global",
}
PER_MODEL = {
    ("weight", "*"),
    ("density", "*"),
    ("scale", "passthrough"),
    ("gamma", "breadcrumbs"),
    ("gamma", "breadcrumbs_ties"),
    ("epsilon", "della"),
    ("epsilon", "della_linear"),
}
# Tested in files of their own.
ELSEWHERE = {"nearswap", "arcee_fusion", "fisher", "emr", "magmax", "consensus"}
ELSEWHERE |= {"tsv_m", "iso_c", "iso_cts", "svc", "regmean", "wudi", "wudi_exact"}


def test_methods_are_those_of_the_table() -> None:
    assert set(mk.methods()) == set(TABLE) | ELSEWHERE
    assert all(name == spec.name for name, spec in mk.methods().items())


@pytest.mark.parametrize("name", TABLE)
def test_parameters_have_the_names_scopes_and_defaults_of_mergekit(name: str) -> None:
    spec = mk.methods()[name]
    assert {p.name: p.default for p in spec.parameters if not p.required} == TABLE[name]
    required = set() if name in NOTHING_REQUIRED else {"t" if name == "slerp" else "weight"}
    assert {p.name for p in spec.parameters if p.required} == required
    assert {p.name for p in spec.parameters if p.scope == "model"} == {
        p.name for p in spec.parameters if PER_MODEL & {(p.name, "*"), (p.name, name)}
    }


def test_registry_is_a_copy() -> None:
    mk.methods().clear()
    assert mk.methods()


# ---- formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_linear(n: int, normalize: bool, dtype: torch.dtype) -> None:
    xs = [normal(7, 13, seed=i, dtype=dtype) for i in range(n)]
    weight = [0.3 + 0.4 * i for i in range(n)]
    got = merge_tensors(xs, "linear", weight=weight, normalize=normalize)
    terms = [w * x.double() for w, x in zip(weight, xs, strict=True)]
    divisor = math.fsum(weight) if normalize else 1.0
    oracle = sum(terms) / divisor
    unit = 2.0**-53 if dtype == torch.float64 else U
    size = sum(t.abs() for t in terms) / divisor
    # n products (weights rounded as well), n - 1 sums, a division by a rounded sum, one store;
    # the float64 oracle itself errs as much in its own unit.
    bound = (2 * n + 4) * (unit + 2.0**-53) * size
    assert_within(got, oracle, bound + half_ulp(oracle.abs() + bound, dtype))
    assert got.dtype == dtype


CASES = [
    (method, density, rescale, normalize)
    for method in TASK_VECTORS
    for density in (1.0, 0.37, 0.0)
    for rescale, normalize in ((None, None), (True, True), (False, False), (True, False))
]


@pytest.mark.parametrize(("method", "density", "rescale", "normalize"), CASES)
def test_task_vectors(
    method: str, density: float, rescale: bool | None, normalize: bool | None
) -> None:
    base, xs = family(3, 31, 17)
    weight, lam = [0.7, 1.1, -0.4], 0.8
    spec = mk.methods()[method]
    given: dict[str, Any] = {"weight": weight, "density": density}
    if rescale is not None:
        given |= {"rescale": rescale, "normalize": normalize}
    got = merge_tensors(xs, method, base=base, name="w", seed=5, lambda_=lam, **given)
    if method == "ties":
        masks = [magnitude_mask(base, x, density) for x in xs]
    elif method == "task_arithmetic":
        masks = [torch.ones(x.shape, dtype=torch.bool) for x in xs]
    else:
        masks = [drawn_mask(x, density, 5, "w", i) for i, x in enumerate(xs)]
    elect = method.endswith("ties")
    rescaled = spec.parameter("rescale").default if rescale is None else rescale
    normalized = spec.parameter("normalize").default if normalize is None else normalize
    options: dict[str, Any] = {
        "elect": elect,
        "normalize": normalized,
        "rescale": rescaled and method != "task_arithmetic",
        "lam": lam,
    }
    assert_task_vectors(got, base, xs, weight, masks, **options)


def slerp_oracle(a: Tensor, b: Tensor, t: float) -> Tensor:
    x, y = a.double(), b.double()
    nx, ny = x.norm(), y.norm()
    ux, uy = (x / nx if nx > 1e-8 else x), (y / ny if ny > 1e-8 else y)
    cosine = float((ux * uy).sum())
    if abs(cosine) > 0.9995:
        return (1 - t) * x + t * y
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0, -0.2, 1.4])
@pytest.mark.parametrize("kind", ["random", "near", "colinear", "opposite", "zero", "both zero"])
def test_slerp(kind: str, t: float) -> None:
    a = normal(5, 201, seed=1)
    other = {
        "random": normal(5, 201, seed=2),
        "near": a + 0.5 * normal(5, 201, seed=2),
        "colinear": 3 * a,
        "opposite": -2 * a,
        "zero": torch.zeros_like(a),
        "both zero": torch.zeros_like(a),
    }[kind]
    if kind == "both zero":
        a = torch.zeros_like(a)
    got = merge_tensors([a, other], "slerp", t=t)
    oracle = slerp_oracle(a, other, t)
    # Two products, a sum, a store in float32; the coefficients are float64, and 1 / sin(angle)
    # below 1 / sin(acos(0.9995)) < 32 magnifies their errors to 1e-12 at most.
    n = max(1.0, 1 / math.sqrt(1 - 0.9995**2)) * (1 + 2 * abs(t))
    bound = 4 * U * (a.double().abs() + other.double().abs()) * n + half_ulp(oracle, torch.float32)
    assert_within(got, oracle, bound)


def test_slerp_ends_are_the_models() -> None:
    a, b = normal(300, seed=1), normal(300, seed=2)
    assert_bits_equal(merge_tensors([a, b], "slerp", t=0), a)
    assert_bits_equal(merge_tensors([a, b], "slerp", t=1), b)


def test_slerp_of_equal_models_is_the_model_within_an_ulp() -> None:
    a = normal(300, seed=1)
    got = merge_tensors([a, a], "slerp", t=0.3)
    assert_within(got, a.double(), 4 * U * a.double().abs())


def test_slerp_base_is_the_first_vector() -> None:
    a, b = normal(300, seed=1), normal(300, seed=2)
    want = merge_tensors([a, b], "slerp", t=0.2)
    assert_bits_equal(merge_tensors([b], "slerp", base=a, t=0.2), want)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_slerp_with_non_finite_input_is_nan_everywhere(special: float) -> None:
    a, b = normal(300, seed=1), normal(300, seed=2)
    b[17] = special
    for pair in ([a, b], [b, a]):
        assert merge_tensors(pair, "slerp", t=0.5).isnan().all()


def test_slerp_of_huge_and_tiny_float32_keeps_their_angle() -> None:
    """Squares leave float32 on both sides; the norms are float64."""
    for scale in (1e30, 1e-3):
        a, b = scale * normal(300, seed=1), scale * normal(300, seed=2)
        oracle = slerp_oracle(a, b, 0.5)
        size = a.double().abs() + b.double().abs()
        assert_within(merge_tensors([a, b], "slerp", t=0.5), oracle, 8 * U * size)


def test_slerp_coefficients_clamp_a_cosine_above_one() -> None:
    dots = torch.tensor([[1.0, 1.0 + 1e-15], [1.0 + 1e-15, 1.0]], dtype=torch.float64)
    assert slerp_coefficients(dots, 0.25).tolist() == [0.75, 0.25]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_slerp_is_straight_above_a_cosine_of_0_9995(sign: float) -> None:
    for cosine, straight in ((0.99951, True), (0.99949, False)):
        dots = torch.tensor([[4.0, 6 * sign * cosine], [6 * sign * cosine, 9.0]]).double()
        assert (slerp_coefficients(dots, 0.25).tolist() == [0.75, 0.25]) is straight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passthrough(dtype: torch.dtype) -> None:
    x = normal(33, dtype=dtype)
    assert_bytes_equal(merge_tensors([x], "passthrough"), x)
    assert_bits_equal(merge_tensors([x], "passthrough", scale=-2), -2 * x)
    third = merge_tensors([x], "passthrough", scale=1 / 3)
    oracle = x.double() / 3
    assert_within(third, oracle, 3 * U * oracle.abs() + half_ulp(oracle, dtype) * 1.01)


def test_passthrough_keeps_nan_bits_and_converts_on_request() -> None:
    x = torch.tensor([math.nan, -0.0, math.inf, 1.0])
    assert_bytes_equal(merge_tensors([x], "passthrough"), x)
    got = merge_tensors([x], "passthrough", out_dtype=torch.float16)
    assert_bits_equal(got, x.half())


# ---- identities ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4])
def test_linear_of_equal_models_is_the_model(n: int) -> None:
    """In float32 for up to two doublings; 3 x loses a digit, which 4 x rounds back."""
    x = normal(1000)
    assert_bits_equal(merge_tensors([x] * n, "linear", weight=1), x)


@pytest.mark.parametrize("n", range(1, 18))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_of_equal_16_bit_models_is_the_model(n: int, dtype: torch.dtype) -> None:
    """For any number: 11 digits times 17 fit in the 24 of the accumulator, and divide back."""
    x = normal(1000, dtype=dtype)
    assert_bits_equal(merge_tensors([x] * n, "linear", weight=1), x)


@pytest.mark.parametrize("n", [3, 5, 6, 7, 8])
def test_linear_of_equal_models_is_within_a_rounding(n: int) -> None:
    """Not bit for bit: 3 x needs two digits more than float32 has. The sum errs by n - 1 units."""
    x = normal(1000)
    got = merge_tensors([x] * n, "linear", weight=1)
    assert_within(got, x.double(), n * U * x.double().abs())


@pytest.mark.parametrize("method", TASK_VECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_models_equal_to_their_base_give_the_base(
    method: str, dtype: torch.dtype, density: float
) -> None:
    base = normal(7, 31, dtype=dtype)
    got = merge_tensors([base.clone()] * 3, method, base=base, weight=0.7, density=density)
    assert_bits_equal(got, base)


@pytest.mark.parametrize("method", TASK_VECTORS)
def test_weight_zero_and_density_zero_give_the_base(method: str) -> None:
    base, xs = family(2, 31)
    assert_bits_equal(merge_tensors(xs, method, base=base, weight=0), base)
    if method != "task_arithmetic":
        assert_bits_equal(merge_tensors(xs, method, base=base, weight=1, density=0), base)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_density_one_drops_nothing(method: str) -> None:
    base, xs = family(2, 31)
    got = merge_tensors(xs, method, base=base, weight=1, density=1)
    assert_bits_equal(got, merge_tensors(xs, method, base=base, weight=1))


def test_int8_mask_changes_nothing() -> None:
    base, xs = family(3, 101)
    options = {"base": base, "weight": 1, "density": 0.5}
    plain = merge_tensors(xs, "ties", **options)
    assert_bits_equal(merge_tensors(xs, "ties", int8_mask=True, **options), plain)


def test_lambda_by_both_names() -> None:
    base, xs = family(2, 31)
    spelled = merge_tensors(xs, "ties", base=base, weight=1, lambda_=0.5)
    assert_bits_equal(merge_tensors(xs, "ties", base=base, weight=1, **{"lambda": 0.5}), spelled)
    assert not torch.equal(spelled, merge_tensors(xs, "ties", base=base, weight=1))


def test_dare_is_keyed_by_seed_name_and_model() -> None:
    base, xs = family(2, 1001)

    def merged(**key: Any) -> Tensor:
        options = {"seed": 1, "name": "w", **key}
        return merge_tensors(xs, "dare_linear", base=base, weight=1, density=0.5, **options)

    assert_bits_equal(merged(), merged())
    assert not torch.equal(merged(), merged(seed=2))
    assert not torch.equal(merged(), merged(name="v"))
    masks = [drawn_mask(xs[0], 0.5, 1, "w", i) for i in range(2)]
    assert not torch.equal(*masks)


# ---- tiny, empty, mixed ----------------------------------------------------------------------


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.99])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_ties_keeps_one_element_of_a_tiny_tensor(shape: tuple[int, ...], density: float) -> None:
    base, x = torch.full(shape, 1.0), torch.full(shape, 3.0)
    assert_bits_equal(merge_tensors([x], "ties", base=base, weight=1, density=density), x)


def test_ties_keeps_exactly_k_among_equals_lowest_index_first() -> None:
    base, x = torch.zeros(10), torch.ones(10)
    got = merge_tensors([x], "ties", base=base, weight=1, density=0.3)
    assert_bits_equal(got, (torch.arange(10) < 3).float())


@pytest.mark.parametrize("method", TABLE)
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_takes_empty_tensors_and_scalars(
    method: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.full(shape, 2.0, dtype=dtype)
    spec = mk.methods()[method]
    base = x.clone() if spec.base == "required" else None
    n = 1 if method == "passthrough" else 2
    usual = {"t": 0.5, "weight": 1, "density": 0.5, "select_topk": 0.5}
    given = {p.name: usual[p.name] for p in spec.parameters if p.name in usual}
    assert_bits_equal(merge_tensors([x] * n, method, base=base, **given), x)


@pytest.mark.parametrize("method", TASK_VECTORS)
def test_one_model_of_weight_one_and_density_one(method: str) -> None:
    """base + (x - base), each rounded: exact for values on one grid."""
    base, x = torch.arange(20.0), torch.arange(20.0) * -3 + 0.5
    assert_bits_equal(merge_tensors([x], method, base=base, weight=1), x)


def test_mixed_dtypes_are_promoted_before_the_arithmetic() -> None:
    a, b = normal(100, dtype=torch.float16), normal(100, seed=1, dtype=torch.bfloat16)
    got = merge_tensors([a, b], "linear", weight=[1, 2])
    assert_bits_equal(got, merge_tensors([a.float(), b.float()], "linear", weight=[1, 2]))
    assert got.dtype == torch.float32
    wide = merge_tensors([a, b.double()], "ties", base=a, weight=1)
    assert wide.dtype == torch.float64


def test_result_is_rounded_once_to_out_dtype() -> None:
    xs = [normal(1000, seed=i) for i in range(3)]
    got = merge_tensors(xs, "linear", weight=1, out_dtype=torch.bfloat16)
    assert_bits_equal(got, merge_tensors(xs, "linear", weight=1).bfloat16())


def test_inputs_are_not_changed_and_may_be_strided() -> None:
    base, xs = family(2, 40, 20)
    strided = [x.T.contiguous().T for x in xs]
    before = [x.clone() for x in (base, *strided)]
    got = merge_tensors(strided, "ties", base=base, weight=1, density=0.3)
    assert_bits_equal(got, merge_tensors(xs, "ties", base=base, weight=1, density=0.3))
    for x, y in zip((base, *strided), before, strict=True):
        assert_bytes_equal(x, y)


# ---- refusals --------------------------------------------------------------------------------

X, Y = torch.zeros(3), torch.ones(3)
WRONG: list[tuple[str, list[Any], str, dict[str, Any], str]] = [
    ("unknown method", [X], "delta", {"weight": 1}, "unknown method; got 'delta'"),
    ("unknown parameter", [X], "linear", {"weight": 1, "wieght": 2}, "'wieght'; expected weight"),
    ("foreign parameter", [X], "linear", {"weight": 1, "density": 1}, "got 'density'"),
    ("missing weight", [X], "linear", {}, "weight is required"),
    ("missing t", [X, Y], "slerp", {}, "t is required"),
    ("no models", [], "linear", {"weight": 1}, "got 0; expected at least 1"),
    ("one for slerp", [X], "slerp", {"t": 0}, "got 1; expected exactly 2"),
    ("three for slerp", [X, Y, X], "slerp", {"t": 0}, "got 3; expected exactly 2"),
    ("base makes three", [X, Y], "slerp", {"t": 0, "base": X}, "got 3; expected exactly 2"),
    ("two for passthrough", [X, Y], "passthrough", {}, "got 2; expected exactly 1"),
    ("no base", [X], "ties", {"weight": 1}, "ties: needs a base"),
    ("base alone", [], "ties", {"weight": 1, "base": X}, "beside the base; got 0"),
    ("density above", [X], "ties", {"weight": 1, "base": X, "density": 1.01}, "density"),
    ("density below", [X], "ties", {"weight": 1, "base": X, "density": -0.1}, "density"),
    ("dare above", [X], "dare_ties", {"weight": 1, "base": X, "density": 2}, "density"),
    ("density nan", [X], "ties", {"weight": 1, "base": X, "density": math.nan}, "not finite"),
    ("weight inf", [X], "linear", {"weight": math.inf}, "weight is not finite"),
    ("weight text", [X], "linear", {"weight": "much"}, "weight is no number; got 'much'"),
    ("weight bool", [X], "linear", {"weight": True}, "weight is no number; got True"),
    ("weight none", [X], "linear", {"weight": None}, "weight is no number; got None"),
    ("two weights", [X], "linear", {"weight": [1, 2]}, "wrong length; got 2; expected 1"),
    ("list of t", [X, Y], "slerp", {"t": [0.5, 0.5]}, "t is no number"),
    ("normalize text", [X], "linear", {"weight": 1, "normalize": "yes"}, "no boolean; got 'yes'"),
    ("zero sum", [X, Y], "linear", {"weight": [1, -1]}, "cannot be normalized"),
    ("shapes", [X, torch.ones(4)], "linear", {"weight": 1}, "shape; got (4,); expected (3,)"),
    ("broadcast", [X, torch.ones(1)], "linear", {"weight": 1}, "shape"),
    ("base shape", [X], "ties", {"weight": 1, "base": torch.ones(1)}, "base differs"),
    ("integers", [torch.arange(3)], "linear", {"weight": 1}, "unsupported dtype; got int64"),
    ("no tensor", [[1.0]], "linear", {"weight": 1}, "no tensor; got list"),
]


@pytest.mark.parametrize(
    ("xs", "method", "given", "text"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_refused(xs: list[Any], method: str, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        merge_tensors(xs, method, **given)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zero_weights_with_normalize_divide_by_one_in_task_arithmetic() -> None:
    base, xs = family(2, 31)
    options = {"base": base, "weight": [1, -1]}
    plain = merge_tensors(xs, "task_arithmetic", **options)
    assert_bits_equal(merge_tensors(xs, "task_arithmetic", normalize=True, **options), plain)


def test_numbers_as_yaml_leaves_them() -> None:
    """YAML reads 1e-3 as a string."""
    got = merge_tensors([X, Y], "linear", weight=["1e-3", 1], normalize=False)
    assert_bits_equal(got, merge_tensors([X, Y], "linear", weight=[1e-3, 1], normalize=False))
    normalized = merge_tensors([X, Y], "linear", weight=torch.tensor([1.0, 3.0]), normalize=1)
    assert_bits_equal(normalized, torch.full((3,), 0.75))
