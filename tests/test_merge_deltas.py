"""merge_deltas: trims, draws and elections, the same bits on every backend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import Band, Bernoulli, Mask, Threshold, reference
from mergekern.check import accumulator, name_of
from mergekern.keep import Keep, Recipe, above

import cases
import elementwise
from accuracy import assert_backend_bits, assert_bits_equal, assert_within, half_ulp
from cases import CATALOGUE, CHUNK, Case, values
from refusal import refused
from serving import affordable

OP = "merge_deltas"
NAN, INF = math.nan, math.inf


# ---- the specified arithmetic ----------------------------------------------------------------


def factors_of(
    base: Tensor | None,
    xs: list[Tensor],
    keep: list[Keep],
    rescale: Any,
    stepwise: bool = False,
) -> list[float]:
    if rescale == "density":
        limits = [k.limit if isinstance(k, Bernoulli) else 65536 for k in keep]
        return [1 / ((limit or 65536) / 65536) for limit in limits]
    if rescale == "l1":
        norms = reference.l1_norms(base, xs, keep, stepwise)

        def hold(values: Any) -> Any:
            """Tools that compute in the dtype of the tensors hold their norms in it too."""
            return torch.tensor(values, dtype=torch.float64).to(xs[0].dtype).tolist()

        if stepwise:
            norms = [tuple(pair) for pair in hold(norms)]
        ratios = [a / b if 1e-7 <= a < INF and b >= 1e-7 else 1.0 for a, b in norms]
        if stepwise:
            ratios = hold(ratios)
        return [float(np.float32(r)) for r in ratios]
    return [1.0] * len(xs) if rescale is None else list(rescale)


def specified(
    base: Tensor | None,
    xs: Sequence[Tensor],
    weights: Sequence[float],
    *,
    keep: Sequence[Keep] | None = None,
    rescale: Any = None,
    divide: bool = False,
    elect: str | None = None,
    zero: str = "positive",
    weigh: str = "before",
    combine: str = "sum",
    alone: list[float] | None = None,
    normalize: bool | str = False,
    floor: float = 0.0,
    scale: float = 1.0,
    rounding: str = "once",
    dtype: torch.dtype | None = None,
    acc: torch.dtype | None = None,
) -> Tensor:
    """What csrc/merge_deltas.h promises, step by step in `acc` (the accumulator if None)."""
    xs, base = [x.cpu() for x in xs], None if base is None else base.cpu()
    n, stepwise, weights = len(xs), rounding == "host", [float(w) for w in weights]
    if stepwise:
        weights = torch.tensor(weights, dtype=xs[0].dtype).tolist()
    rules: list[Keep] = [None] * n if keep is None else list(keep)
    out = torch.empty(xs[0].shape, dtype=dtype or xs[0].dtype)
    factors = factors_of(base, xs, rules, rescale, stepwise)
    if elect is None and (combine == "max" or normalize == "count"):
        elect = "present"
    ones = [1.0] * n
    before, after = (ones, weights) if elect and weigh == "after" else (weights, ones)
    if not stepwise:
        before = [b / f if divide else b * f for b, f in zip(before, factors, strict=True)]
    total = float(torch.tensor(weights, dtype=xs[0].dtype).sum()) if stepwise else sum(weights)
    recipe = Recipe(
        keep=rules,
        before=before,
        after=after,
        weights=ones if normalize == "count" else weights,
        alone=alone or [],
        rescale=factors,
        elect=elect or "everyone",
        zero=zero,
        combine=combine,
        normalize=bool(normalize),
        stepwise=stepwise,
        divide=divide,
        total=total if abs(total) >= 1e-8 else 1.0,
        least=floor,
        instead=floor or 1.0,
        scale=scale,
    )
    reference.merge_deltas(out, base, xs, recipe, acc=acc or accumulator(xs[0].dtype))
    return out


# ---- the recipes of the methods, as options --------------------------------------------------


def trims(xs: list[Tensor], base: Tensor | None, share: float = 0.2) -> list[Keep]:
    if not xs[0].numel():
        return [None] * len(xs)
    k = max(1, int(share * xs[0].numel()))
    origin = None if base is None else base.cpu()
    found = reference.kth_magnitude([x.cpu() for x in xs], origin, [[k]] * len(xs))
    return [Threshold(*one) for (one,) in found]


def bands(xs: list[Tensor], base: Tensor | None) -> list[Keep]:
    """The largest 70 % without the largest 20 %."""
    pairs = zip(trims(xs, base, 0.7), trims(xs, base, 0.2))
    return [None if most is None else Band(least, most) for least, most in pairs]


def masks(xs: list[Tensor], density: float = 0.4) -> list[Keep]:
    generator = torch.Generator().manual_seed(xs[0].numel())
    drawn = [torch.rand(x.numel(), generator=generator) < density for x in xs]
    packed = [torch.from_numpy(np.packbits(d.numpy())) for d in drawn]
    return [Mask(bits.to(xs[0].device)) for bits in packed]


def draws(xs: list[Tensor], density: float = 0.3) -> list[Keep]:
    return [Bernoulli(density, seed=7, name="layer.weight", model=i) for i in range(len(xs))]


def alternating(xs: list[Tensor], base: Tensor | None) -> list[Keep]:
    """None, a Threshold, a Bernoulli, None, ..."""
    rules = zip([None] * len(xs), trims(xs, base), draws(xs))
    return [rule[i % 3] for i, rule in enumerate(rules)]


RECIPES: dict[str, Callable[[list[Tensor], Tensor | None], dict[str, Any]]] = {
    "arithmetic": lambda xs, base: {"scale": 0.7},
    "normalized": lambda xs, base: {"normalize": True},
    "elect sum": lambda xs, base: {"elect": "sum"},
    "elect count": lambda xs, base: {"elect": "count", "normalize": True},
    "ties": lambda xs, base: {"keep": trims(xs, base), "elect": "sum", "normalize": True},
    "trim l1": lambda xs, base: {"keep": trims(xs, base), "rescale": "l1", "scale": 1.3},
    "dare": lambda xs, base: {"keep": draws(xs), "rescale": "density"},
    "dare ties": lambda xs, base: {
        "keep": draws(xs, 0.6),
        "rescale": "l1",
        "elect": "count",
        "scale": -0.5,
    },
    "alternating": lambda xs, base: {"keep": alternating(xs, base), "elect": "sum"},
    "breadcrumbs": lambda xs, base: {"keep": bands(xs, base), "elect": "sum"},
    "masks": lambda xs, base: {"keep": masks(xs), "rescale": [1.5] * len(xs)},
    "masked ties": lambda xs, base: {"keep": masks(xs), "elect": "sum", "normalize": True},
    "sce": lambda xs, base: {
        "keep": masks(xs),
        "elect": "sum",
        "weigh": "after",
        "normalize": True,
        "floor": 1e-6,
    },
    "peft": lambda xs, base: {
        "keep": trims(xs, base),
        "elect": "sum",
        "weigh": "after",
        "normalize": "count",
    },
    "peft frequency": lambda xs, base: {"elect": "count", "weigh": "after", "normalize": "count"},
    "ram": lambda xs, base: {"keep": [above(0.5)] * len(xs), "normalize": "count"},
    "ram plus": lambda xs, base: {
        "keep": [above(0.5)] * len(xs),
        "normalize": "count",
        "alone": [1.0 + 0.25 * i for i in range(len(xs))],
    },
    "magmax": lambda xs, base: {"combine": "max", "scale": 0.5},
    "elected max": lambda xs, base: {"keep": trims(xs, base), "elect": "sum", "combine": "max"},
    "tie negative": lambda xs, base: {"elect": "count", "zero": "negative"},
    "tie none": lambda xs, base: {"elect": "sum", "zero": "none", "normalize": "count"},
    "tie sum negative": lambda xs, base: {"elect": "sum", "zero": "negative"},
    "host ties": lambda xs, base: {
        "elect": "sum",
        "normalize": True,
        "scale": 0.7,
        "rounding": "host",
    },
    "host dare": lambda xs, base: {"keep": masks(xs), "rescale": "l1", "rounding": "host"},
    "host trim": lambda xs, base: {"keep": trims(xs, base), "elect": "sum", "rounding": "host"},
    "host quotient": lambda xs, base: {
        "keep": masks(xs),
        "rescale": [0.3 + 0.1 * i for i in range(len(xs))],
        "divide": True,
        "rounding": "host",
    },
    "quotient": lambda xs, base: {"rescale": [0.3] * len(xs), "divide": True},
    "host normalized": lambda xs, base: {"normalize": True, "scale": 1.25, "rounding": "host"},
    "host after": lambda xs, base: {
        "elect": "count",
        "weigh": "after",
        "normalize": "count",
        "rounding": "host",
    },
}


def base_of(case: Case, device: str) -> Tensor:
    return dataclasses.replace(case, n=1).tensors(device, seed=9)[0]


# ---- bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CATALOGUE, ids=str)
def test_bits_of_the_specified_arithmetic(case: Case, backend: str, device: str) -> None:
    base, xs, weights = base_of(case, device), case.tensors(device), case.weights()
    options = RECIPES["ties"](xs, base)
    got = mk.merge_deltas(base, xs, weights, backend=backend, **options)
    assert_backend_bits(got, specified(base, xs, weights, **options), backend)


@pytest.mark.parametrize("based", [True, False], ids=["base", "deltas"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", cases.VALUES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_bits_of_every_recipe(
    dtype: torch.dtype, kind: str, recipe: str, based: bool, backend: str, device: str
) -> None:
    case = Case(shape=(19, 9), dtype=dtype, values=kind, n=4)
    base = base_of(case, device) if based else None
    xs, weights = case.tensors(device), case.weights()
    options = RECIPES[recipe](xs, base)
    got = mk.merge_deltas(base, xs, weights, backend=backend, **options)
    assert_backend_bits(got, specified(base, xs, weights, **options), backend)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 8, 9, 17])
@pytest.mark.parametrize("recipe", [*RECIPES, "ties of whole tensors"])
def test_bits_of_every_number_of_models(recipe: str, n: int, backend: str, device: str) -> None:
    """Few models have paths of their own in the C++ kernel; cuts fall inside blocks."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = Case(shape=(600,), dtype=dtype, values="ties", n=n)
        base, xs, weights = base_of(case, device), case.tensors(device), case.weights()
        if recipe == "ties of whole tensors":
            options: dict[str, Any] = {"elect": "sum", "normalize": True, "scale": 0.4}
        else:
            options = RECIPES[recipe](xs, base)
        got = mk.merge_deltas(base, xs, weights, backend=backend, **options)
        assert_backend_bits(got, specified(base, xs, weights, **options), backend)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("recipe", ["dare", "trim l1", "alternating"])
def test_bits_of_layouts(recipe: str, layout: str, backend: str, device: str) -> None:
    case = Case(shape=(9, 11, 13), dtype=torch.bfloat16, layout=layout)
    base, xs, weights = base_of(case, device), case.tensors(device), case.weights()
    options = RECIPES[recipe](xs, base)
    expected = specified(base, xs, weights, **options)
    for origin in (base, base.contiguous()):
        got = mk.merge_deltas(origin, xs, weights, backend=backend, **options)
        assert_backend_bits(got, expected, backend)


@pytest.mark.parametrize("to", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_bits_of_another_result_dtype(
    dtype: torch.dtype, to: torch.dtype, backend: str, device: str
) -> None:
    case = Case(shape=(513,), dtype=dtype, values="mixed")
    base, xs, weights = base_of(case, device), case.tensors(device), case.weights()
    got = mk.merge_deltas(base, xs, weights, out_dtype=to, backend=backend)
    assert_backend_bits(got, specified(base, xs, weights, dtype=to), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_bits_across_chunks(dtype: torch.dtype, backend: str, device: str) -> None:
    """Ties are kept up to an index in the second chunk."""
    case = Case(shape=(CHUNK + 1003,), n=2, dtype=dtype, values="ties")
    xs, weights = case.tensors(device), [0.3, 0.9]
    rules = [Threshold(1.5, 0, 0, CHUNK + 77), Threshold(1.0, 0, 0, CHUNK - 5)]
    got = mk.merge_deltas(None, xs, weights, keep=rules, elect="sum", backend=backend)
    expected = specified(None, xs, weights, keep=rules, elect="sum")
    assert_backend_bits(got, expected, backend)


@pytest.mark.parametrize("recipe", ["dare", "ties", "alternating"])
def test_bits_do_not_depend_on_the_split(
    recipe: str, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges that begin anywhere, as shards do."""
    case = Case(shape=(1500,))
    base, xs, weights = base_of(case, "cpu"), case.tensors(), case.weights()
    options = RECIPES[recipe](xs, base)
    whole = mk.merge_deltas(base, xs, weights, backend="cpu", **options)

    def odd_ranges(kernel: Callable[[int, int], object], total: int, *_: int) -> None:
        borders = [0, 3, 11, 12, 525, 1031, total]
        for begin, end in zip(borders[-2::-1], borders[:0:-1]):
            kernel(begin, end)

    monkeypatch.setattr(cpu_backend, "chunks", odd_ranges)
    got = mk.merge_deltas(base, xs, weights, backend="cpu", **options)
    assert_bits_equal(got, whole)


@pytest.mark.parametrize("chunk", [1, 7, 8, 100])
def test_bits_do_not_depend_on_the_chunk_of_torch(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(shape=(5, 61))
    base, xs, weights = base_of(case, "cpu"), case.tensors(), case.weights()
    options = RECIPES["alternating"](xs, base)
    monkeypatch.setattr("mergekern.backends.torch.chunks.CHUNK", chunk)
    got = mk.merge_deltas(base, xs, weights, backend="torch", **options)
    assert_bits_equal(got, specified(base, xs, weights, **options))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(
    threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(shape=(affordable(backend, 2 * CHUNK + 17),), n=2, values="mixed")
    base, xs = base_of(case, device), case.tensors(device)
    options: dict[str, Any] = {"keep": draws(xs), "elect": "sum", "rescale": "l1"}
    monkeypatch.setenv("MERGEKERN_THREADS", "1")
    once = mk.merge_deltas(base, xs, [0.4, 0.7], backend=backend, **options)
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    assert_bits_equal(mk.merge_deltas(base, xs, [0.4, 0.7], backend=backend, **options), once)


@pytest.mark.parametrize("kind", ["normal", "tiny", "ties"])
@pytest.mark.parametrize("dtype", [d for d in cases.DTYPES if d != torch.float64], ids=name_of)
def test_error_without_election(dtype: torch.dtype, kind: str, backend: str, device: str) -> None:
    """Against float64. A term meets n + 7 roundings: its difference, weight, product, n - 1 sums;
    total and quotient; scale and its product; then the base is added and the result stored."""
    case = Case(shape=(257,), n=5, dtype=dtype, values=kind)
    base, xs, weights = base_of(case, device), case.tensors(device), case.weights()
    got = mk.merge_deltas(base, xs, weights, normalize=True, scale=0.3, backend=backend)
    wide = torch.float64
    oracle = specified(base, xs, weights, normalize=True, scale=0.3, dtype=wide, acc=wide)
    terms = [(x.cpu().to(wide) - base.cpu().to(wide)).abs() * abs(w) for x, w in zip(xs, weights)]
    size = 0.3 * sum(terms) / abs(sum(weights))
    info = torch.finfo(torch.float32)
    least = info.smallest_normal * info.eps
    error = (case.n + 7) * info.eps / 2 * size + (case.n + 3) * least
    error = 1.0001 * (error + info.eps / 2 * oracle.abs())
    unit = half_ulp(oracle.abs() + error, dtype)
    assert_within(got, oracle, error + unit)


def test_float64_is_rounded_once(backend: str, device: str) -> None:
    """1 + 2**-8 + 2**-40 becomes 1 by way of float32."""
    base = torch.ones(3, dtype=torch.float64, device=device)
    x = base + 2.0**-8 + 2.0**-40
    got = mk.merge_deltas(base, [x], [1.0], out_dtype=torch.bfloat16, backend=backend)
    assert_backend_bits(got, torch.full((3,), 1 + 2.0**-7, dtype=torch.bfloat16), backend)


# ---- TIES ------------------------------------------------------------------------------------


@pytest.mark.parametrize("based", [True, False], ids=["base", "deltas"])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_a_threshold_keeps_exactly_k_the_lowest_index_first(
    dtype: torch.dtype, kind: str, based: bool, backend: str, device: str
) -> None:
    x = values((1031,), dtype, kind).to(device)
    base = torch.full_like(x, 0.125) if based else None
    delta = x.double().cpu() if base is None else (x.double() - 0.125).cpu()
    # By value first, by index among equals; a zero among the kept cannot be seen in the sum.
    order = torch.sort(delta.abs(), descending=True, stable=True).indices
    present = int((delta != 0).sum())
    for k in (1, 100, 700, 1031):
        kth = mk.kth_magnitude(x, k, base=base, backend=backend)
        got = mk.merge_deltas(
            base, [x], [1.0], keep=[kth], out_dtype=torch.float64, backend=backend
        )
        kept = (got.cpu() - (0.125 if based else 0)) != 0
        assert int(kept.sum()) == min(k, present)
        expected = torch.zeros(1031, dtype=torch.bool)
        expected[order[: min(k, present)]] = True
        assert torch.equal(kept, expected)


def test_the_worked_example_of_ties(backend: str, device: str) -> None:
    """Trim to two of four, elect signs by the summed mass, average those that agree."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0], device=device)
    tasks = ([4.0, -1.0, 0.5, -3.0], [-2.0, 0.1, 5.0, -1.0], [2.0, 3.0, -1.0, 0.0])
    xs = [base + torch.tensor(t, device=device) for t in tasks]
    keep = [mk.kth_magnitude(x, 2, base=base, backend=backend) for x in xs]
    got = mk.merge_deltas(
        base, xs, [1, 1, 1], keep=keep, elect="sum", normalize=True, backend=backend
    )
    assert got.tolist() == [4.0, 4.0, 6.0, -2.0]


# ---- elections -------------------------------------------------------------------------------

# (elect, normalize, deltas of the models at one element, weights, result)
ELECTIONS = {
    "sum, a tie is positive": ("sum", False, [1.0, -1.0], [1, 1], 1.0),
    "sum, the heavier side": ("sum", False, [1.0, 1.0, -3.0], [1, 1, 1], -3.0),
    "sum, weights count": ("sum", False, [1.0, -3.0], [4, 1], 4.0),
    "sum, zeros are not counted": ("sum", True, [6.0, 0.0, -0.0], [1, 1, 1], 6.0),
    "sum, agreeing weights": ("sum", True, [6.0, 2.0, -1.0], [3, 1, 5], 5.0),
    "sum, negative weight": ("sum", False, [1.0, 1.0], [-3, 1], -3.0),
    "sum, negative weight agrees": ("sum", True, [2.0, 1.0], [-3, 1], 2.0),
    "sum, agreeing weights of 0": ("sum", True, [2.0, -2.0], [1, -1], 4.0),
    "sum, only zeros": ("sum", True, [0.0, -0.0], [1, 1], 0.0),
    "count, a tie is positive": ("count", False, [1.0, -9.0], [1, 1], 1.0),
    "count, more heads": ("count", False, [1.0, 1.0, -9.0], [1, 1, 1], 2.0),
    "count, zeros abstain": ("count", False, [0.0, 0.0, -9.0], [1, 1, 1], -9.0),
    "count, agreeing weights": ("count", True, [1.0, 5.0, -9.0], [1, 3, 1], 4.0),
    "none": (None, False, [1.0, -3.0], [2, 1], -1.0),
    "none, total": (None, True, [1.0, -3.0, 0.0], [2, 1, 5], -0.125),
    "none, total of 0": (None, True, [4.0, 1.0], [1, -1], 3.0),
    "none, total near 0": (None, True, [4.0, 0.0], [1, -1 + 2.0**-30], 4.0),
    "none, total of 1e-7": (None, True, [2.0, 2.0], [1, -1 + 2.0**-23], 2.0),
    # NaN in a kept delta gives NaN
    "NaN alone": (None, False, [NAN, 1.0], [1, 1], NAN),
    "NaN by sum": ("sum", True, [NAN, 1.0], [1, 1], NAN),
    "NaN by count": ("count", True, [NAN, 1.0], [1, 1], NAN),
    "NaN by count, negative": ("count", False, [NAN, -1.0, -1.0], [1, 1, 1], NAN),
    "NaN with weight 0": ("sum", False, [NAN, 1.0], [0, 1], NAN),
    # infinities
    "inf": (None, False, [INF, 1.0], [1, 1], INF),
    "both infinities": (None, False, [INF, -INF], [1, 1], NAN),
    "both by sum": ("sum", False, [INF, -INF], [1, 1], NAN),
    "both by sum, normalized": ("sum", True, [INF, -INF, 1.0], [1, 1, 1], NAN),
    "both by count": ("count", False, [INF, -INF], [1, 1], INF),
    "both by count, negative": ("count", False, [INF, -INF, -1.0], [1, 1, 1], -INF),
    "inf by sum": ("sum", False, [INF, -5.0], [1, 1], INF),
    "inf outvoted": ("count", False, [INF, -5.0, -1.0], [1, 1, 1], -6.0),
    "inf with weight 0": ("sum", False, [INF, 1.0], [0, 1], NAN),
}


@pytest.mark.parametrize("based", [True, False], ids=["base", "deltas"])
@pytest.mark.parametrize("what", ELECTIONS)
def test_elections(what: str, based: bool, backend: str, device: str) -> None:
    elect, normalize, deltas, weights, result = ELECTIONS[what]
    for dtype in (torch.float32, torch.float64):
        # Five elements in a row, so that vector and tail code both see it.
        xs = [torch.full((37,), v, dtype=dtype, device=device) for v in deltas]
        base = torch.zeros(37, dtype=dtype, device=device) if based else None
        got = mk.merge_deltas(base, xs, weights, elect=elect, normalize=normalize, backend=backend)
        assert_bits_equal(got, torch.full((37,), result, dtype=dtype))


def test_what_is_not_kept_is_plus_0_even_if_nan(backend: str, device: str) -> None:
    base = torch.tensor([1.0, -2.0], device=device)
    x = torch.tensor([NAN, INF], device=device)
    got = mk.merge_deltas(base, [x], [1.0], keep=[Bernoulli(0.0)], backend=backend)
    assert_bits_equal(got, base.cpu())


def test_equal_models_give_the_base_back(backend: str, device: str) -> None:
    base = values((1031,), torch.bfloat16).to(device)
    got = mk.merge_deltas(base, [base, base], [1, 1], elect="sum", normalize=True, backend=backend)
    assert_bits_equal(got, base.cpu())


# ---- rescaling -------------------------------------------------------------------------------


def test_l1_keeps_the_sum_of_magnitudes(backend: str, device: str) -> None:
    x = torch.tensor([8.0, -4.0, 2.0, 2.0], device=device)
    keep = [mk.kth_magnitude(x, 2, backend=backend)]
    got = mk.merge_deltas(None, [x], [1.0], keep=keep, rescale="l1", backend=backend)
    factor = float(np.float32(16 / 12))
    assert_bits_equal(got, torch.tensor([8.0, -4.0, 0.0, 0.0]) * factor)


@pytest.mark.parametrize("scale", [1e-8, 0.0], ids=["tiny norm", "zero norm"])
def test_l1_of_almost_nothing_does_not_rescale(scale: float, backend: str, device: str) -> None:
    x = torch.tensor([2.0, 1.0], device=device) * scale
    keep = [mk.kth_magnitude(x, 1, backend=backend)]
    got = mk.merge_deltas(None, [x], [1.0], keep=keep, rescale="l1", backend=backend)
    assert_bits_equal(got, torch.tensor([2.0, 0.0]) * scale)


def test_l1_where_nothing_is_kept(backend: str, device: str) -> None:
    x = torch.ones(5, device=device)
    got = mk.merge_deltas(None, [x], [1.0], keep=[Bernoulli(0)], rescale="l1", backend=backend)
    assert_bits_equal(got, torch.zeros(5))


def test_density_divides_by_the_probability_that_is_used(backend: str, device: str) -> None:
    """0.3 is rounded to a multiple of 2**-16, and so is what a kept element is divided by."""
    x = torch.ones(1000, dtype=torch.float64, device=device)
    rule = Bernoulli(0.3)
    got = mk.merge_deltas(None, [x], [1.0], keep=[rule], rescale="density", backend=backend)
    assert set(got.tolist()) == {0.0, 65536 / rule.limit}
    got = mk.merge_deltas(None, [x], [1.0], keep=[None], rescale="density", backend=backend)
    assert set(got.tolist()) == {1.0}


def test_l1_norms_across_chunks(backend: str, device: str) -> None:
    """An l1 factor of a long tensor, exact because the values are."""
    x = values((2 * CHUNK + 17,), torch.float32, "ties").to(device)
    kth = mk.kth_magnitude(x, x.numel() // 5, backend=backend)
    got = mk.merge_deltas(None, [x], [1.0], keep=[kth], rescale="l1", backend=backend)
    size = x.cpu().double().abs()
    index = torch.arange(x.numel())
    kept = (size > kth.value) | ((size == kth.value) & (index < kth.cut))
    factor = float(np.float32(float(size.sum()) / float(size[kept].sum())))
    assert_bits_equal(got, torch.where(kept, x.cpu(), 0) * factor)


# ---- random masks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: Any, key: Any, words: Any) -> None:
    """The vectors of Random123 for philox4x32-10."""
    assert reference.philox(counter, key) == words


def mask_of(rule: Bernoulli, n: int, backend: str, device: str) -> Tensor:
    ones = torch.ones(n, device=device)
    got = mk.merge_deltas(None, [ones], [1.0], keep=[rule], backend=backend).cpu()
    assert bool(((got == 0) | (got == 1)).all())
    return got.bool()


def reference_mask(rule: Bernoulli, begin: int, end: int) -> Tensor:
    return torch.tensor([reference._draw(rule.key, e) < rule.limit for e in range(begin, end)])


@pytest.mark.parametrize("threads", ["1", "3"])
def test_masks_are_those_of_the_reference_wherever_they_lie(
    threads: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_THREADS", threads)
    rule = Bernoulli(0.37, seed=3, name="blocks.0.attn.qkv", model=1)
    mask = mask_of(rule, 2 * CHUNK + 100, backend, device)
    for begin in (0, 500, 1017, CHUNK - 21, 2 * CHUNK - 50, 2 * CHUNK + 50):
        assert torch.equal(mask[begin : begin + 50], reference_mask(rule, begin, begin + 50))


def test_a_mask_does_not_depend_on_length_or_shape(backend: str, device: str) -> None:
    rule = Bernoulli(0.5, seed=1)
    long = mask_of(rule, 4000, backend, device)
    for n in (1, 7, 8, 9, 511, 513, 1025):
        assert torch.equal(mask_of(rule, n, backend, device), long[:n])
    x = torch.ones(40, 100, device=device).T
    got = mk.merge_deltas(None, [x], [1.0], keep=[rule], backend=backend).cpu()
    assert torch.equal(got.bool().reshape(-1), long)


@pytest.mark.parametrize("first", [1, 6, 7, 8, 1017, 2**35 + 3])
def test_a_part_of_a_mask(first: int, backend: str, device: str) -> None:
    """A part may begin anywhere in the eight draws of one Philox block."""
    rule = Bernoulli(0.6, seed=5, name="w").from_index(first)
    got = mask_of(rule, 700, backend, device)
    for begin in (0, 650):
        at = first + begin
        assert torch.equal(got[begin : begin + 50], reference_mask(rule, at, at + 50))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_share_of_kept_elements(density: float, backend: str, device: str) -> None:
    """Within six standard deviations of the binomial (a chance of 2e-9, and it is fixed)."""
    n = 200_000
    rule = Bernoulli(density, seed=11)
    p = rule.limit / 65536
    kept = int(mask_of(rule, n, backend, device).sum())
    assert abs(kept - n * p) <= 6 * math.sqrt(n * p * (1 - p))


def test_masks_are_independent(backend: str, device: str) -> None:
    """Of other models, names and seeds, and of the neighbouring elements."""
    n = 100_000
    first = mask_of(Bernoulli(0.5, 1, "w", 0), n, backend, device)
    others = {
        "model": mask_of(Bernoulli(0.5, 1, "w", 1), n, backend, device),
        "name": mask_of(Bernoulli(0.5, 1, "v", 0), n, backend, device),
        "seed": mask_of(Bernoulli(0.5, 2, "w", 0), n, backend, device),
    }
    others |= {f"shift {s}": first.roll(s) for s in (1, 2, 4, 7, 8, 512, 1024)}
    for what, other in others.items():
        both = int((first & other).sum())
        assert abs(both - n / 4) <= 6 * math.sqrt(n * 3 / 16), what
    assert torch.equal(first, mask_of(Bernoulli(0.5, 1, "w", 0), n, backend, device))


def test_densities_are_nested(backend: str, device: str) -> None:
    """The draw does not depend on the density: what 0.2 keeps, 0.6 keeps."""
    sparse = mask_of(Bernoulli(0.2, 5), 10_000, backend, device)
    dense = mask_of(Bernoulli(0.6, 5), 10_000, backend, device)
    assert bool((sparse <= dense).all())


def test_limits_of_the_density(backend: str, device: str) -> None:
    assert not mask_of(Bernoulli(0.0), 5000, backend, device).any()
    assert mask_of(Bernoulli(1.0), 5000, backend, device).all()
    x = values((5000,), torch.float32).to(device)
    for rescale in (None, "density", "l1"):
        got = mk.merge_deltas(
            x, [x + 1], [1.0], keep=[Bernoulli(0.0)], rescale=rescale, backend=backend
        )
        assert_bits_equal(got, x.cpu())
        got = mk.merge_deltas(
            x, [x + 1], [1.0], keep=[Bernoulli(1.0)], rescale=rescale, backend=backend
        )
        assert_bits_equal(got, specified(x, [x + 1], [1.0]))


def test_keys_do_not_change_between_versions() -> None:
    """A seed in a user's configuration means the same mask for ever."""
    assert Bernoulli(0.5).key == (0x3519BBD3, 0x81051703)
    assert Bernoulli(0.9, 7, "layer.weight", 2).key == (0x8A9EB407, 0x7123315A)


def test_limit_is_the_nearest_and_never_0() -> None:
    assert Bernoulli(1 / 65536).limit == 1
    assert Bernoulli(1e-300).limit == 1
    assert Bernoulli(0.5 + 0.4 / 65536).limit == 32768
    assert Bernoulli(1 - 1e-9).limit == 65536


# ---- out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_out(dtype: torch.dtype, backend: str, device: str) -> None:
    """`out` may be the base as well as a model."""
    case = Case(shape=(3, 7, 53), dtype=dtype, n=3, layout="sliced", mixed_layouts=True)
    tensors, weights = case.tensors(device), [0.7, -0.2]
    keep = [Bernoulli(0.5, model=0), Bernoulli(0.5, model=1)]

    def call(tensors: list[Tensor], out: Tensor) -> Tensor:
        base, *xs = tensors
        return mk.merge_deltas(base, xs, weights, keep=keep, elect="sum", out=out, backend=backend)

    expected = specified(tensors[0], tensors[1:], weights, keep=keep, elect="sum")
    elementwise.assert_writes_only_out(call, tensors, expected, backend)
    elementwise.assert_transposed_out(call, tensors, expected, backend)
    elementwise.assert_in_place(call, tensors, expected, backend)
    dense = [x.contiguous() for x in tensors]
    elementwise.assert_in_place(call, dense, expected, backend)


def test_out_of_another_dtype(backend: str, device: str) -> None:
    case = Case(shape=(513,))
    base, xs = base_of(case, device), case.tensors(device)
    out = torch.empty(513, dtype=torch.bfloat16, device=device)
    got = mk.merge_deltas(base, xs, [1, 1, 1], out=out, out_dtype=torch.bfloat16, backend=backend)
    assert got.data_ptr() == out.data_ptr()
    expected = specified(base, xs, [1, 1, 1], dtype=torch.bfloat16)
    assert_backend_bits(got, expected, backend)


def test_bad_out_is_refused() -> None:
    elementwise.assert_refuses_bad_out(
        OP,
        lambda tensors, out: mk.merge_deltas(tensors[0], tensors[1:], [1], out=out),
        [torch.zeros(100), torch.zeros(100)],
    )


@pytest.mark.parametrize("to", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("start", range(0, 20, 3))
def test_streamed_stores(
    start: int, to: torch.dtype, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large results bypass the caches; here small ones do, at every alignment."""
    monkeypatch.setattr(cpu_backend, "STREAM", 0)
    for n in (1, 5, 63, 511, 513, 1031):
        case = Case(shape=(n,), values="mixed")
        base, xs = base_of(case, "cpu"), case.tensors()
        buffer = torch.full((n + 64,), cases.SENTINEL, dtype=to)
        out = buffer[start : start + n]
        mk.merge_deltas(base, xs, [1, 2, 3], out=out, out_dtype=to, backend="cpu")
        assert_bits_equal(out, specified(base, xs, [1, 2, 3], dtype=to))
        assert cases.untouched(buffer, out)


# ---- the door --------------------------------------------------------------------------------


def test_numpy_inputs(backend: str, device: str) -> None:
    case = Case(shape=(31, 33))
    base, xs = base_of(case, device), case.tensors(device)
    expected = specified(base, xs, [0.5, 0.25, 1], elect="count")
    if device == "cpu":
        base, xs = base.numpy(), [x.numpy() for x in xs]
    weights = np.array([0.5, 0.25, 1])
    got = mk.merge_deltas(base, xs, weights, elect="count", backend=backend)
    assert_backend_bits(got, expected, backend)


X = torch.zeros(3)
REFUSALS: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "empty": ((X, [], []), {}, "xs is empty"),
    "one tensor": ((X, X, [1, 1, 1]), {}, "xs is no list; got one tensor"),
    "shapes": ((X, [X, torch.zeros(4)], [1, 1]), {}, "xs[1] differs from xs[0] in shape"),
    "dtypes": ((X, [X, X.half()], [1, 1]), {}, "xs[1] differs from xs[0] in dtype"),
    "meta": ((X, [X.to("meta")], [1]), {}, "meta"),
    "integers": ((X, [X.int()], [1]), {}, "int32"),
    "base shape": ((torch.zeros(1), [X], [1]), {}, "base differs from xs[0] in shape"),
    "base dtype": ((X.double(), [X], [1]), {}, "base differs from xs[0] in dtype"),
    "base meta": ((X.to("meta"), [X], [1]), {}, "meta"),
    "base of integers": ((X.int(), [X], [1]), {}, "int32"),
    "too few weights": ((X, [X, X], [1]), {}, "weights has the wrong length"),
    "NaN weight": ((X, [X], [NAN]), {}, "weights[0] is not finite"),
    "infinite weight": ((X, [X], [INF]), {}, "weights[0] is not finite"),
    "NaN scale": ((X, [X], [1]), {"scale": NAN}, "scale is not finite"),
    "scale of text": ((X, [X], [1]), {"scale": "big"}, "scale is no number"),
    "elect": ((X, [X], [1]), {"elect": "mean"}, "elect is unknown; got 'mean'"),
    "rescale": ((X, [X], [1]), {"rescale": "l2"}, "rescale is unknown; got 'l2'"),
    "too few rules": ((X, [X, X], [1, 1]), {"keep": [None]}, "keep has the wrong length"),
    "rule of numbers": ((X, [X], [1]), {"keep": [0.5]}, "keep holds an unknown rule; got float"),
    "density above 1": ((X, [X], [1]), {"keep": [Bernoulli(1.5)]}, "density is out of range"),
    "density below 0": ((X, [X], [1]), {"keep": [Bernoulli(-0.1)]}, "density is out of range"),
    "density NaN": ((X, [X], [1]), {"keep": [Bernoulli(NAN)]}, "density is out of range"),
    "out_dtype": ((X, [X], [1]), {"out_dtype": torch.int32}, "out_dtype"),
    "out of text": ((X, [X], [1]), {"out": "out"}, "out"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    args, kwargs, words = REFUSALS[what]
    with refused(OP, words):
        mk.merge_deltas(*args, **kwargs)


def test_the_kernel_is_the_compiled_one(cpu_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**kwargs: object) -> None:
        raise RuntimeError("this kernel was called")

    monkeypatch.setattr(cpu_backend._cpu, OP, broken)
    with pytest.raises(RuntimeError, match="this kernel was called"):
        mk.merge_deltas(X, [X], [1], backend="cpu")
