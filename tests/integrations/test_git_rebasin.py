"""The drop-in for Git Re-Basin's PyTorch port, and the port beside it where there is a checkout."""

from __future__ import annotations

import pytest
import scipy.optimize
import torch
from torch import Tensor

from mergekern.errors import ArgumentError
from mergekern.integrations import git_rebasin as ours

from accuracy import assert_bytes_equal
from rebasin import port

SPECS = {
    "mlp": lambda port: port.mlp_permutation_spec(3),
    "resnet20": lambda port: port.resnet20_permutation_spec(),
    "resnet50": lambda port: port.resnet50_permutation_spec(),
    "vgg16": lambda port: port.vgg16_permutation_spec(),
}


def parameters(spec: ours.PermutationSpec, width: int, seed: int) -> dict[str, Tensor]:
    """Random weights of the shapes that a spec speaks of."""
    g = torch.Generator().manual_seed(seed)
    sizes = {p: width + i for i, p in enumerate(spec.perm_to_axes)}
    return {
        key: torch.randn([3 if p is None else sizes[p] for p in perms], generator=g)
        for key, perms in spec.axes_to_perm.items()
    }


def shuffled(spec: ours.PermutationSpec, params: dict[str, Tensor], seed: int) -> ours.Permutation:
    g = torch.Generator().manual_seed(seed)
    first = {p: axes[0] for p, axes in spec.perm_to_axes.items()}
    return {p: torch.randperm(params[k].shape[a], generator=g) for p, (k, a) in first.items()}


@pytest.mark.parametrize("name", SPECS)
def test_finds_a_permutation_back(name: str) -> None:
    """b is a, permuted: matched to a it is a again, bit for bit."""
    spec = SPECS[name](ours)
    a = parameters(spec, 12, 0)
    b = ours.apply_permutation(spec, shuffled(spec, a, 1), a)
    moved = [k for k in a if not torch.equal(a[k], b[k])]
    assert len(moved) > len(a) // 2
    torch.manual_seed(0)
    found = ours.weight_matching(spec, a, b)
    back = ours.apply_permutation(spec, found, b)
    for key, x in a.items():
        assert_bytes_equal(back[key], x)


def test_one_hidden_layer_is_one_assignment() -> None:
    spec = ours.mlp_permutation_spec(1)
    a, b = parameters(spec, 9, 0), parameters(spec, 9, 1)
    score = a["layer0.weight"] @ b["layer0.weight"].T
    score += torch.outer(a["layer0.bias"], b["layer0.bias"])
    score += a["layer1.weight"].T @ b["layer1.weight"]
    _, columns = scipy.optimize.linear_sum_assignment(score.numpy(), maximize=True)
    assert ours.weight_matching(spec, a, b)["P_0"].tolist() == columns.tolist()


def test_of_several_assignments_it_is_scipys() -> None:
    """Features that are always zero fit all others as well, in layers of any width."""
    spec = ours.mlp_permutation_spec(1)
    a, b = parameters(spec, 1100, 0), parameters(spec, 1100, 1)
    for x in (a, b):
        x["layer0.weight"][::4], x["layer0.bias"][::4], x["layer1.weight"][:, ::4] = 0, 0, 0
    score = a["layer0.weight"] @ b["layer0.weight"].T
    score += torch.outer(a["layer0.bias"], b["layer0.bias"])
    score += a["layer1.weight"].T @ b["layer1.weight"]
    _, columns = scipy.optimize.linear_sum_assignment(score.numpy(), maximize=True)
    assert ours.weight_matching(spec, a, b)["P_0"].tolist() == columns.tolist()


def test_one_axis_may_stay() -> None:
    spec = ours.permutation_spec_from_axes_to_perm({"w": ("P", "Q")})
    perm = {"P": torch.tensor([1, 0]), "Q": torch.tensor([2.0, 0.0, 1.0])}  # as the port holds them
    w = torch.arange(6).view(2, 3)
    assert torch.equal(ours.get_permuted_param(spec, perm, "w", {"w": w}), w[[1, 0]][:, [2, 0, 1]])
    got = ours.get_permuted_param(spec, perm, "w", {"w": w}, except_axis=0)
    assert torch.equal(got, w[:, [2, 0, 1]])


def test_starts_where_it_is_told_and_leaves_that_alone() -> None:
    spec = ours.mlp_permutation_spec(2)
    a = parameters(spec, 8, 0)
    start = shuffled(spec, a, 3)
    before = {p: i.clone() for p, i in start.items()}
    assert ours.weight_matching(spec, a, a, max_iter=0, init_perm=start).keys() == start.keys()
    ours.weight_matching(spec, a, a, init_perm=start)
    assert all(torch.equal(start[p], before[p]) for p in start)


def test_refusals() -> None:
    spec = ours.mlp_permutation_spec(1)
    params = parameters(spec, 4, 0) | {"norm.weight": torch.ones(4), "extra": torch.ones(1)}
    with pytest.raises(ArgumentError, match=r"parameters without axes; got extra, norm\.weight"):
        ours.apply_permutation(spec, {"P_0": torch.arange(4)}, params)
    with pytest.raises(ArgumentError, match="no hidden layer"):
        ours.mlp_permutation_spec(0)


# ---- beside the port -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_specs_of_the_port(name: str) -> None:
    mine, theirs = SPECS[name](ours), SPECS[name](port())
    assert mine.axes_to_perm == theirs.axes_to_perm
    assert [*mine.axes_to_perm] == [*theirs.axes_to_perm]
    assert mine.perm_to_axes == theirs.perm_to_axes
    assert [*mine.perm_to_axes] == [*theirs.perm_to_axes]


@pytest.mark.parametrize("name", SPECS)
def test_permutations_of_the_port(name: str) -> None:
    original = port()
    spec = SPECS[name](original)
    a, b = parameters(spec, 16, 0), parameters(spec, 16, 1)
    found = []
    for module in (original, ours):
        torch.manual_seed(5)
        perm = module.weight_matching(spec, a, b, max_iter=6)
        found.append((perm, module.apply_permutation(spec, perm, b)))
    (theirs, their_weights), (mine, my_weights) = found
    for p, index in theirs.items():
        assert mine[p].tolist() == index.long().tolist()
    for key, x in their_weights.items():
        assert_bytes_equal(my_weights[key], x)
