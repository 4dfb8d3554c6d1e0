"""mergekit's task-vector methods: the same bits with host="mergekit", and without it never worse.

Each test of bits seeds torch's generator alike before both sides. mergekit sorts with an unstable
sort, so trims are compared where no magnitudes tie at the cut, and where they do by what is kept.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.check import name_of

from accuracy import assert_bits_equal, half_ulp
from methods.oracle import (
    band_mask,
    drawn_mask,
    magnitude_mask,
    magprune_mask,
    ram_oracle,
    sce_oracle,
    task_vector_oracle,
    variance_mask,
)
from required import peer

api = peer("mergekit.merge_methods.api", "mergekit")
sparsify = peer("mergekit.sparsify", "mergekit")
host_sce = peer("mergekit.merge_methods.sce", "mergekit")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WEIGHTS = ([0.7], [0.7, -0.4], [0.7, -0.4, 0.55], [0.31, 0.9, -0.4, 1.3])
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "task_arithmetic": [{}],
    "ties": [{"density": 0.3}, {"density": 0.77}, {"density": 1.0}],
    "dare_linear": [{"density": 0.3}, {"density": 0.8}, {"density": 0.0}, {"density": 1.0}],
    "dare_ties": [{"density": 0.3}, {"density": 0.8}],
    "breadcrumbs": [{"density": 0.3}, {"density": 0.5, "gamma": 0.1}, {"density": 0.9}],
    "breadcrumbs_ties": [{"density": 0.3, "gamma": 0.05}, {"density": 0.4, "gamma": 0.0}],
    "della": [{"density": 0.5, "epsilon": 0.2}, {"density": 0.7}, {"density": 1.0}],
    "della_linear": [{"density": 0.3, "epsilon": 0.1}, {"density": 0.8}],
}
TRIMS = ("ties", "breadcrumbs", "breadcrumbs_ties")
SHAPES: dict[str, tuple[int, ...]] = {
    "random": (40, 131),
    "threads": (300, 257),  # torch sums with several threads
    "conv": (9, 7, 3, 3),
    "vector": (301,),
    "zeros": (20, 31),
    "ties": (20, 31),
    "nan": (40, 31),
    "infinite": (40, 31),
    "one": (1,),
    "depthwise": (37, 1, 3, 3),
    "scalar": (),
    "empty": (0, 7),
}
NOT_THERE = ("one", "depthwise", "scalar")  # where mergekit's DELLA raises


def family(kind: str, dtype: torch.dtype, n: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base as weights are, and n models whose task vectors are half its size."""
    g = torch.Generator().manual_seed(zlib.crc32(kind.encode()) + 10 * seed + n)
    shape = SHAPES[kind]

    def normal() -> Tensor:
        return torch.randn(shape, generator=g)

    base = 0.02 * normal()
    xs = [base + 0.01 * normal() for _ in range(n)]
    if kind == "ties":
        base, *xs = (torch.randint(-6, 7, shape, generator=g) / 8 for _ in range(n + 1))
    if kind == "zeros":  # of both signs; half of every task vector
        base = base * torch.randint(-1, 2, shape, generator=g)
        xs = [torch.where(torch.rand(shape, generator=g) < 0.5, base, x) for x in xs]
    if kind in ("nan", "infinite"):
        special = [math.nan] * 3 if kind == "nan" else [math.inf, -math.inf, math.inf]
        for x in xs:
            places = torch.randperm(x.numel(), generator=g)[:3]
            x.view(-1)[places] = torch.tensor(special)
            x.view(-1)[:2] = torch.tensor(special[:2])  # of several models at once
    return base.to(dtype), [x.to(dtype) for x in xs]


def theirs(base: Tensor, xs: list[Tensor], method: str, **parameters: Any) -> Tensor:
    torch.manual_seed(5)
    return api.merge_tensors([base, *xs], method, parameters=parameters, base_index=0)


def ours(base: Tensor, xs: list[Tensor], method: str, **parameters: Any) -> Tensor:
    torch.manual_seed(5)
    return mk.merge_tensors(xs, method, base=base, host="mergekit", **parameters)


def cuts(method: str, setting: dict[str, Any], n: int) -> list[int]:
    """The ranks between which a trim divides sorted magnitudes, largest first."""
    density = setting["density"]
    if density >= 1 or not n:
        return []
    if method == "ties":
        return [max(1, int(density * n))]
    target = int(density * n)
    outliers = min(int(setting.get("gamma", 0.01) * n), n - target)
    return [outliers, outliers + target]


def undecided(base: Tensor, x: Tensor, method: str, setting: dict[str, Any]) -> bool:
    """Whether equal magnitudes lie on both sides of a cut, so that mergekit's choice is open."""
    sizes = (x - base).abs().flatten().float().sort(descending=True).values  # NaN first
    if int(sizes.isnan().sum()) > 0:
        sizes = sizes.nan_to_num(nan=math.inf)
    inner = [c for c in cuts(method, setting, len(sizes)) if 0 < c < len(sizes)]
    return any(bool(sizes[c - 1] == sizes[c]) for c in inner)


def decided(
    kind: str, dtype: torch.dtype, n: int, method: str, setting: dict[str, Any]
) -> tuple[Tensor, list[Tensor]] | None:
    """A family without such ties; 16-bit magnitudes need few elements or some luck."""
    for seed in range(200):
        base, xs = family(kind, dtype, n, seed)
        if method not in TRIMS:
            return base, xs
        if dtype != torch.float32 and base.numel() > 100:
            base, xs = base.flatten()[:63], [x.flatten()[:63] for x in xs]
        if not any(undecided(base, x, method, setting) for x in xs):
            return base, xs
    return None


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("method", SETTINGS)
def test_bits(method: str, dtype: torch.dtype, kind: str) -> None:
    compared = 0
    for n, setting, rescale, normalize, lam in itertools.product(
        range(1, 5), SETTINGS[method], (False, True), (False, True), (1.0, 0.8)
    ):
        drawn = method.startswith("della") and setting["density"] < 1
        if kind == "threads" and (n != 3 or lam != 1 or normalize):
            continue
        found = decided(kind, dtype, n, method, setting)
        if found is None:
            continue
        base, xs = found
        options = {"weight": WEIGHTS[n - 1], "rescale": rescale, "normalize": normalize} | setting
        if drawn and kind in NOT_THERE:
            with pytest.raises((RuntimeError, IndexError)):
                theirs(base, xs, method, **options, **{"lambda": lam})
            got = ours(base, xs, method, lambda_=lam, **options)
            assert got.shape == base.shape
            assert got.isfinite().all()
        else:
            other = theirs(base, xs, method, **options, **{"lambda": lam})
            assert_bits_equal(ours(base, xs, method, lambda_=lam, **options), other)
        compared += 1
    # Where half of all task vectors is 0, or takes seven values, every cut may lie among equals.
    assert compared or (method in TRIMS and kind in ("ties", "zeros"))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("method", ["dare_linear", "della", "ties"])
def test_bits_of_five_models(method: str, dtype: torch.dtype) -> None:
    """16-bit types: the same bits. float32: torch may sum in another order, four roundings."""
    setting = SETTINGS[method][0]
    found = decided("vector", dtype, 5, method, setting)
    assert found is not None
    base, xs = found
    weights = [0.31, 0.9, -0.4, 1.3, 0.2]
    options = {"weight": weights, "normalize": False, "rescale": False, **setting}
    mine, other = (side(base, xs, method, **options) for side in (ours, theirs))
    if dtype != torch.float32:
        assert_bits_equal(mine, other)
        return
    size = sum(abs(w) * (x - base).abs().double() for w, x in zip(weights, xs, strict=True))
    off = (mine.double() - other.double()).abs()
    assert bool((off <= 10 * UNIT[dtype] * (size + base.abs().double())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ["ties", "zeros", "random"])
@pytest.mark.parametrize("method", TRIMS)
def test_what_is_kept_among_ties(method: str, kind: str, dtype: torch.dtype) -> None:
    """As many, the same above and below the cuts, and any choice among those equal to a cut."""
    for setting in SETTINGS[method]:
        base, (x,) = family(kind, dtype, 1)
        options = {"weight": [1.0], "rescale": False, "normalize": False, **setting}
        delta = x - base
        zero = torch.zeros_like(base)
        mine, other = (side(zero, [delta], method, **options) for side in (ours, theirs))
        sizes = delta.abs().flatten().float()
        ordered = sizes.sort(descending=True).values
        at_cut = torch.zeros(sizes.shape, dtype=torch.bool)
        for c in cuts(method, setting, len(sizes)):
            if 0 < c < len(sizes) and ordered[c - 1] == ordered[c]:
                at_cut |= sizes == ordered[c]
        at_cut = at_cut.reshape(delta.shape)
        assert_bits_equal(mine[~at_cut], other[~at_cut])
        for value in sizes.reshape(delta.shape)[at_cut].unique():
            ties = at_cut & (delta.abs().float() == value)
            kept = [int((side[ties] != 0).sum()) for side in (mine, other)]
            assert kept[0] == kept[1]


# ---- without a host: never further from float64 ----------------------------------------------

# Error of every element, which of them count, and the least error that a result surely has.
Side = tuple[Tensor, Tensor, Tensor]


def side_of(got: Tensor, exact: Tensor, clear: Tensor) -> Side:
    return (got.double() - exact).abs(), clear & exact.isfinite(), half_ulp(exact, got.dtype)


def masks_of(
    base: Tensor, xs: list[Tensor], method: str, setting: dict[str, Any]
) -> Iterator[Tensor]:
    """What we keep."""
    d = setting.get("density", 1.0)
    for i, x in enumerate(xs):
        if d >= 1:
            yield torch.ones(x.shape, dtype=torch.bool)
        elif method == "ties":
            yield magnitude_mask(base, x, d)
        elif method.startswith("bread"):
            yield band_mask(base, x, d, setting.get("gamma", 0.01))
        elif method.startswith("dare"):
            yield drawn_mask(x, d, 3, "w", i)
        else:
            yield magprune_mask(base, x, d, setting.get("epsilon", 0.15), 3, "w", i)


def host_masks_of(
    base: Tensor, xs: list[Tensor], method: str, setting: dict[str, Any]
) -> Iterator[Tensor]:
    """What mergekit keeps, by its own functions."""
    rule = {"ties": "magnitude", "dare": "random", "brea": "magnitude_outliers"}
    rule |= {"dell": "della_magprune"}
    torch.manual_seed(5)
    for x in xs:
        if method == "task_arithmetic":
            yield torch.ones(x.shape, dtype=torch.bool)
            continue
        kept = sparsify.sparsify(
            x - base,
            setting["density"],
            sparsify.SparsificationMethod(rule[method[:4]]),
            gamma=setting.get("gamma", 0.01),
            epsilon=setting.get("epsilon", 0.15),
        )
        yield kept != 0


def error_of(
    got: Tensor,
    base: Tensor,
    xs: list[Tensor],
    weights: list[float],
    masks: Iterator[Tensor],
    unit: float,
    **options: Any,
) -> Side:
    """Left out are votes within the rounding of their sum, where the sign may turn."""
    kept = list(masks)
    exact = task_vector_oracle(base, xs, weights, kept, **options)
    terms = torch.stack(
        [w * (x.double() - base.double()) * m for w, x, m in zip(weights, xs, kept, strict=True)]
    )
    clear = exact.isfinite()
    if options["elect"]:
        size = terms.abs().sum(0)
        clear &= (terms.sum(0).abs() > 24 * unit * size) | (size == 0)
    return side_of(got, exact, clear)


def assert_no_worse(pairs: list[tuple[Side, Side]], what: str, *, units: float = 0.0) -> None:
    """Over all settings of one case, the largest error of ours and of mergekit's.

    An element of ours within half a unit in the last place of the exact result is as close as its
    type allows, and does not count. units: how many of these half units ours may be behind.
    """
    errors, half = [], 0.0
    for ours, sides in zip((True, False), zip(*pairs, strict=True), strict=True):
        offs = []
        for error, clear, least in sides:
            off, least = error[clear], least[clear]
            assert not off.isnan().any()
            half = max(half, float(least.max()) if len(off) else 0.0)
            offs.append(off[off > least] if ours else off.reshape(-1))
        off = torch.cat(offs)
        errors.append(float(off.max()) if len(off) else 0.0)
    print(f"{what}: max error {errors[0]:.3e}, mergekit {errors[1]:.3e}")
    assert errors[0] <= errors[1] + units * half


DEFAULT_KINDS = ("random", "ties", "zeros", "nan", "one", "depthwise", "scalar", "empty")


@pytest.mark.parametrize("kind", DEFAULT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("method", SETTINGS)
def test_task_vectors_are_no_worse(method: str, dtype: torch.dtype, kind: str) -> None:
    pairs = []
    for n, setting, seed in itertools.product((1, 3), SETTINGS[method], range(4)):
        base, xs = family(kind, dtype, n, seed)
        spec = mk.methods()[method]
        options = {k: spec.parameter(k).default for k in ("normalize", "rescale")}
        elect = spec.name.endswith("ties") or method == "della"
        weights = WEIGHTS[n - 1]
        call = {"weight": weights, **setting}
        mine = mk.merge_tensors(xs, method, base=base, seed=3, name="w", **call)
        kept = masks_of(base, xs, method, setting)
        side = error_of(
            mine, base, xs, weights, kept, UNIT[torch.float32], elect=elect, lam=1.0, **options
        )
        assert not side[0][side[1]].isnan().any()
        if method.startswith("della") and kind in NOT_THERE and setting["density"] < 1:
            with pytest.raises((RuntimeError, IndexError)):
                theirs(base, xs, method, **call)
            continue
        other = theirs(base, xs, method, **call)
        if kind == "nan" and options["rescale"]:
            # mergekit loses all elements to a norm of NaN.
            assert setting["density"] >= 1 or other.isnan().all()
            continue
        kept = host_masks_of(base, xs, method, setting)
        theirs_ = error_of(
            other, base, xs, weights, kept, UNIT[dtype], elect=elect, lam=1.0, **options
        )
        pairs.append((side, theirs_))
    if pairs:
        # Drawn masks keep other elements in mergekit: of few, ours may round another way.
        units = 2.0 if method.startswith(("dare", "della")) else 0.0
        assert_no_worse(pairs, f"{method} {name_of(dtype)} {kind}", units=units)


def sce_pair(base: Tensor, xs: list[Tensor], topk: float) -> tuple[Side, Side]:
    mine = mk.merge_tensors(xs, "sce", base=base, select_topk=topk)
    other = theirs(base, xs, "sce", select_topk=topk)
    tv = torch.stack([x - base for x in xs])
    chosen = host_sce.sce_mask(tv, topk, torch.float32).bool()
    masks = (ours_of_sce(base, xs, topk), chosen)
    sides = []
    for got, mask, unit in zip((mine, other), masks, (2.0**-24, UNIT[base.dtype]), strict=True):
        kept = torch.where(mask, torch.stack([x.double() - base.double() for x in xs]), 0.0)
        size = kept.abs().sum(0)
        clear = (kept.sum(0).abs() > 24 * unit * size) | (size == 0)
        exact = sce_oracle(base, xs, mask)
        sides.append(side_of(got, exact, clear))
    return sides[0], sides[1]


def ours_of_sce(base: Tensor, xs: list[Tensor], topk: float) -> Tensor:
    """Our selection: that of the op, whose own tests compare it with float64."""
    mask = mk.variance_mask(xs, topk, base=base).mask
    if mask is None:
        return variance_mask(base, xs, 1.0)
    ones = mk.merge_deltas(None, [torch.ones(base.shape)], [1.0], keep=[mask])
    return ones != 0


def ram_pair(
    base: Tensor, xs: list[Tensor], method: str, r: float | None, alpha: float
) -> tuple[Side, Side]:
    exact, _ = ram_oracle(base, xs, 1e-5, r, alpha)
    given = {} if r is None else {"r": r, "alpha": alpha}
    mine = mk.merge_tensors(xs, method, base=base, **given)
    other = theirs(base, xs, method, **given)
    # Models that drop a NaN lose it in mergekit's count of what they share.
    clear = exact.isfinite()
    return side_of(mine, exact, clear), side_of(other, exact, clear)


OTHERS: dict[str, Callable[[Tensor, list[Tensor]], tuple[Side, Side]]] = {
    "sce": lambda base, xs: sce_pair(base, xs, 1.0),
    "sce half": lambda base, xs: sce_pair(base, xs, 0.5),
    "ram": lambda base, xs: ram_pair(base, xs, "ram", None, 0.0),
    "ramplus_tl": lambda base, xs: ram_pair(base, xs, "ramplus_tl", 0.7, 0.4),
}


@pytest.mark.parametrize("kind", DEFAULT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.filterwarnings("ignore:var\\(\\)")  # torch's, in mergekit, on empty tensors
def test_others_are_no_worse(method: str, dtype: torch.dtype, kind: str) -> None:
    families = [family(kind, dtype, n, seed) for n in (1, 3) for seed in range(4)]
    if kind == "nan" and method.startswith("sce"):
        for base, xs in families:
            assert mk.merge_tensors(xs, "sce", base=base).isnan().all()
            assert theirs(base, xs, "sce").isnan().all()
        return
    # The weights of SCE are reductions: theirs and ours differ in the last bit, either way.
    units = 1.0 if method.startswith("sce") else 0.0
    pairs = [OTHERS[method](*f) for f in families]
    assert_no_worse(pairs, f"{method} {name_of(dtype)} {kind}", units=units)


@pytest.mark.parametrize("kind", DEFAULT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linear_and_slerp_are_no_worse(dtype: torch.dtype, kind: str) -> None:
    pairs: dict[str, list[tuple[Side, Side]]] = {"linear": [], "slerp": []}
    for seed in range(6):
        base, xs = family(kind, dtype, 2, seed)
        weights = [0.3, 0.9]
        wide = [x.double() for x in xs]
        exact = (0.3 * wide[0] + 0.9 * wide[1]) / (0.3 + 0.9)
        mine = mk.merge_tensors(xs, "linear", weight=weights)
        other = api.merge_tensors(xs, "linear", parameters={"weight": weights})
        clear = exact.isfinite()
        pairs["linear"].append((side_of(mine, exact, clear), side_of(other, exact, clear)))
        if kind in ("nan", "empty"):
            continue
        v, u = base.double().reshape(-1), wide[0].reshape(-1)
        norms = [float(y.norm()) if float(y.norm()) > 1e-8 else 1.0 for y in (v, u)]
        cosine = max(-1.0, min(1.0, float(v @ u) / (norms[0] * norms[1])))
        if abs(abs(cosine) - 0.9995) < 1e-5:
            continue
        c, d = 0.75, 0.25
        if abs(cosine) <= 0.9995:
            angle = math.acos(cosine)
            c, d = (math.sin(s * angle) / math.sin(angle) for s in (0.75, 0.25))
        exact = c * base.double() + d * wide[0]
        mine = mk.merge_tensors([base, xs[0]], "slerp", t=0.25)
        other = api.merge_tensors([base, xs[0]], "slerp", parameters={"t": 0.25}, base_index=0)
        clear = exact.isfinite()
        pairs["slerp"].append((side_of(mine, exact, clear), side_of(other, exact, clear)))
    for method, measured in pairs.items():
        if not measured:
            continue
        assert_no_worse(measured, f"{method} {name_of(dtype)} {kind}")
