"""tsv_m, iso_c, iso_cts and svc against dense SVDs in float64, and what their mathematics says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergekern as mk
from mergekern.adapters.adapter import Adapter, Factors
from mergekern.engine.manifest import MANIFEST
from mergekern.methods import REGISTRY
from mergekern.methods.singular import spectrum

from accuracy import assert_bits_equal, assert_within, half_ulp
from engine.models import write_folder
from methods.spectral_oracle import ORACLES, Oracle
from refusal import refused

NAMES = tuple(ORACLES)
WHOLE = ("tsv_m", "iso_c")  # do not tell rows from columns


def family(
    n: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base and n models whose task vectors have something in common."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g)
    shared = torch.randn(shape, generator=g)
    xs = [base + 0.01 * (torch.randn(shape, generator=g) + 0.3 * shared) for _ in range(n)]
    return base.to(dtype), [x.to(dtype) for x in xs]


def taus(base: Tensor, xs: list[Tensor]) -> list[Tensor]:
    return [x.double() - base.double() for x in xs]


def assert_merged(
    got: Tensor, base: Tensor, oracle: Oracle, scale: float = 1.0, rounding: float = 1.0
) -> None:
    """base + scale * oracle, rounded once; the sum of the two in float64 before."""
    exact = base.double() + scale * oracle.merged
    error = abs(scale) * oracle.error + 2.0**-52 * (base.double().abs() + exact.abs())
    assert oracle.error <= 2.0**-18 * float(torch.linalg.matrix_norm(oracle.merged, 2))
    assert_within(got, exact, error + rounding * half_ulp(exact.abs() + error, got.dtype))


# ---- formulas --------------------------------------------------------------------------------

SHAPES = [(31, 17), (17, 31), (24, 24), (8, 8), (40, 3), (64, 63)]


@pytest.mark.parametrize("out", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_formula(name: str, shape: tuple[int, int], n: int, out: torch.dtype) -> None:
    if name == "tsv_m" and n > min(shape):
        pytest.skip("no place for so many: see test_more_models_than_rows")
    base, xs = family(n, *shape)
    got = mk.merge_tensors(xs, name, base=base, out_dtype=out)
    assert_merged(got, base, ORACLES[name](taus(base, xs)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    base, xs = family(3, 31, 17, dtype=dtype)
    got = mk.merge_tensors(xs, name, base=base)
    assert got.dtype == dtype
    assert_merged(got, base, ORACLES[name](taus(base, xs)))


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


# ---- other tensors, layouts ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (4, 3, 2, 2), (2, 3, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_other_tensors_get_the_mean(name: str, shape: tuple[int, ...]) -> None:
    base, xs = family(3, *shape)
    got = mk.merge_tensors(xs, name, base=base, lambda_=0.9)
    scale = 0.9 if name == "svc" else 0.9 / 3
    plain = mk.merge_tensors(xs, "task_arithmetic", base=base, weight=1.0, lambda_=scale)
    assert_bits_equal(got, plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_with_spectral_off(name: str) -> None:
    base, xs = family(3, 9, 7)
    got = mk.merge_tensors(xs, name, base=base, spectral=False)
    scale = 1.0 if name == "svc" else 1 / 3
    plain = mk.merge_tensors(xs, "task_arithmetic", base=base, weight=1.0, lambda_=scale)
    assert_bits_equal(got, plain)


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts(name: str) -> None:
    shapes = {"w": (9, 7), "b": (7,), "conv": (4, 3, 2, 2), "scale": ()}
    families = {key: family(2, *shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    steps = torch.tensor([3])
    base = {key: f[0] for key, f in families.items()} | {"steps": steps}
    models = [{key: f[1][i] for key, f in families.items()} | {"steps": steps} for i in range(2)]
    got = mk.merge_state_dicts(models, name, base=base)
    for key, (b, xs) in families.items():
        assert_bits_equal(got[key], mk.merge_tensors(xs, name, base=b))
    assert_bits_equal(got["steps"], steps)


@pytest.mark.parametrize(
    ("key", "axis"),
    [("blocks.0.attn.qkv.weight", 0), ("in_proj_weight", 0), ("h.c_attn.weight", 1)],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_fused_qkv_is_three_matrices(name: str, key: str, axis: int) -> None:
    base, xs = family(2, *((36, 12) if axis == 0 else (12, 36)))
    got = mk.merge_tensors(xs, name, base=base, name=key, split_qkv=True)
    each = zip(*(torch.chunk(x, 3, axis) for x in (base, *xs)), strict=True)
    parts = [mk.merge_tensors(part, name, base=b) for b, *part in each]
    assert_bits_equal(got, torch.cat(parts, axis))
    assert not torch.equal(got, mk.merge_tensors(xs, name, base=base, name=key))
    other = mk.merge_tensors(xs, name, base=base, name="mlp.fc1.weight", split_qkv=True)
    assert_bits_equal(other, mk.merge_tensors(xs, name, base=base))


def test_a_qkv_of_other_parts_is_refused() -> None:
    base, xs = family(2, 20, 12)
    with refused("iso_c", "attn.qkv.weight", "[20, 12]", "[3 d, d]"):
        mk.merge_tensors(xs, "iso_c", base=base, name="attn.qkv.weight", split_qkv=True)


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_not_finite(name: str, special: float) -> None:
    base, xs = family(3, 9, 7)
    xs[1][2, 3] = special
    with refused(name, "task vector 1 of layer.w[2, 3]", str(special)):
        mk.merge_tensors(xs, name, base=base, name="layer.w")
    base[4, 0] = special
    with refused(name, "task vector 0 of the tensor[4, 0]"):
        mk.merge_tensors(xs, name, base=base)


def test_results_beyond_float64() -> None:
    base = torch.zeros(3, 3, dtype=torch.float64)
    with refused("iso_c", "task vector 0", "inf"):
        mk.merge_tensors([base + 1e308], "iso_c", base=base - 1e308)


def test_arguments_out_of_range() -> None:
    base, xs = family(2, 5, 4)
    for alpha in (0, -1):
        with refused("svc", "alpha", "above 0"):
            mk.merge_tensors(xs, "svc", base=base, alpha=alpha)
    with refused("iso_cts", "common", "0 to 1"):
        mk.merge_tensors(xs, "iso_cts", base=base, common=1.5)
    with refused("tsv_m", "needs a base", sentence=False):
        mk.merge_tensors(xs, "tsv_m")


# ---- adapters, checkpoints --------------------------------------------------------------------


@pytest.mark.parametrize("seen", ["core", "knots"])
def test_adapters(seen: str) -> None:
    """The sum of low-rank task vectors flattened in its own space: no noise, and no rank added."""
    g = torch.Generator().manual_seed(0)

    def adapter() -> Adapter:
        a, b = torch.randn(2, 20, generator=g), torch.randn(30, 2, generator=g)
        return Adapter({"fc": Factors(a, b, shape=(20,))})

    both = [adapter(), adapter()]
    merged = mk.merge_adapters(both, f"{seen}_iso_c").modules["fc"].delta()
    total = sum(x.modules["fc"].delta() for x in both)
    assert isinstance(total, Tensor)
    u, s, vh = torch.linalg.svd(total.double())
    expected = s[:4].mean() * u[:, :4] @ vh[:4]
    # Parts and factors are rounded to float32: a turn by that over the least singular value.
    error = 2.0**-20 * float(s[0] / s[3]) * float(s[0])
    assert_within(merged.double(), expected, torch.tensor(error).double())


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[list[Path], list[dict[str, Tensor]]]:
    shapes = {"attn.qkv.weight": (36, 12), "fc.weight": (20, 12), "fc.bias": (20,), "embed": (9, 7)}
    families = {f"blocks.0.{key}": family(2, *shape) for key, shape in shapes.items()}
    states = [{key: base for key, (base, _) in families.items()}]
    states += [{key: xs[i] for key, (_, xs) in families.items()} for i in range(2)]
    return [write_folder(tmp_path / f"m{i}", s) for i, s in enumerate(states)], states


def test_a_configuration(checkpoints: Any, tmp_path: Path) -> None:
    """Filters turn matrices off; what is asked for is in the manifest; bits are those of a call."""
    paths, (base, *models) = checkpoints
    config = {
        "merge_method": "tsv_m",
        "base_model": str(paths[0]),
        "models": [{"model": str(p)} for p in paths[1:]],
        "parameters": {
            "lambda": 0.8,
            "split_qkv": True,
            "spectral": [{"filter": "embed", "value": False}, {"value": True}],
        },
    }
    manifest = mk.merge_checkpoints(config, tmp_path / "out", progress=False)
    assert manifest.merged == len(base)
    got = load_file(tmp_path / "out" / "model.safetensors")
    for key, b in base.items():
        options: dict[str, Any] = {"lambda": 0.8, "split_qkv": True, "spectral": "embed" not in key}
        xs = [m[key] for m in models]
        assert_bits_equal(got[key], mk.merge_tensors(xs, "tsv_m", base=b, name=key, **options))
    about = json.loads((tmp_path / "out" / MANIFEST).read_text())["tensors"]
    assert [t["arguments"]["split_qkv"] for t in about.values()] == [True] * 4
    assert [t["arguments"]["spectral"] for t in about.values()] == ["embed" not in k for k in about]


def test_memory_of_a_merge(checkpoints: Any, tmp_path: Path) -> None:
    """A plan counts the float64 matrices; too small a limit is refused before anything is read."""
    paths, _ = checkpoints
    config = {
        "merge_method": "iso_cts",
        "base_model": str(paths[0]),
        "models": [{"model": str(p)} for p in paths[1:]],
    }
    plan, _ = mk.plan_merge(config, tmp_path / "out")
    scratch = 8 * (8 * 36 * 12 + 10 * 12 * 12)
    assert REGISTRY["iso_cts"].scratch(plan.tasks[0].arguments[0], (36, 12)) == scratch
    assert plan.peak == 36 * 12 * 4 * 4 + scratch
    with pytest.raises(mk.CheckpointError, match=r"qkv.weight needs .* scratch .* cannot be cut"):
        mk.merge_checkpoints(config, tmp_path / "out", memory=plan.peak - 1)
