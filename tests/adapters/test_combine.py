"""PEFT's combinations in merge_adapters: factors merged apart, and task vectors truncated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.adapters.adapter import Adapter, Factors
from mergekern.adapters.combine import FACTORED
from mergekern.adapters.merge import merge_adapters
from mergekern.adapters.truncation import best_of_rank
from mergekern.methods import REGISTRY

from accuracy import assert_bits_equal, assert_within
from adapters.random_adapters import SHAPES, adapter, dense
from methods.arguments import cases, count_of
from refusal import refused

OP = "merge_adapters"
UNIT = 2.0**-24  # of float32
WEIGHTS = [0.7, -0.4, 1.3]
DRAWN = ("dare_linear", "dare_ties")


def bound(x: Tensor, steps: float) -> Tensor:
    return torch.full_like(x, steps * UNIT * float(x.abs().max()))


def three(rank: int = 4) -> list[Adapter]:
    return [adapter(i, rank, scale=0.5 + i) for i in range(3)]


def given_for(method: str) -> dict[str, Any]:
    return {} if method == "linear" else {"density": 0.4}


# ---- factors apart ---------------------------------------------------------------------------


def test_linear_is_the_sum_and_its_cross_terms() -> None:
    """(sum_i sqrt(w_i) b_i)(sum_j sqrt(w_j) a_j), w_i = weight_i scale_i with the sign on a."""
    adapters = three()
    got = merge_adapters(adapters, "linear", weight=WEIGHTS)
    summed = merge_adapters(adapters, "cat", weight=WEIGHTS)
    for name, f in got.modules.items():
        fs = [a.modules[name] for a in adapters]
        w = [weight * x.scale for weight, x in zip(WEIGHTS, fs, strict=True)]
        terms = {
            (i, j): math.copysign(math.sqrt(abs(w[i] * w[j])), w[j])
            * (fs[i].b.double() @ fs[j].a.double())
            for i in range(3)
            for j in range(3)
        }
        whole = sum(terms.values())
        cross = sum(x for (i, j), x in terms.items() if i != j)
        assert_within(dense(f), whole, bound(whole, 64))
        assert_within(dense(f) - dense(summed.modules[name]), cross, bound(whole, 128))
        assert float(cross.norm()) > 0.5 * float((whole - cross).norm())
        assert f.rank == 4


@pytest.mark.parametrize("host", [None, "peft"])
@pytest.mark.parametrize("method", FACTORED)
def test_factors_are_merged_by_the_method_itself(method: str, host: str | None) -> None:
    adapters = three()
    given = given_for(method)
    torch.manual_seed(1)
    got = merge_adapters(adapters, method, weight=WEIGHTS, seed=5, host=host, **given)
    torch.manual_seed(1)
    for name in sorted(SHAPES):
        fs = [a.modules[name] for a in adapters]
        on = [1.0 if host else f.scale for f in fs]
        roots = [
            math.sqrt(abs(w) * (f.scale if host else 1)) for w, f in zip(WEIGHTS, fs, strict=True)
        ]
        signs = [1, -1, 1]
        for side in ("a", "b"):
            xs = [
                (math.sqrt(s) * getattr(f, side).double()).float()
                for s, f in zip(on, fs, strict=True)
            ]
            weight = [s * r if side == "a" else r for s, r in zip(signs, roots, strict=True)]
            expected = mk.merge_tensors(
                xs,
                FACTORED[method],
                base=torch.zeros_like(xs[0]),
                name=f"{name}.{side}",
                seed=5,
                host=host,
                weight=weight,
                **given,
            )
            assert_bits_equal(getattr(got.modules[name], side), expected)


@pytest.mark.parametrize("method", FACTORED)
def test_one_adapter_of_its_factors_is_itself(method: str) -> None:
    """Its scale too, whatever a method divides by."""
    one = adapter(3, rank=5, scale=2.0)
    got = merge_adapters([one], method)
    for name, f in one.modules.items():
        expected = dense(f)
        assert_within(dense(got.modules[name]), expected, bound(expected, 64))


@pytest.mark.parametrize("factor", [0.25, -2.0])
def test_lambda_is_a_factor_on_the_product(factor: float) -> None:
    plain = merge_adapters(three(), "linear")
    got = merge_adapters(three(), "linear", lambda_=factor)
    for name, f in plain.modules.items():
        expected = factor * dense(f)
        assert_within(dense(got.modules[name]), expected, bound(expected, 64))


@pytest.mark.parametrize("method", FACTORED)
def test_a_module_that_an_adapter_lacks_has_no_say(method: str) -> None:
    adapters, others = three(), three()[1:]
    del adapters[0].modules["stem"]
    given = {"host": "peft", "density": 1.0} if method != "linear" else {"host": "peft"}
    got = merge_adapters(adapters, method, union=True, weight=WEIGHTS, **given)
    alone = merge_adapters(others, method, weight=WEIGHTS[1:], **given)
    assert_bits_equal(got.modules["stem"].a, alone.modules["stem"].a)
    assert_bits_equal(got.modules["stem"].b, alone.modules["stem"].b)


def test_ranks_that_differ() -> None:
    adapters = [adapter(0), adapter(1, rank=3)]
    for method in FACTORED:
        with refused(OP, "other ranks", "stem of ranks 3, 4", "the method with _svd"):
            merge_adapters(adapters, method)
    for method in FACTORED.keys() - {"linear"}:
        assert merge_adapters(adapters, f"{method}_svd").modules["stem"].rank == 4


# ---- task vectors, truncated -----------------------------------------------------------------


def deltas(fs: Sequence[Factors]) -> list[Tensor]:
    return [dense(f).float() for f in fs]


def per_module() -> list[Any]:
    """The methods that take one module at a time."""
    specs = [(case, REGISTRY[case.values[0]]) for case in cases()]
    return [case for case, m in specs if m.base == "required" and m.survey is None]


@pytest.mark.parametrize(("method", "given"), per_module())
def test_every_method_with_a_base_truncated(method: str, given: dict[str, Any]) -> None:
    adapters = [adapter(i, 2 + i) for i in range(count_of(method))]
    got = merge_adapters(adapters, f"{method}_svd", seed=3, **given)
    rank = 1 + len(adapters)
    for name, f in got.modules.items():
        xs = deltas([a.modules[name] for a in adapters])
        zeros = torch.zeros_like(xs[0])
        merged = mk.merge_tensors(xs, method, base=zeros, name=name, seed=3, **given)
        b, a, lost = best_of_rank(merged, rank)
        assert_bits_equal(f.a, a.float())
        assert_bits_equal(f.b, b.float())
        assert (got.lost[name], f.rank, f.shape) == (lost, rank, SHAPES[name][1])


@pytest.mark.parametrize("host", [None, "peft"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_ties_svd_against_dense_formulas(rank: int, host: str | None) -> None:
    """Trim, elect, average and truncate in float64; rank 4 and scales that are powers of 2."""
    adapters = [adapter(i, 4, scale=2.0**i) for i in range(3)]
    weights = [0.5, 2.0, 1.0]
    given: dict[str, Any] = {"host": host, "weight": weights, "density": 0.3}
    got = merge_adapters(adapters, "ties_svd", rank=rank, **given)
    for name, f in got.modules.items():
        kept = []
        for a in adapters:
            x = dense(a.modules[name]).float().double()
            least = x.abs().flatten().sort(descending=True).values[int(0.3 * x.numel()) - 1]
            kept.append(torch.where(x.abs() >= least, x, 0))
        w = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
        stack = torch.stack(kept)
        sign = ((stack if host else w * stack).sum(0) >= 0).double() * 2 - 1
        agree = (stack.sign() == sign).double()
        count = (agree if host else w * agree).sum(0)
        merged = (w * stack * agree).sum(0) / torch.where(count == 0, 1.0, count)
        u, s, vh = torch.linalg.svd(merged, full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        gap = float((s[rank - 1] - s[rank]) / s[0])
        assert_within(dense(f), expected, bound(expected, 256 / gap))
        share = float(torch.linalg.vector_norm(s[rank:]) / torch.linalg.vector_norm(s))
        assert abs(got.lost[name] - share) <= 1e-6


def test_task_arithmetic_of_dense_task_vectors_is_svd() -> None:
    one = merge_adapters(three(), "svd", weight=WEIGHTS, rank=5)
    other = merge_adapters(three(), "task_arithmetic_svd", weight=WEIGHTS, rank=5)
    for name, f in one.modules.items():
        expected = dense(f)
        assert_within(dense(other.modules[name]), expected, bound(expected, 1024))
        assert abs(one.lost[name] - other.lost[name]) <= 1e-6


@pytest.mark.parametrize("method", ["ties", "ties_svd", "dare_linear_svd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_stay(method: str, dtype: torch.dtype) -> None:
    adapters = [adapter(i, dtype=dtype) for i in range(2)]
    for f in merge_adapters(adapters, method, density=0.5).modules.values():
        assert f.a.dtype == f.b.dtype == dtype
        assert bool(f.a.isfinite().all())


@pytest.mark.parametrize("method", DRAWN)
def test_random_masks_depend_on_the_seed_alone(method: str) -> None:
    for name in (method, f"{method}_svd"):
        made = []
        for seed in (1, 1, 2):
            torch.manual_seed(len(made))
            made.append(merge_adapters(three(), name, density=0.5, seed=seed).modules["stem"].a)
        assert_bits_equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "whole models": ("ties_global_svd", {}, "ties_global wants more than one module at a time"),
    "no task vectors": ("linear_svd", {}, "linear does not merge task vectors"),
    "no such method": ("nothing_svd", {}, "unknown method"),
    "factors of others": ("della", {}, "unknown method"),
    "host of knots": ("knots_ties", {"host": "peft"}, "host='peft' has no knots_ties"),
    "host of others": ("della_svd", {"host": "peft"}, "host='peft' has no della_svd"),
    "other host": ("ties_svd", {"host": "knots"}, "host='knots' has no ties_svd"),
    "unknown host": ("ties_svd", {"host": "mergekit"}, "host is unknown"),
    "lambda": ("linear", {"lambda_": math.nan}, "lambda"),
    "weights": ("ties", {"weight": [1.0]}, "weight has the wrong length; got 1; expected 3"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    method, given, words = REFUSALS[what]
    with refused(OP, words):
        merge_adapters(three(), method, **given)


def test_an_overflow_is_refused() -> None:
    """Of float32, in a task vector whose factors are finite."""
    big = adapter(0)
    for name, f in big.modules.items():
        big.modules[name] = Factors(f.a * 1e25, f.b * 1e25, 1.0, f.shape)
    with refused(OP, "the merged blocks.0.fc", "is not finite"):
        merge_adapters([big, big], "ties_svd")
