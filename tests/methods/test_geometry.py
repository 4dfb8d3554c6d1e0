"""Methods of lengths and angles against their formulas on whole tensors in float64.

The oracles never see a Gram matrix: they build unit vectors, means and tangents of full length.
Beside the value they return the sum of magnitudes of its terms, |c_i x_i|, which errors are a share
of, and how much they magnify the relative error of a dot product.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import ArgumentError, merge_tensors
from mergekern.check import name_of

from accuracy import assert_bits_equal, assert_bytes_equal, assert_within, half_ulp
from cases import LAYOUTS, values

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# ---- oracles: flat float64 vectors -------------------------------------------------------------


class Exact(NamedTuple):
    value: Tensor
    size: Tensor  # sum of |c_i x_i|
    total: float  # sum of |c_i|
    magnified: float  # error of a coefficient over that of a cosine


def straight(xs: list[Tensor], weights: list[float]) -> Exact:
    terms = [w * x for w, x in zip(weights, xs, strict=True)]
    return Exact(sum(terms), sum(t.abs() for t in terms), sum(map(abs, weights)), 0.0)


def nuslerp_oracle(xs: list[Tensor], t: float) -> Exact:
    u = [x / max(float(x.norm()), 1e-7) for x in xs]
    cosine = min(1.0, max(-1.0, float((u[0] * u[1]).sum())))
    if 1 - cosine**2 <= 1e-16:
        return straight(xs, [1 - t, t])
    angle = math.acos(cosine)
    exact = straight(
        xs, [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    )
    # d sin(t a) / sin(a) over d cos(a): bounded by (1 + |t|)^3 up to a right angle, and from there
    # by the poles of second order at pi.
    return exact._replace(magnified=4 * (1 + abs(t)) ** 3 / (1 + cosine) ** 2)


def slerp_oracle(xs: list[Tensor], t: float) -> Exact:
    u = [x / x.norm() if x.norm() > 1e-8 else x for x in xs]
    cosine = float((u[0] * u[1]).sum())
    if abs(cosine) > 0.9995:
        return straight(xs, [1 - t, t])
    angle = math.acos(cosine)
    exact = straight(
        xs, [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    )
    return exact._replace(magnified=4 * (1 + abs(t)) ** 3 / (1 + cosine) ** 2)


def multislerp_oracle(
    xs: list[Tensor], weight: list[float], normalize: bool = True, eps: float = 1e-8
) -> Exact:
    w = [v / math.fsum(weight) for v in weight] if normalize else weight
    norms = [float(x.norm()) for x in xs]
    if not any(norms):
        return straight(xs, w)
    u = [x / (n + eps) for x, n in zip(xs, norms, strict=True)]
    mean = sum(v * x for v, x in zip(w, u, strict=True))
    length = float(mean.norm())
    if length < eps:
        assert len(xs) == 2
        return straight(xs, w)
    mean = mean / length
    tangents = [x - float((x * mean).sum()) * mean for x in u]
    tangent = sum(v * x for v, x in zip(w, tangents, strict=True))
    step = float(tangent.norm()) + eps
    moved = mean * math.cos(step) + tangent * (math.sin(step) / step)
    scale = sum(n * v for n, v in zip(norms, w, strict=True))
    terms = sum((v * x).abs() for v, x in zip(w, u, strict=True)) / length
    spread = sum(map(abs, w)) / length
    total = sum(abs(v) / n for v, n in zip(w, norms, strict=True) if n) * abs(scale) / length
    return Exact(moved * scale, terms * abs(scale), total, 4 * (1 + spread**2))


def karcher_oracle(
    xs: list[Tensor], max_iter: int = 10, tol: float = 1e-5, least: float = 0.0
) -> Exact:
    norms = [float(x.norm()) for x in xs]
    kept = [i for i, n in enumerate(norms) if n > least]
    if not kept:
        return straight(xs, [0.0] * len(xs))
    u = [xs[i] / norms[i] for i in kept]
    alpha = 1 / len(kept)
    mean, size = alpha * sum(u), alpha * sum(x.abs() for x in u)  # size: sum of |terms| of the mean
    length = float(mean.norm())
    mean, size = (u[0], u[0].abs()) if length < tol else (mean / length, size / length)
    for _ in range(max_iter):
        tangent, off = torch.zeros_like(mean), torch.zeros_like(mean)
        for x in u:
            cosine = min(1.0, max(-1.0, float((mean * x).sum())))
            angle = math.acos(cosine)
            if angle < tol or (1 - cosine**2 < 1e-12 and cosine < 0):
                continue
            factor = alpha * angle / math.sin(angle)
            tangent += factor * (x - cosine * mean)
            off += factor * (x.abs() + abs(cosine) * size)
        step = float(tangent.norm())
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        size = math.cos(step) * size + math.sin(step) / step * off
        mean, size = mean / mean.norm(), size / mean.norm()
    scale = sum(norms) / len(norms)
    # Each step passes on an error, magnified by less than 4 away from opposite vectors.
    return Exact(scale * mean, scale * size, 0.0, 4.0 * max_iter)  # never with a base


def model_stock_oracle(deltas: list[Tensor]) -> Exact:
    n, cosines = len(deltas), []
    for i in range(n):
        for j in range(i + 1, n):
            product = max(float(deltas[i].norm() * deltas[j].norm()), 1e-6)
            cosines.append(max(-1.0, min(1.0, float((deltas[i] * deltas[j]).sum()) / product)))
    cosine = sum(cosines) / len(cosines)
    denominator = 1 + (n - 1) * cosine
    t = 0.0 if abs(denominator) < 1e-6 else n * cosine / denominator
    return straight(deltas, [t / n] * n)._replace(magnified=0 if t == 0 else 1 / denominator**2)


WEIGHT = [0.7, 0.4, -0.2, 0.5, 0.3, 0.6, 0.1, 0.9, 0.2]


def oracle(method: str, xs: list[Tensor], **given: Any) -> Exact:
    weight = given.pop("weight", WEIGHT[: len(xs)])
    if method == "slerp":
        return slerp_oracle(xs, given["t"])
    if method == "nuslerp":
        total = math.fsum(weight)
        return nuslerp_oracle(xs, 0.5 if abs(total) < 1e-6 else weight[1] / total)
    if method == "multislerp":
        return multislerp_oracle(
            xs, weight, given.get("normalize_weights", True), given.get("eps", 1e-8)
        )
    return karcher_oracle(xs, **given) if method == "karcher" else model_stock_oracle(xs)


# ---- the comparison ------------------------------------------------------------------------------


def bound(exact: Exact, base: Tensor | None, dtype: torch.dtype, n: int, numel: int) -> Tensor:
    """Of one vector: its coefficients, the sum, the store."""
    unit = 2.0**-24 if dtype.itemsize == 2 else 2.0**-53
    # A cosine of two sums of numel + 2 roundings and a norm, here and in the oracle.
    off = 4 * (numel + 8) * 2.0**-53 * exact.magnified * exact.size
    # sum_i c_i x_i and (1 - sum_i c_i) b: the coefficient of b is rounded n times, each term and
    # sum once; as many roundings in the oracle.
    terms = exact.size
    if base is not None:
        terms = terms + (1 + 2 * exact.total) * base.abs()
    off = off + (n + 4) * (unit + 2.0**-53) * terms
    total = exact.value.abs() + (0 if base is None else base.abs())
    return off + half_ulp(total + off, dtype)


def check(
    method: str,
    xs: list[Tensor],
    base: Tensor | None = None,
    *,
    dim: int | None = None,
    host: str | None = None,
    oracle_xs: list[Tensor] | None = None,
    **given: Any,
) -> Tensor:
    """Merges, and compares every vector (the whole tensor, or those along `dim`)."""
    parameters = dict(given)
    if method in ("nuslerp", "multislerp"):
        parameters.setdefault("weight", WEIGHT[: len(xs)])
    got = merge_tensors(xs, method, base=base, host=host, **parameters)
    dtype = xs[0].dtype
    assert (got.dtype, got.shape) == (dtype, xs[0].shape)

    def rows(x: Tensor) -> Tensor:
        if dim is None or x.ndim < 2:
            return x.reshape(1, -1)
        x = x.movedim(dim, -1)
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    for r, row in enumerate(rows(got)):
        origin = None if base is None else rows(base)[r].double()
        vectors = [rows(x)[r].double() - (0 if origin is None else origin) for x in xs]
        for name in ("nuslerp_flatten", "nuslerp_row_wise", "filter_wise"):
            given.pop(name, None)
        exact = oracle(method, vectors, **given)
        value = exact.value if origin is None else origin + exact.value
        assert_within(row, value, bound(exact, origin, dtype, len(xs), len(row)))
    return got


METHODS = [
    ("slerp", 2, False, {"t": 0.3}),
    ("nuslerp", 2, False, {}),
    ("nuslerp", 2, True, {}),
    ("multislerp", 3, False, {}),
    ("multislerp", 3, True, {}),
    ("karcher", 3, False, {}),
    ("model_stock", 3, True, {}),
]
IDS = [f"{m}{'-base' if b else ''}" for m, _, b, _ in METHODS]


def models(
    kind: str, n: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[Tensor, list[Tensor]]:
    """A base and n models. "close" and "closest": fine-tuned, by deltas of 1e-3 and 1e-5."""
    base = 0.02 * values(shape, torch.float64, seed=99)
    if kind in ("close", "closest"):
        scale = 1e-3 if kind == "close" else 1e-5
        common = scale * values(shape, torch.float64, seed=50)
        xs = [base + common + scale * values(shape, torch.float64, seed=i) for i in range(n)]
    else:
        xs = [values(shape, torch.float64, kind, seed=i) for i in range(n)]
    return base.to(dtype), [x.to(dtype) for x in xs]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ["normal", "close", "closest", "ties", "equal"])
@pytest.mark.parametrize(("method", "n", "based", "given"), METHODS, ids=IDS)
def test_formula(
    method: str, n: int, based: bool, given: dict, kind: str, dtype: torch.dtype
) -> None:
    base, xs = models(kind, n, dtype, (31, 33))
    check(method, xs, base if based else None, **given)


@pytest.mark.parametrize("shape", [(), (1,), (1031,), (0,), (3, 0, 2), (5, 1, 3, 3), (1, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize(("method", "n", "based", "given"), METHODS, ids=IDS)
def test_shapes(
    method: str, n: int, based: bool, given: dict, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    base = values(shape, dtype, seed=99)
    # One direction: in one dimension there are two, and opposite ones have tests of their own.
    xs = [
        (base.double() + values(shape, torch.float64, seed=i).abs() + 0.1).to(dtype)
        for i in range(n)
    ]
    if not based:
        xs = [x.abs() for x in xs]
    check(method, xs, base if based else None, **given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("method", "n", "based", "given"), METHODS, ids=IDS)
def test_layouts(method: str, n: int, based: bool, given: dict, layout: str) -> None:
    base, xs = models("normal", n, torch.float32, (12, 3, 7))
    base, *xs = [LAYOUTS[layout](x) for x in (base, *xs)]
    check(method, xs, base if based else None, **given)


@pytest.mark.parametrize("n", range(1, 10))
@pytest.mark.parametrize("method", ["multislerp", "karcher", "model_stock"])
def test_number_of_models(method: str, n: int) -> None:
    base, xs = models("close", n, torch.float32, (31, 33))
    if method == "model_stock" and n == 1:
        return
    check(method, xs, base if method == "model_stock" else None)
    if method == "multislerp":
        check(method, xs, base)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0, -0.5, 1.6])
@pytest.mark.parametrize("kind", ["normal", "close"])
def test_nuslerp_outside_of_the_arc(t: float, kind: str) -> None:
    base, xs = models(kind, 2, torch.float32, (1031,))
    for origin in (None, base):
        check("nuslerp", xs, origin, weight=[1 - t, t])
        check("nuslerp", xs, origin, weight=[-3 * (1 - t), -3 * t])


def test_weights_that_sum_to_zero() -> None:
    base, xs = models("normal", 2, torch.float32, (1031,))
    got = check("nuslerp", xs, weight=[0.5, -0.5])
    assert_bits_equal(got, merge_tensors(xs, "nuslerp", weight=1))
    with pytest.raises(ArgumentError, match="multislerp: weights cannot be normalized"):
        merge_tensors(xs, "multislerp", weight=[0.5, -0.5])
    check("multislerp", xs, base, weight=[0.5, -0.5], normalize_weights=False)


@pytest.mark.parametrize("eps", [1e-8, 1e-3, 0.5])
@pytest.mark.parametrize("weight", [[1, 1, 1], [0.2, 3, 0.5], [1, -0.4, 0.8]], ids=str)
def test_multislerp_parameters(weight: list[float], eps: float) -> None:
    _, xs = models("normal", 3, torch.float32, (301,))
    for normalize in (True, False):
        check("multislerp", xs, weight=weight, normalize_weights=normalize, eps=eps)


@pytest.mark.parametrize("max_iter", [0, 1, 2, 10, 50])
@pytest.mark.parametrize("tol", [1e-2, 1e-5])
def test_karcher_parameters(max_iter: int, tol: float) -> None:
    _, xs = models("normal", 4, torch.float32, (301,))
    xs[3] = xs[3] + xs[0] * 3  # far from the others' plane of symmetry: several steps are needed
    check("karcher", xs, max_iter=max_iter, tol=tol)


def test_karcher_converges() -> None:
    """It stops where a third of the sum of tangents is shorter than `tol`."""
    _, xs = models("normal", 3, torch.float64, (301,))
    mean = merge_tensors(xs, "karcher", max_iter=50, tol=1e-12)
    mean = mean / mean.norm()
    tangent = torch.zeros_like(mean)
    for x in xs:
        u = x / x.norm()
        angle = torch.acos(u @ mean)
        tangent += angle / torch.sin(angle) * (u - (u @ mean) * mean)
    limit = torch.tensor(3e-12 + 3 * 4 * (301 + 8) * 2.0**-53, dtype=torch.float64)
    assert_within(tangent.norm(), torch.zeros((), dtype=torch.float64), limit)


# ---- along rows --------------------------------------------------------------------------------

ROWS = [
    ("nuslerp", -1, {"nuslerp_flatten": False}),
    ("nuslerp", 0, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("model_stock", -1, {"filter_wise": True}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ["normal", "close", "ties"])
@pytest.mark.parametrize("shape", [(31, 33), (5, 1, 3, 3), (257,), (), (3, 0), (2, 3, 40), (1, 50)])
@pytest.mark.parametrize(("method", "dim", "given"), ROWS, ids=["rows", "columns", "filters"])
def test_vectors(
    method: str, dim: int, given: dict, shape: tuple[int, ...], kind: str, dtype: torch.dtype
) -> None:
    n = 2 if method == "nuslerp" else 3
    base, xs = models(kind, n, dtype, shape)
    if math.prod(shape[:-1] if dim else shape[1:]) * 1.0 and min(shape, default=1) <= 3:
        # Vectors of few elements: positive, since opposite ones are ill-conditioned.
        xs = [(base.double() + (x.double() - base.double()).abs() + 0.5).to(dtype) for x in xs]
    check(method, xs, base, dim=dim, **given)
    if method == "nuslerp":
        check(method, xs, dim=dim, **given)


@pytest.mark.parametrize(("method", "dim", "given"), ROWS, ids=["rows", "columns", "filters"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_of_any_layout(method: str, dim: int, given: dict, layout: str) -> None:
    base, *xs = [LAYOUTS[layout](values((12, 3, 17), torch.float32, seed=i)) for i in range(3)]
    check(method, xs, base, dim=dim, **given)


def test_vectors_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuts do not change a bit."""
    from mergekern.methods import two_passes

    base, *xs = [values((12, 5, 34), torch.bfloat16, seed=i) for i in range(3)]
    for method, _, given in ROWS:
        weight = {"weight": [1, 2]} if method == "nuslerp" else {}
        once = merge_tensors(xs, method, base=base, **given, **weight)
        for block in (1, 50, 300):
            with monkeypatch.context() as m:
                m.setattr(two_passes, "_DOTS", block)
                assert_bits_equal(merge_tensors(xs, method, base=base, **given, **weight), once)


def test_a_row_with_nan_is_nan_alone() -> None:
    base, *xs = [values((4, 33), torch.float32, seed=i) for i in range(3)]
    xs[0][1, 5], xs[1][2, 6] = math.nan, math.inf
    for method, dim, given in ROWS:
        weight = {"weight": 1} if method == "nuslerp" else {}
        for origin in (base, None)[: 1 + (method == "nuslerp")]:
            got = merge_tensors(xs, method, base=origin, **given, **weight)
            nan = got.isnan().movedim(dim, -1)
            hit = [1, 2] if dim else [5, 6]
            assert nan[hit].all()
            nan[hit] = False
            assert not nan.any()


def test_mixed_rows() -> None:
    """Zero, equal, opposite and ordinary rows side by side."""
    a, b = values((5, 33), torch.float32, seed=1), values((5, 33), torch.float32, seed=2)
    a[0], b[1], b[2], b[3] = 0, 0, a[2], -2 * a[3]
    check("nuslerp", [a, b], dim=-1, nuslerp_flatten=False)
    base = torch.zeros_like(a)
    check("model_stock", [a, b], base, dim=-1, filter_wise=True)


# ---- directions that are none -------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, -2.0, -0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_parallel_and_opposite(factor: float, dtype: torch.dtype) -> None:
    x = values((301,), torch.float64).to(dtype)
    y = (factor * x.double()).to(dtype)
    zero = torch.zeros_like(x)
    weights = [0.6, 0.4]
    line = straight([x.double(), y.double()], weights)
    limit = bound(line, None, dtype, 2, 301)
    # The product with `factor` is rounded: to a line within an angle of that rounding, which is
    # straight for all dtypes whose rounding is below the angle that is told from none.
    exact = factor in (1.0, -1.0, -2.0) or dtype == torch.float64
    if exact:
        for origin in (None, zero):
            got = merge_tensors([x, y], "nuslerp", base=origin, weight=weights)
            assert_within(got, line.value, limit)
    if exact and factor == -1:
        equal = merge_tensors([x, y], "multislerp", weight=1)
        assert_bits_equal(equal, zero)
        with pytest.raises(ArgumentError, match="directions of layer cancel"):
            merge_tensors([x, y, zero], "multislerp", weight=1, name="layer")
        assert_within(
            merge_tensors([x, y], "karcher"), x.double(), 2 * half_ulp(x.double(), dtype) + 1e-300
        )
        assert_bits_equal(merge_tensors([x, y], "model_stock", base=zero), zero)
    if factor > 0 and exact:
        check("multislerp", [x, y, x])
        check("karcher", [x, y, x])
        check("model_stock", [x, y, x], zero)


@pytest.mark.parametrize("factor", [-0.7, -3.0, -1.25])
def test_opposite_long_float64_vectors_are_straight(factor: float) -> None:
    """Rounding of 10**6 products leaves an angle that is none."""
    x = values((1 << 20,), torch.float64)
    got = merge_tensors([x, factor * x], "nuslerp", weight=[0.5, 0.5])
    line = straight([x, factor * x], [0.5, 0.5])
    assert_within(got, line.value, bound(line, None, torch.float64, 2, 1))


@pytest.mark.parametrize("zeros", [1, 2, 3])
@pytest.mark.parametrize("method", ["multislerp", "karcher", "model_stock"])
def test_zero_vectors(method: str, zeros: int) -> None:
    base, xs = models("normal", 3, torch.float32, (301,))
    for origin in (None, base):
        if (method, origin) == ("karcher", base) or (method == "model_stock" and origin is None):
            continue
        zero = torch.zeros(301) if origin is None else base
        some = [zero] * zeros + xs[zeros:]
        got = check(
            method, some, origin, **({} if method != "multislerp" else {"weight": [1, 1, 1]})
        )
        if zeros == 3:
            assert_bits_equal(got, zero)


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("zeros", [1, 2])
def test_zero_vectors_of_nuslerp(zeros: int, based: bool) -> None:
    base, xs = models("normal", 2, torch.float32, (301,))
    zero = base if based else torch.zeros(301)
    some = [zero] * zeros + xs[zeros:]
    for pair in (some, some[::-1]):
        got = check("nuslerp", pair, base if based else None)
        if zeros == 2:
            assert_bits_equal(got, zero)


def test_short_vectors() -> None:
    """Norms below the thresholds of 1e-7 (nuslerp) and 1e-6 of a product (model_stock)."""
    _, (x, y, z) = models("normal", 3, torch.float32, (301,))
    zero = torch.zeros(301)
    for scale in (1e-7, 1e-9, 1e-12):
        check("nuslerp", [scale * x, y])
        check("nuslerp", [scale * x, scale * y])
        check("model_stock", [scale * x, y, z], zero)
        check("model_stock", [scale * x, scale * (x + y), scale * z], zero)


def test_karcher_keeps_short_vectors_unless_the_host_drops_them() -> None:
    _, (x, y, z) = models("normal", 3, torch.float32, (301,))
    x = 1e-7 * x
    mine = check("karcher", [x, y, z])
    theirs = merge_tensors([x, y, z], "karcher", host="mergekit")
    exact = karcher_oracle([v.double() for v in (x, y, z)], least=1e-5)
    assert_within(theirs, exact.value, bound(exact, None, torch.float32, 3, 301))
    assert not torch.equal(mine, theirs)
    tiny = [1e-8 * y, 1e-8 * z]
    assert not merge_tensors(tiny, "karcher", host="mergekit").any()
    assert merge_tensors(tiny, "karcher").any()


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("method", "n", "based", "given"), METHODS, ids=IDS)
def test_non_finite_values_make_all_nan(
    method: str, n: int, based: bool, given: dict, special: float
) -> None:
    base, xs = models("normal", n, torch.float32, (301,))
    weight = {"weight": 1} if method in ("nuslerp", "multislerp") else {}
    tensors = [*xs, base] if based else xs
    for i in range(len(tensors)):
        broken = [x.clone() for x in tensors]
        broken[i][17] = special
        origin = broken[n] if based else None
        assert merge_tensors(broken[:n], method, base=origin, **given, **weight).isnan().all()


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_one_model_is_returned_as_it_is(method: str) -> None:
    x = torch.tensor([math.nan, -0.0, math.inf, 1.0])
    weight = {"weight": 0.3} if method == "multislerp" else {}
    assert_bytes_equal(merge_tensors([x], method, **weight), x)
    got = merge_tensors([x], method, out_dtype=torch.float16, **weight)
    assert_bits_equal(got, x.half())
    if method == "multislerp":
        assert_bytes_equal(merge_tensors([x], method, base=torch.ones(4), **weight), x)


def test_model_stock_at_its_singularity() -> None:
    """Three differences at 120 degrees: the cosine is -1/2, the denominator 0."""
    base = values((2,), torch.float32)
    angles = [0, 2 * math.pi / 3, 4 * math.pi / 3]
    xs = [
        base.double() + torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64)
        for a in angles
    ]
    got = merge_tensors(xs, "model_stock", base=base.double())
    assert_bits_equal(got, base.double())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock"])
def test_float32_far_from_one(method: str, scale: float) -> None:
    """Squares leave float32 on both sides; dot products are float64."""
    _, (x, y) = models("normal", 2, torch.float32, (301,))
    base = torch.zeros(301) if method == "model_stock" else None
    check(method, [scale * x, scale * y], base, **({"t": 0.3} if method == "slerp" else {}))


# ---- counts, parameters, whole state dicts -------------------------------------------------------

X, Y = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
REFUSALS: list[tuple[str, list[Tensor], dict[str, Any], str]] = [
    ("nuslerp", [X], {"weight": 1}, "nuslerp: wrong number of models; got 1; expected exactly 2"),
    ("nuslerp", [X], {"weight": 1, "base": Y}, "models beside the base; got 1; expected exactly 2"),
    ("nuslerp", [X, Y, X], {"weight": 1}, "got 3; expected exactly 2"),
    ("nuslerp", [X, Y], {}, "weight is required"),
    ("nuslerp", [X, Y], {"weight": 1, "nuslerp_flatten": 2}, "nuslerp_flatten is no boolean"),
    ("multislerp", [X, Y], {"weight": [1, 2, 3]}, "got 3; expected 2"),
    ("multislerp", [X, Y], {"weight": 1, "eps": -1}, "eps is out of range"),
    ("karcher", [X, Y], {"max_iter": 2.5}, "karcher: max_iter is no whole number; got 2.5"),
    ("karcher", [X, Y], {"max_iter": -1}, "max_iter is out of range"),
    ("karcher", [X, Y], {"host": "peft"}, "karcher: unknown host; got 'peft'; expected mergekit"),
    ("nuslerp", [X, Y], {"weight": 1, "host": "mergekit"}, "nuslerp: unknown host"),
    ("model_stock", [X, Y], {}, "model_stock: needs a base model; got none"),
    ("model_stock", [X], {"base": Y}, "models beside the base; got 1; expected at least 2"),
]


@pytest.mark.parametrize(("method", "xs", "given", "words"), REFUSALS)
def test_refusals(method: str, xs: list[Tensor], given: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        merge_tensors(xs, method, **given)
    assert words in str(caught.value)


def test_whole_numbers_are_read_from_text() -> None:
    spec = mk.methods()["karcher"]
    assert spec.arguments({"max_iter": "3"}, 2)["max_iter"] == 3


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_an_optional_base_in_state_dicts(method: str) -> None:
    """With a base it is subtracted and takes no weight; without, there is none."""
    base, *xs = [
        {"w": values((5, 7), torch.float32, seed=i), "ids": torch.arange(3)} for i in range(3)
    ]
    weight = [1.0, 3.0]
    got = mk.merge_state_dicts(xs, method, base=base, weight=weight)
    tensors = [x["w"] for x in xs]
    assert_bits_equal(got["w"], merge_tensors(tensors, method, base=base["w"], weight=weight))
    assert_bits_equal(got["ids"], torch.arange(3))
    without = mk.merge_state_dicts(xs, method, weight=weight)
    assert_bits_equal(without["w"], merge_tensors(tensors, method, weight=weight))
    assert not torch.equal(got["w"], without["w"])
