"""Methods on task vectors against their formulas in float64: what is kept, drawn, voted."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import merge_tensors
from mergekern.keep import Bernoulli
from mergekern.methods import della as della_module
from mergekern.methods import slices

from accuracy import assert_bits_equal, assert_within, half_ulp
from cases import values
from engine.models import read_folder, tensors, write_folder
from methods.oracle import (
    U,
    assert_task_vectors,
    band_mask,
    draws,
    family,
    magnitude_mask,
    magprune_mask,
    normal,
    ram_oracle,
    sce_oracle,
    variance_mask,
)
from refusal import refused

NAN, INF = math.nan, math.inf
WEIGHTS = [0.7, 1.1, -0.4]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def grid(n: int, *shape: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Multiples of 1/16: differences, means over 2 or 4 models and squares are exact in float32."""
    g = torch.Generator().manual_seed(seed)
    base, *xs = (torch.randint(-40, 41, shape, generator=g) / 16 for _ in range(n + 1))
    return base, xs


def selected(x: Tensor, method: str, **parameters: Any) -> Tensor:
    """What one task vector keeps; x holds no zeros."""
    base = torch.zeros_like(x)
    options = {"weight": 1, "rescale": False, "normalize": False, **parameters}
    got = merge_tensors([x], method, base=base, **options)
    kept = got != 0
    assert_bits_equal(got, torch.where(kept, x, torch.zeros_like(x)))
    return kept


# ---- breadcrumbs -----------------------------------------------------------------------------

BANDS = [(0.5, 0.01), (0.5, 0.2), (0.3, 0.0), (0.9, 0.4), (0.001, 0.01), (0.2, 1.0), (0.99, 0.99)]


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize(("density", "gamma"), BANDS)
@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("shape", [(31, 17), (1,), (7,), (), (40, 1, 3, 3), (0, 3)])
def test_breadcrumbs_keeps_a_band(
    shape: tuple[int, ...], kind: str, density: float, gamma: float, method: str
) -> None:
    x = values(shape, torch.float32, kind)
    x = torch.where(x == 0, torch.full_like(x, 0.25), x)
    base = torch.zeros_like(x)
    got = selected(x, method, density=density, gamma=gamma)
    assert torch.equal(got, band_mask(base, x, density, gamma))


def test_breadcrumbs_drops_the_lowest_index_among_equal_outliers_and_keeps_the_next() -> None:
    x = torch.ones(10)
    got = selected(x, "breadcrumbs", density=0.3, gamma=0.2)
    assert got.tolist() == [False] * 2 + [True] * 3 + [False] * 5


def test_breadcrumbs_takes_nan_for_the_largest_outlier() -> None:
    x = torch.tensor([1.0, 3.0, NAN, 2.0, INF])
    got = merge_tensors([x], "breadcrumbs", base=torch.zeros(5), weight=1, density=0.4, gamma=0.4)
    assert_bits_equal(got, torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize(("rescale", "normalize", "lam"), [(False, False, 1), (True, True, 0.8)])
def test_breadcrumbs(
    method: str, dtype: torch.dtype, rescale: bool, normalize: bool, lam: float
) -> None:
    base, xs = family(3, 31, 17, dtype=dtype)
    density, gamma = [0.5, 0.2, 0.9], [0.01, 0.3, 0.05]
    got = merge_tensors(
        xs, method, base=base, weight=WEIGHTS, density=density, gamma=gamma, rescale=rescale,
        normalize=normalize, lambda_=lam,
    )  # fmt: skip
    triples = zip(xs, density, gamma, strict=True)
    masks = [band_mask(base, x, d, g) for x, d, g in triples]
    assert_task_vectors(
        got, base, xs, WEIGHTS, masks, elect=method.endswith("ties"), normalize=normalize,
        rescale=rescale, lam=lam,
    )  # fmt: skip


# ---- DELLA -----------------------------------------------------------------------------------

SHAPES = [(31, 17), (9, 7, 3, 3), (13, 1, 3, 3), (40,), (1,), (), (5, 1), (1, 40)]


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_della_mask(shape: tuple[int, ...], kind: str, method: str) -> None:
    x = values(shape, torch.float32, kind)
    x = torch.where(x == 0, torch.full_like(x, 0.25), x)
    for density, epsilon in ((0.5, 0.2), (0.3, 0.3), (0.6, 0.0), (0.85, 0.15)):
        got = selected(x, method, density=density, epsilon=epsilon, seed=3, name="w")
        want = magprune_mask(torch.zeros_like(x), x, density, epsilon, 3, "w", 0)
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("shape", [(31, 17), (9, 7, 3, 3), (300,)])
def test_della(method: str, dtype: torch.dtype, rescale: bool, shape: tuple[int, ...]) -> None:
    base, xs = family(3, *shape, dtype=dtype)
    density, epsilon = [0.5, 0.7, 0.3], [0.2, 0.1, 0.3]
    normalize = method == "della"
    got = merge_tensors(
        xs, method, base=base, weight=WEIGHTS, density=density, epsilon=epsilon,
        rescale=rescale, seed=7, name="k",
    )  # fmt: skip
    models = enumerate(zip(xs, density, epsilon, strict=True))
    masks = [magprune_mask(base, x, d, e, 7, "k", i) for i, (x, d, e) in models]
    assert_task_vectors(
        got, base, xs, WEIGHTS, masks, elect=normalize, normalize=normalize, rescale=rescale
    )


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("shape", [*SHAPES, (0,), (3, 0, 2)])
def test_della_of_density_zero_and_one_draws_nothing(method: str, shape: tuple[int, ...]) -> None:
    base, xs = family(2, *shape)
    assert_bits_equal(merge_tensors(xs, method, base=base, weight=1, density=0), base)
    whole = merge_tensors(xs, method, base=base, weight=1, density=1)
    plain = "ties" if method == "della" else "task_arithmetic"
    assert_bits_equal(whole, merge_tensors(xs, plain, base=base, weight=1))
    mixed = merge_tensors(xs, method, base=base, weight=1, density=[1, 0.5], epsilon=0.1)
    assert mixed.shape == base.shape
    assert not mixed.isnan().any()


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.5, 0.51), (0.99, 0.02)]
)
def test_della_refuses_chances_outside_0_to_1(density: float, epsilon: float) -> None:
    base, xs = family(2, 5)
    for host in (None, "mergekit"):
        with refused("della", f"{density:g} -+ {epsilon:g}", "0 to 1"):
            merge_tensors(
                xs, "della", base=base, weight=1, density=density, epsilon=epsilon, host=host
            )


def test_della_refuses_a_negative_epsilon() -> None:
    with refused("della", "epsilon", "-0.1"):
        merge_tensors([normal(5)], "della", base=normal(5), weight=1, density=0.5, epsilon=-0.1)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("shape", [(31, 17), (9, 7, 3, 3), (13, 1, 3, 3), (40,)])
def test_della_in_slabs_has_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], method: str
) -> None:
    """31 rows of 17: slabs begin within a byte of the mask and within a block of draws."""
    base, xs = family(3, *shape)
    xs[1] = xs[1].transpose(0, -1).contiguous().transpose(0, -1)
    options: dict[str, Any] = {"base": base, "weight": WEIGHTS, "density": [0.5, 1, 0.4]}
    whole = merge_tensors(xs, method, **options)
    called: list[int] = []
    masks = della_module._masks

    def counting(*args: Any) -> Any:
        called.append(1)
        return masks(*args)

    monkeypatch.setattr(slices, "SLICE", 20)
    monkeypatch.setattr(della_module, "_MASKS", 20)
    monkeypatch.setattr(della_module, "_masks", counting)
    assert_bits_equal(merge_tensors(xs, method, **options), whole)
    assert len(shape) == 1 or len(called) > 5


# ---- SCE -------------------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [1.0, 0.5, 0.1, 0.001, 0.0])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("shape", [(31, 17), (6, 1, 3, 3), (9,), (1,), ()])
def test_sce(shape: tuple[int, ...], n: int, topk: float) -> None:
    base, xs = grid(n, *shape)
    got = merge_tensors(xs, "sce", base=base, select_topk=topk)
    oracle = sce_oracle(base, xs, variance_mask(base, xs, topk))
    # n products and sums above and below, a quotient and a sum; |mean of those that agree| is at
    # most the largest |task vector|, 5.
    assert_within(got, oracle, (4 * n + 6) * U * 5 + half_ulp(oracle, torch.float32))


def test_sce_of_equal_models_selects_nothing_and_weighs_them_alike() -> None:
    """No variance: nothing can be selected by it; all of it is the one task vector."""
    base, (x,) = grid(1, 31, 17)
    assert_bits_equal(merge_tensors([x] * 4, "sce", base=base, select_topk=0.5), base)
    assert_bits_equal(merge_tensors([x] * 4, "sce", base=base), x)


def test_sce_of_models_equal_to_their_base_gives_the_base() -> None:
    base, _ = grid(1, 31)
    for topk in (0.0, 0.5, 1.0):
        assert_bits_equal(merge_tensors([base] * 3, "sce", base=base, select_topk=topk), base)


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_sce_with_a_special_among_the_kept_is_nan(special: float) -> None:
    base, xs = grid(2, 40)
    xs[1][7] = special
    for topk in (0.5, 1.0):
        assert merge_tensors(xs, "sce", base=base, select_topk=topk).isnan().all()
    assert_bits_equal(merge_tensors(xs, "sce", base=base, select_topk=0), base)


# ---- RAM -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(31, 17), (6, 1, 3, 3), (1,), ()])
def test_ram(shape: tuple[int, ...], n: int, method: str, dtype: torch.dtype) -> None:
    base, xs = family(n, *shape, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    xs = [torch.where(torch.rand(shape, generator=g) < 0.6, base, x) for x in xs]
    r, alpha = (0.7, 0.4) if method == "ramplus_tl" else (None, 0.0)
    given = {"r": r, "alpha": alpha} if r else {}
    got = merge_tensors(xs, method, base=base, epsilon=0.02, **given)
    oracle, size = ram_oracle(base, xs, 0.02, r, alpha)
    error = (n + 6) * U * size
    assert_within(got, oracle, error + half_ulp(oracle.abs() + error, dtype) * (1 + 2.0**-7))


def test_ramplus_counts_what_is_shared_and_alone() -> None:
    """Model 0 changes three elements, one of them alone; model 1 two, none alone."""
    base = torch.zeros(4)
    a, b = torch.tensor([1.0, 2.0, 4.0, 0.0]), torch.tensor([3.0, 2.0, 0.0, 0.0])
    got = merge_tensors([a, b], "ramplus_tl", base=base, r=0.5, alpha=8)
    assert_bits_equal(got, torch.tensor([2.0, 2.0, 4.0 * (1 + 0.5 * 2), 0.0]))
    limited = merge_tensors([a, b], "ramplus_tl", base=base, r=0.5, alpha=1)
    assert_bits_equal(limited, torch.tensor([2.0, 2.0, 6.0, 0.0]))


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_ram_takes_nan_for_a_change(method: str) -> None:
    base, x = torch.zeros(3), torch.tensor([NAN, 1.0, 0.0])
    got = (
        merge_tensors([x, base + 2], method, base=base, alpha=0)
        if method != "ram"
        else (merge_tensors([x, base + 2], method, base=base))
    )
    assert_bits_equal(got, torch.tensor([NAN, 1.5, 2.0]))


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ram_compares_with_epsilon_itself(method: str, dtype: torch.dtype) -> None:
    """float32(0.1) lies above 0.1 and so is a change; float32(1e-5) lies below 1e-5."""
    for epsilon in (0.1, 1e-5, 0.3, 0.5, 0.0):
        x = torch.tensor([epsilon], dtype=dtype)
        changed = float(x) > epsilon
        got = merge_tensors([x], method, base=torch.zeros_like(x), epsilon=epsilon)
        assert_bits_equal(got, x if changed else torch.zeros_like(x))


def test_ram_refuses_a_negative_epsilon() -> None:
    with refused("ram", "epsilon", "-1"):
        merge_tensors([torch.ones(2)], "ram", base=torch.zeros(2), epsilon=-1)


# ---- magnitude_prune -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.37, 1.0])
def test_magnitude_prune(density: float, dtype: torch.dtype) -> None:
    base, xs = family(3, 31, 17, dtype=dtype)
    got = merge_tensors(
        xs, "magnitude_prune", base=base, weight=WEIGHTS, density=density, lambda_=0.8
    )
    masks = [magnitude_mask(base, x, density) for x in xs]
    assert_task_vectors(
        got, base, xs, WEIGHTS, masks, elect=False, normalize=False, rescale=False, lam=0.8
    )


# ---- TIES over the whole model ---------------------------------------------------------------

Model = dict[str, Tensor]
COMBINE = ("mean", "sum", "max")


def flat(model: Model) -> Tensor:
    return torch.cat([x.reshape(-1).double() for x in model.values() if x.is_floating_point()])


def kept_of_model(base: Model, model: Model, density: float, host: str | None) -> Tensor:
    """The largest of the whole model: exactly k, lowest tensor and index first; hosts all ties."""
    d = (flat(model).float() - flat(base).float()).abs()
    order = torch.sort(d, descending=True, stable=True).indices
    if density >= 1:
        return torch.ones(len(d), dtype=torch.bool)
    if host:
        return d >= d[order[min(int(density * len(d)), len(d) - 1)]]
    mask = torch.zeros(len(d), dtype=torch.bool)
    mask[order[: max(1, int(density * len(d))) if density > 0 else 0]] = True
    return mask


def global_oracle(
    base: Model,
    models: list[Model],
    density: float,
    combine: str,
    host: str | None = None,
) -> Tensor:
    """The flat result of unit weights; exact on a grid."""
    kept = [kept_of_model(base, m, density, host) for m in models]
    tv = torch.stack([(flat(m) - flat(base)) * k for m, k in zip(models, kept, strict=True)])
    sign = tv.sum(0).sign()
    if host is None:
        sign[sign == 0] = 1
    else:
        majority = sign.sum().sign()
        sign[sign == 0] = -1 if majority == 0 and host == "knots" else majority
    tv = tv * (tv.sign() == sign)
    if combine == "max":
        merged = tv.abs().max(0).values * sign
    else:
        merged = tv.sum(0)
        if combine == "mean":
            merged = merged / (tv != 0).sum(0).clamp(min=1)
    return flat(base) + merged


def grid_model(seed: int, scale: int = 8) -> Model:
    """Few magnitudes: ties within and across tensors."""
    made = {}
    for i, (key, x) in enumerate(tensors().items()):
        made[key] = x
        if x.is_floating_point():
            g = torch.Generator().manual_seed(100 * seed + i)
            made[key] = torch.randint(-scale, scale + 1, x.shape, generator=g) / 16
    return made


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("host", [None, "fusion_bench", "knots"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ties_global(n: int, host: str | None, density: float, combine: str) -> None:
    base, models = grid_model(0), [grid_model(i + 1) for i in range(n)]
    got = mk.merge_state_dicts(
        models, "ties_global", base=base, density=density, merge_func=combine, host=host
    )
    oracle = global_oracle(base, models, density, combine, host)
    assert_within(flat(got), oracle, half_ulp(oracle, torch.float32) + 2 * U)
    if combine != "mean" or n == 1:  # thirds are not on the grid
        assert torch.equal(flat(got), oracle)
    if n == 1 and host is None and 0 < density < 1:
        size = int((flat(models[0]) != flat(base)).sum())
        k = max(1, int(density * len(oracle)))
        assert int((flat(got) != flat(base)).sum()) == min(k, size)


@pytest.mark.parametrize("host", [None, "fusion_bench"])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_ties_global_of_state_dicts_and_checkpoints(
    tmp_path: Path, density: float, host: str | None
) -> None:
    base, models = grid_model(0), [grid_model(i + 1) for i in range(3)]
    # In files names are sorted; which of several tied elements is kept follows the order.
    # Two empty tensors side by side: small enough for any method to join them, were it allowed.
    empty = {"empty.0": torch.zeros(0, 3), "empty.1": torch.zeros(0)}
    base, *models = (dict(sorted({**m, **empty}.items())) for m in (base, *models))
    whole = mk.merge_state_dicts(models, "ties_global", base=base, density=density, host=host)
    paths = [
        write_folder(tmp_path / f"m{i}", m, shards=1 + i % 2) for i, m in enumerate((base, *models))
    ]
    config = {
        "merge_method": "ties_global",
        "base_model": str(paths[0]),
        "models": [{"model": str(p)} for p in paths[1:]],
        "parameters": {"density": density},
    }
    mk.merge_checkpoints(config, tmp_path / "out", host=host, progress=False)
    merged = read_folder(tmp_path / "out")
    assert merged.keys() == whole.keys()
    for key, x in whole.items():
        assert_bits_equal(merged[key], x)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("combine", COMBINE)
def test_ties_global_of_one_tensor(density: float, combine: str) -> None:
    base, xs = grid(3, 31, 17)
    got = merge_tensors(xs, "ties_global", base=base, density=density, merge_func=combine)
    single = mk.merge_state_dicts(
        [{"w": x} for x in xs], "ties_global", base={"w": base}, density=density, merge_func=combine
    )
    assert_bits_equal(got, single["w"])
    oracle = global_oracle({"w": base}, [{"w": x} for x in xs], density, combine)
    assert_within(got.reshape(-1), oracle, half_ulp(oracle, torch.float32) + 2 * U)


def test_ties_global_keeps_ties_of_the_first_tensor_first() -> None:
    base = {"b": torch.zeros(3), "a": torch.zeros(2, 2)}
    x = {"b": torch.ones(3), "a": torch.ones(2, 2)}
    got = mk.merge_state_dicts([x], "ties_global", base=base, density=0.72)  # 5 of 7
    assert_bits_equal(got["b"], torch.ones(3))
    assert_bits_equal(got["a"], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("host", ["fusion_bench", "knots"])
def test_hosts_of_ties_global_keep_one_more_and_every_tie(host: str) -> None:
    x = torch.tensor([5.0, 4.0, 3.0, 3.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    base = torch.zeros(10)

    def kept(density: float) -> int:
        got = merge_tensors([x], "ties_global", base=base, density=density, host=host)
        return int((got != 0).sum())

    assert [kept(d) for d in (0.0, 0.1, 0.2, 0.5, 0.9, 1.0)] == [1, 2, 5, 6, 10, 10]


@pytest.mark.parametrize(
    ("rest", "majority"),
    [(1.0, 1.0), (-1.0, -1.0), (0.0, -1.0)],
    ids=["positive", "negative", "none"],
)
def test_a_tied_vote_takes_the_majority_sign(rest: float, majority: float) -> None:
    """Element 0 is tied between 1 and -1; the two others decide."""
    a, b = torch.tensor([1.0, rest, rest]), torch.tensor([-1.0, rest, rest])
    options: dict[str, Any] = {"base": torch.zeros(3), "density": 1}
    for host, sign in (("fusion_bench", majority), ("knots", majority), (None, 1.0)):
        got = merge_tensors([a, b], "ties_global", host=host, **options)
        assert_bits_equal(got, torch.tensor([sign, rest, rest]))


def test_ties_global_takes_weights_and_lambda() -> None:
    base, xs = grid(2, 31)
    got = merge_tensors(
        xs, "ties_global", base=base, density=1, weight=[2, -1], merge_func="sum", lambda_=0.5
    )
    masks = [torch.ones(31, dtype=torch.bool)] * 2
    assert_task_vectors(
        got, base, xs, [2, -1], masks, elect=True, normalize=False, rescale=False, lam=0.5
    )


# ---- what all of them share ------------------------------------------------------------------

ALL = (
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties",
    "della", "della_linear", "magnitude_prune", "sce", "ram", "ramplus_tl", "ties_global",
)  # fmt: skip


def usual(method: str) -> dict[str, Any]:
    given = {"weight": 0.7, "density": 0.4, "select_topk": 0.4}
    return {p.name: given[p.name] for p in mk.methods()[method].parameters if p.name in given}


@pytest.mark.parametrize("method", ALL)
def test_strides_change_nothing_and_inputs_are_not_changed(method: str) -> None:
    base, xs = family(3, 20, 4, 3, 3)
    options = {"base": base, "seed": 2, **usual(method)}
    want = merge_tensors(xs, method, **options)
    strided = [xs[0].transpose(0, -1).contiguous().transpose(0, -1), xs[1].clone(), xs[2]]
    before = [x.clone() for x in (base, *strided)]
    assert_bits_equal(merge_tensors(strided, method, **options), want)
    for x, y in zip((base, *strided), before, strict=True):
        assert_bits_equal(x, y)


@pytest.mark.parametrize("method", ALL)
def test_backends_agree(method: str) -> None:
    base, xs = family(3, 31, 17)
    served = [
        merge_tensors(xs, method, base=base, backend=b, **usual(method)) for b in ("torch", "auto")
    ]
    assert_bits_equal(*served)


@pytest.mark.parametrize(
    ("method", "host"),
    [(m, h) for m in ALL for h in ("mergekit", "peft", "sd_mecha", "fusion_bench", "knots", "x")],
)
def test_hosts_are_those_with_a_parity_sentence(method: str, host: str) -> None:
    base, xs = family(2, 8)
    if host in mk.methods()[method].parity:
        assert merge_tensors(xs, method, base=base, host=host, **usual(method)).shape == (8,)
    else:
        with refused(method, f"'{host}'", sentence=False):
            merge_tensors(xs, method, base=base, host=host, **usual(method))


# ---- hosts' rules, by definition -------------------------------------------------------------


def test_a_mask_of_a_host_multiplies() -> None:
    """What is dropped is delta * 0, NaN for a NaN or an infinity; here it is gone."""
    base = torch.zeros(4)
    x = torch.tensor([-1.0, 4.0, INF, NAN])
    options: dict[str, Any] = {"base": base, "weight": 1, "density": 0.25, "gamma": 0.5}
    ours = merge_tensors([x], "breadcrumbs", **options)
    theirs = merge_tensors([x], "breadcrumbs", host="mergekit", **options)
    assert_bits_equal(ours, torch.tensor([0.0, 4.0, 0.0, 0.0]))
    assert_bits_equal(theirs, torch.tensor([0.0, 4.0, NAN, NAN]))


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("n", range(1, 5))
def test_ties_of_sd_mecha(n: int, density: float) -> None:
    base, xs = grid(n, 41)
    deltas = torch.stack([(x - base).double() for x in xs])
    kept = []
    for d in deltas:
        least = d.abs().sort().values[max(int((1 - density) * 41), 1) - 1]
        kept.append(d * (d.abs() >= least))
    tv = torch.stack(kept)
    sign = tv.sign().sum(0).sign()
    agree = (tv.sign() == sign) & (sign != 0)
    oracle = base.double() + (tv * agree).sum(0) / agree.sum(0).clamp(min=1)
    got = merge_tensors(xs, "ties", base=base, weight=1, density=density, host="sd_mecha")
    assert_within(got, oracle, half_ulp(oracle, torch.float32) + 4 * U)


def test_draws_are_those_of_the_rule_itself() -> None:
    """The oracle's generator against the op, over more than one block."""
    rule = Bernoulli(0.5, 1, "w", 2)
    got = mk.merge_deltas(None, [torch.ones(1000)], [1.0], keep=[rule])
    assert torch.equal(got != 0, draws(rule, 1000) < rule.limit)


def test_every_model_may_have_its_own_density() -> None:
    base, xs = family(2, 300)
    for method, other in itertools.product(("ties", "breadcrumbs", "magnitude_prune"), (0.0, 0.6)):
        both = merge_tensors(xs, method, base=base, weight=[1, 0], density=[0.3, other])
        alone = merge_tensors(xs[:1], method, base=base, weight=1, density=0.3)
        assert torch.equal(both, alone)
