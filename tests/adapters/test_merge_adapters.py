"""merge_adapters against dense formulas in float64, and the properties of each method."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekern.adapters.adapter import Adapter, Factors
from mergekern.adapters.factors import align, core_space
from mergekern.adapters.merge import merge_adapters
from mergekern.methods import REGISTRY
from mergekern.methods.merge import merge_state_dicts

from accuracy import assert_bits_equal, assert_within
from adapters.random_adapters import SHAPES, adapter, dense, factors, knots_ties
from methods.arguments import cases, count_of
from refusal import refused

OP = "merge_adapters"
UNIT = 2.0**-24  # of float32


def deltas(x: Adapter) -> dict[str, Tensor]:
    return {name: dense(f) for name, f in x.modules.items()}


def weighted(adapters: list[Adapter], weights: list[float]) -> dict[str, Tensor]:
    return {
        name: sum(w * dense(a.modules[name]) for a, w in zip(adapters, weights, strict=True))
        for name in SHAPES
    }


def bound(x: Tensor, steps: float = 64) -> Tensor:
    """Relative to the largest element: factors are rounded to float32 once, and products of them
    add up as many errors as there are ranks."""
    return torch.full_like(x, steps * UNIT * float(x.abs().max()))


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 7, 3), (16, 16, 16)], ids=str)
@pytest.mark.parametrize("method", ["cat", "svd", "knots_ta", "core_ta"])
def test_sums_are_exact(method: str, ranks: tuple[int, ...]) -> None:
    """Whatever the basis is, a sum of task vectors is their sum; also where ranks add up to more
    than a side has."""
    adapters = [adapter(i, r, scale=0.5 + i) for i, r in enumerate(ranks)]
    weights = [0.3, -1.0, 2.0]
    rank = sum(ranks) if method == "svd" else None
    got = merge_adapters(adapters, method, weight=weights, rank=rank)
    for name, expected in weighted(adapters, weights).items():
        assert_within(dense(got.modules[name]), expected, bound(expected, 256))
        assert got.modules[name].rank <= sum(ranks)
        assert got.modules[name].shape == SHAPES[name][1]


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("method", ["svd", "cat"])
def test_a_truncation_is_the_best_and_says_what_it_lost(method: str, rank: int) -> None:
    adapters = [adapter(i) for i in range(2)]
    got = merge_adapters(adapters, method, rank=rank)
    for name, whole in weighted(adapters, [1.0, 1.0]).items():
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert got.modules[name].rank == rank
        assert_within(dense(got.modules[name]), expected, bound(expected, 256))
        lost = float(torch.linalg.vector_norm(s[rank:8]) / torch.linalg.vector_norm(s))
        assert abs(got.lost[name] - lost) <= 1e-12


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_knots_ties(density: float, count: int) -> None:
    """Against a dense SVD: one threshold for each adapter, signs, means."""
    adapters = [adapter(i, 2 + i) for i in range(count)]
    got = merge_adapters(adapters, "knots_ties", density=density, lambda_=0.6)
    for name, (u, merged) in knots_ties(adapters, density, 0.6).items():
        expected = u @ merged
        assert_within(dense(got.modules[name]), expected, bound(expected, 256))


def methods_with_a_base() -> list[Any]:
    """Under their own names: knots_ties is ties_global."""
    named = [case for case in cases() if case.values[0] != "ties"]
    return [case for case in named if REGISTRY[case.values[0]].base == "required"]


@pytest.mark.parametrize("space", ["knots", "core"])
@pytest.mark.parametrize(("method", "given"), methods_with_a_base())
def test_every_method_with_a_base(method: str, given: dict[str, Any], space: str) -> None:
    """The method itself on the parts of all modules, from a base of zeros, to the bit."""
    adapters = [adapter(i, 2 + i) for i in range(count_of(method))]
    parts: list[dict[str, Tensor]] = [{} for _ in adapters]
    for name in SHAPES:
        both = [a.modules[name] for a in adapters]
        found = align(both) if space == "knots" else core_space(both)
        for of, part in zip(parts, found.parts, strict=True):
            of[name] = part.float()
    zeros = {name: torch.zeros_like(x) for name, x in parts[0].items()}
    expected = merge_state_dicts(parts, method, base=zeros, seed=3, **given)
    got = merge_adapters(adapters, f"{space}_{method}", seed=3, **given)
    for name, f in got.modules.items():
        if space == "knots":
            assert_bits_equal(f.a, expected[name])
        else:
            core = core_space([a.modules[name] for a in adapters])
            exact = core.u @ expected[name].double() @ core.v.T
            assert_within(dense(f), exact, bound(exact))


def test_one_adapter_is_itself() -> None:
    one = adapter(3, rank=5, scale=2.0)
    for method in ("cat", "svd", "knots_ta", "core_ties"):
        given = {"density": 1.0} if method.endswith("ties") else {}
        got = merge_adapters([one], method, **given)
        for name, expected in deltas(one).items():
            assert_within(dense(got.modules[name]), expected, bound(expected))


@pytest.mark.parametrize("method", ["svd", "knots_ties", "core_ties", "knots_ta"])
def test_the_order_of_adapters_does_not_matter(method: str) -> None:
    adapters = [adapter(i) for i in range(4)]
    one = deltas(merge_adapters(adapters, method))
    other = deltas(merge_adapters(adapters[::-1], method))
    for name, expected in one.items():
        assert_within(other[name], expected, bound(expected, 256))


def test_equal_adapters_keep_a_rank() -> None:
    """A sum of ranks that is not the rank: what is 0 but for rounding counts as 0."""
    got = merge_adapters([adapter(0)] * 3, "knots_ta", weight=1 / 3)
    for name, expected in deltas(adapter(0)).items():
        assert got.modules[name].rank == 4
        assert_within(dense(got.modules[name]), expected, bound(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    adapters = [adapter(i, dtype=dtype) for i in range(2)]
    got = merge_adapters(adapters, "svd", rank=8)
    unit = torch.finfo(dtype).eps
    for name, expected in weighted(adapters, [1.0, 1.0]).items():
        assert got.modules[name].a.dtype == got.modules[name].b.dtype == dtype
        limit = torch.full_like(expected, 16 * unit * float(expected.abs().max()))
        assert_within(dense(got.modules[name]), expected, limit)


@pytest.mark.parametrize("method", ["cat", "svd", "knots_ties", "core_ta", "linear", "ties_svd"])
@pytest.mark.parametrize("size", [2.0**-20, 2.0**-14, 1.0, 2.0**5])
def test_the_scale_holds_what_float16_would_cut_off(method: str, size: float) -> None:
    """Small and large factors and scales: as exact as factors near 1."""
    adapters = [adapter(i, scale=2.0**-9 if size < 1 else 8.0) for i in range(2)]
    for a in adapters:
        for name, f in a.modules.items():
            a.modules[name] = replace(f, a=f.a.half(), b=(f.b * size).half())
    given = {"density": 1.0} if "ties" in method else {}
    got = merge_adapters(adapters, method, weight=0.5, **given)
    wide = copy.deepcopy(adapters)
    for a in wide:
        for name, f in a.modules.items():
            a.modules[name] = replace(f, a=f.a.double(), b=f.b.double())
    expected = merge_adapters(wide, method, weight=0.5, **given)
    for name, f in got.modules.items():
        assert f.a.dtype == f.b.dtype == torch.float16
        exact = dense(expected.modules[name])
        limit = 16 * 2.0**-11 * float(exact.abs().max())
        assert_within(dense(f), exact, torch.full_like(exact, limit))


def test_a_result_beyond_its_dtype_is_refused() -> None:
    big = adapter(0)
    for name, f in big.modules.items():
        bias = torch.full((len(f.b),), 6e4, dtype=torch.float16)
        big.modules[name] = replace(f, a=f.a.half(), b=f.b.half(), bias=bias, scale=2.0)
    with refused(OP, "bias of the merged blocks.0.fc does not fit float16; got 1.2e+05"):
        merge_adapters([big], "cat")


@pytest.mark.parametrize("method", ["cat", "svd", "knots_ties", "core_ta"])
def test_a_union_of_modules(method: str) -> None:
    one, other = adapter(0), adapter(1)
    del one.modules["stem"]
    with refused(OP, "adapters do not fit together", "stem is missing from adapters 0"):
        merge_adapters([one, other], method)
    given: dict[str, Any] = {"density": 1.0} if method.endswith("ties") else {}
    got = merge_adapters([one, other], method, union=True, **given)
    expected = dense(other.modules["stem"])
    assert_within(dense(got.modules["stem"]), expected, bound(expected, 256))


def test_adapters_of_other_bases() -> None:
    one, other = adapter(0), adapter(1)
    other.config = {**other.config, "base_model_name_or_path": "another"}
    with refused(OP, "their bases have the names ['another', 'base']"):
        merge_adapters([one, other], "svd")
    merge_adapters([one, other], "svd", union=True)


def test_settings_name_what_any_adapter_has() -> None:
    one, other = adapter(0), adapter(1)
    del one.modules["stem"], other.modules["blocks.0.q"]
    one.config = {**one.config, "target_modules": ["q", "fc"], "modules_to_save": ["head"]}
    other.config = {**other.config, "target_modules": ["stem", "fc"], "modules_to_save": ["norm"]}
    got = merge_adapters([one, other], "svd", union=True).config
    assert got["target_modules"] == sorted(SHAPES)
    assert got["modules_to_save"] == ["head", "norm"]


@pytest.mark.parametrize("method", ["svd", "knots_ties", "core_ta"])
def test_nan_is_refused(method: str) -> None:
    bad = adapter(1)
    bad.modules["stem"].a[2, 3] = math.nan
    with refused(OP, "stem of adapter 1[2, 3] is not finite; got nan"):
        merge_adapters([adapter(0), bad], method)


def test_nothing_at_all_is_rank_1() -> None:
    """PEFT knows no rank 0."""
    nothing = adapter(0)
    for name, f in nothing.modules.items():
        nothing.modules[name] = Factors(f.a, f.b * 0, 1.0, f.shape)
    for method in ("svd", "knots_ties"):
        got = merge_adapters([nothing, nothing], method)
        for name, f in got.modules.items():
            assert f.rank == 1
            assert_bits_equal(dense(f), torch.zeros_like(dense(nothing.modules[name])))


def test_tensors_that_are_saved_whole() -> None:
    one, other = adapter(0), adapter(1)
    one.saved["head.weight"] = torch.ones(3)
    other.saved["norm.bias"] = torch.zeros(2)
    got = merge_adapters([one, other], "svd")
    assert set(got.saved) == {"head.weight", "norm.bias"}
    other.saved["head.weight"] = torch.zeros(3)
    with refused(OP, "head.weight is saved whole by several adapters"):
        merge_adapters([one, other], "svd")
    other.saved = {"stem.weight": torch.zeros(20, 3, 5, 5)}
    del other.modules["stem"]
    with refused(OP, "stem.weight is saved whole by adapter 1; got factors of it in another"):
        merge_adapters([one, other], "svd", union=True)


REFUSALS: dict[str, tuple[Any, str]] = {
    "none": (lambda: merge_adapters([]), "adapters is empty"),
    "method": (lambda: merge_adapters([adapter(0)], "knots_nearswap_x"), "unknown method"),
    "no task vectors": (
        lambda: merge_adapters([adapter(0)], "knots_linear"),
        "does not merge task",
    ),
    "rank": (lambda: merge_adapters([adapter(0)], "svd", rank=0), "rank is no rank; got 0"),
    "host": (lambda: merge_adapters([adapter(0)], host="mergekit"), "host is unknown"),
    "host of others": (
        lambda: merge_adapters([adapter(0)], "svd", host="knots"),
        "host='knots' has no svd",
    ),
    "parameter": (lambda: merge_adapters([adapter(0)], "svd", density=0.1), "no such parameters"),
    "nothing is trimmed": (
        lambda: merge_adapters([adapter(0)], "knots_ta", density=0.1),
        "knots_ta trims nothing; got a density",
    ),
    "weights": (lambda: merge_adapters([adapter(0)], "cat", weight=[1, 2]), "wrong length"),
    "shapes": (
        lambda: merge_adapters(
            [adapter(0), Adapter({**adapter(1).modules, "stem": factors(9, (4,), 2, 0)})]
        ),
        "stem differs in shape",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    call, words = REFUSALS[what]
    with refused(OP, words):
        call()


def test_out_is_a_folder_that_loads(tmp_path: Path) -> None:
    from mergekern.adapters.files import load_adapter

    got = merge_adapters([adapter(i, 2 + i) for i in range(2)], "svd", out=tmp_path / "merged")
    loaded = load_adapter(tmp_path / "merged")
    for name, f in got.modules.items():
        assert_bits_equal(loaded.modules[name].a, f.a)
        assert_bits_equal(loaded.modules[name].b, f.b)
        assert loaded.modules[name].shape == f.shape
    assert loaded.config["base_model_name_or_path"] == "base"
