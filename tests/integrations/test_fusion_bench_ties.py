"""ties_global with host="fusion_bench" against FusionBench's ties_merging, bit for bit."""

from __future__ import annotations

import contextlib
import io
import itertools

import pytest
import torch
from torch import Tensor

import mergekern as mk

from accuracy import assert_bits_equal
from required import peer

fusion_bench = peer("fusion_bench.method.ties_merging.ties_merging_utils", "fusion-bench")

SHAPES = {"b.weight": (31, 33), "a": (17,), "c": (5, 1, 3, 3), "scale": (), "none": (0, 3)}
Model = dict[str, Tensor]


def task_vectors(kind: str, n: int) -> list[Model]:
    g = torch.Generator().manual_seed(n)

    def one(shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=g)
        if kind == "quantised":  # many ties, and tied votes
            return (x * 3).round() / 4
        if kind == "sparse":  # a threshold of 0 keeps everything
            return x * (torch.rand(shape, generator=g) < 0.1)
        return x

    return [{name: one(shape) for name, shape in SHAPES.items()} for _ in range(n)]


def flat(model: Model) -> Tensor:
    return torch.cat([model[name].reshape(-1) for name in sorted(SHAPES)])


def theirs(models: list[Model], share: float, combine: str) -> Tensor:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        vectors = torch.stack([flat(m) for m in models])
        merged = fusion_bench.ties_merging(vectors, reset_thresh=share, merge_func=combine)
    return 0 + merged  # the base; no -0


@pytest.mark.parametrize("kind", ["random", "quantised", "sparse"])
@pytest.mark.parametrize("share", [20, 0.2, 50, 0])
@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
def test_bits(combine: str, share: float, kind: str) -> None:
    for n in range(1, 5):
        models = task_vectors(kind, n)
        base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        density = share / 100 if share > 1 else share
        merged = mk.merge_state_dicts(
            models, "ties_global", base=base, density=density, merge_func=combine,
            host="fusion_bench",
        )  # fmt: skip
        assert_bits_equal(flat(merged), theirs(models, share, combine))


@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
def test_a_tied_vote_without_a_majority(combine: str) -> None:
    """As many positive as negative: negative, and 0 by the largest, which FusionBench signs."""
    a, b = torch.tensor([1.0, 2.0, -2.0]), torch.tensor([-1.0, 2.0, -2.0])
    given = {"merge_func": combine, "density": 0.9, "host": "fusion_bench"}
    merged = mk.merge_tensors([a, b], "ties_global", base=torch.zeros(3), **given)
    with contextlib.redirect_stdout(io.StringIO()):
        other = 0 + fusion_bench.ties_merging(torch.stack([a, b]), 0.9, combine)
    if combine == "max":
        assert (float(other[0]), float(merged[0])) == (0.0, -1.0)
        merged, other = merged[1:], other[1:]
    assert_bits_equal(merged, other)


@pytest.mark.parametrize("share", [1.0, 100])
def test_all_of_it_is_refused_there(share: float) -> None:
    """Its kthvalue is asked for rank 0; here nothing is trimmed."""
    models = task_vectors("random", 2)
    with pytest.raises((RuntimeError, IndexError)):
        theirs(models, share, "sum")
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    given = {"base": base, "merge_func": "sum", "density": 1}
    merged = mk.merge_state_dicts(models, "ties_global", host="fusion_bench", **given)
    assert_bits_equal(flat(merged), flat(mk.merge_state_dicts(models, "ties_global", **given)))


def test_quantised_data_have_tied_votes() -> None:
    """What the test above is worth: the rules of no host give other bits."""
    differ = 0
    for n, combine in itertools.product((2, 4), ("mean", "sum")):
        models = task_vectors("quantised", n)
        base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        plain = mk.merge_state_dicts(
            models, "ties_global", base=base, density=0.2, merge_func=combine
        )
        differ += not torch.equal(flat(plain), theirs(models, 20, combine))
    assert differ == 4
