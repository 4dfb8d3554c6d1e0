"""The drop-in for ZipIt: its functions by formula. tests/real runs its own pipeline on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from mergekern.errors import ArgumentError, BackendError
from mergekern.integrations import zipit
from mergekern.integrations.zipit import (
    CovarianceMetric,
    compute_correlation,
    match_tensors_identity,
    match_tensors_permute,
    match_tensors_zipit,
)

from accuracy import assert_bytes_equal, assert_within


def features(models: int, size: int, samples: int = 200) -> list[Tensor]:
    g = torch.Generator().manual_seed(models * size)
    shared = torch.randn(size, samples, generator=g)
    return [
        shared[torch.randperm(size, generator=g)] + torch.randn(size, samples, generator=g)
        for _ in range(models)
    ]


def covariance(feats: list[Tensor]) -> Tensor:
    return torch.from_numpy(np.cov(torch.cat(feats).double().numpy(), bias=True)).float()


# ---- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [1, 2, 3])
def test_covariance_of_all_batches(models: int) -> None:
    feats = [1000 + x for x in features(models, 7)]
    metric = CovarianceMetric()
    for part in zip(*(x.split(60, 1) for x in feats)):
        metric.update(part[0].shape[1] // 4, *part)  # four samples to an image
    want = np.cov(torch.cat(feats).double().numpy(), bias=True)
    got = metric.finalize(50)
    assert got.dtype == torch.float32
    assert_within(got, torch.from_numpy(want), torch.tensor(1e-5))


def test_images_of_different_sizes_count_alike() -> None:
    """Each batch weighs as many images, however many samples they have."""
    small, large = torch.randn(3, 40), 2 + torch.randn(3, 400)
    metric = CovarianceMetric()
    metric.update(10, small)
    metric.update(30, large)
    outer = (small @ small.T / 40 * 10 + large @ large.T / 400 * 30) / 40
    mean = (small.mean(1) * 10 + large.mean(1) * 30) / 40
    want = (outer - torch.outer(mean, mean)).double()
    assert_within(metric.finalize(40), want, torch.tensor(1e-5))


def test_not_finite_is_zero_as_there() -> None:
    x = torch.tensor([[1.0, torch.nan, 3.0, torch.inf], [2.0, 1.0, -torch.inf, 0.0]])
    metric, clean = CovarianceMetric(), CovarianceMetric()
    metric.update(4, x)
    clean.update(4, x.nan_to_num(0, 0, 0))
    assert_bytes_equal(metric.finalize(4), clean.finalize(4))


def test_images_must_add_up() -> None:
    metric = CovarianceMetric()
    metric.update(4, torch.randn(2, 8))
    with pytest.raises(ArgumentError, match="images do not add up; got 5; expected 4"):
        metric.finalize(5)


def test_correlation_is_clamped_as_there() -> None:
    c = torch.tensor([[4e-8, 1e-8, 0.0], [1e-8, 1e-8, 0.0], [0.0, 0.0, 0.0]])
    std = torch.tensor([4e-8, 1e-8, 0.0]).sqrt()
    want = c / torch.clamp(std[:, None] * std[None], min=1e-7)
    assert_bytes_equal(compute_correlation(c), want)


# ---- matching --------------------------------------------------------------------------------


def assert_matrices(merge: Tensor, unmerge: Tensor, want: Tensor) -> None:
    assert_bytes_equal(unmerge, want)
    assert_bytes_equal(merge, (want / (want.sum(0) + 1e-5)).T)


def greedy_pairs(sims: np.ndarray, size: int) -> list[list[int]]:
    """ZipIt's groups of two models without alpha's growth: budgets of one merge within each."""
    sims = sims.copy()
    np.fill_diagonal(sims, -np.inf)
    groups = [[i] for i in range(len(sims))]
    model = [i // size for i in range(len(sims))]
    while len(groups) > size:
        a, b = sorted(divmod(int(sims.argmax()), len(groups)))
        low = np.minimum(sims[a], sims[b]) * np.float32(0.3)
        low[[a, b]] = -np.inf
        sims[a], sims[:, a] = low, low
        same = model[a] == model[b]
        groups[a] += groups.pop(b)
        owner = model[a]
        model.pop(b)
        sims = np.delete(np.delete(sims, b, 0), b, 1)
        if same:
            mine = np.array(model) == owner
            sims[np.ix_(mine, mine)] = -np.inf
    return groups


def test_zip_as_matrices() -> None:
    size = 12
    c = covariance(features(2, size))
    merge, unmerge = match_tensors_zipit({"covariance": c}, r=0.5, a=0.3, b=0.0)
    want = torch.zeros(2 * size, size)
    for g, members in enumerate(greedy_pairs(compute_correlation(c).numpy(), size)):
        want[members, g] = 1
    assert_matrices(merge, unmerge, want)


@pytest.mark.parametrize("models", [3, 4])
def test_zip_loses_nothing(models: int) -> None:
    c = covariance(features(models, 24))
    _, unmerge = match_tensors_zipit({"covariance": c}, r=1 - 1 / models, b=0.0)
    assert unmerge.shape == (24 * models, 24)
    assert bool((unmerge.sum(1) == 1).all())


@pytest.mark.parametrize("models", [2, 3])
def test_permute_as_matrices(models: int) -> None:
    size = 9
    c = covariance(features(models, size))
    r = compute_correlation(c).numpy()
    blocks = [torch.eye(size)]
    for i in range(1, models):
        block = r[:size, size * i : size * (i + 1)]
        _, columns = scipy.optimize.linear_sum_assignment(block, maximize=True)
        blocks.append(torch.eye(size)[columns].T)
        value = block[range(size), columns].mean()
    merge, unmerge, got = match_tensors_permute(
        {"covariance": c}, r=1 - 1 / models, get_merge_value=True
    )
    assert_matrices(merge, unmerge, torch.cat(blocks))
    assert abs(float(got) - value) < 1e-6


@pytest.mark.parametrize("match", [match_tensors_zipit, match_tensors_permute])
def test_bias_is_one_more_row(match) -> None:
    c = covariance(features(2, 5))
    _, plain = match({"covariance": c})
    merge, biased = match({"covariance": c}, add_bias=True)
    assert merge.shape == (5, 10)
    assert biased.shape == (12, 6)
    assert torch.equal(torch.cat([biased[:5, :5], biased[6:11, :5]]), plain)
    assert biased[5].tolist() == biased[11].tolist() == [0, 0, 0, 0, 0, 1]
    assert biased[:5, 5].tolist() == [0] * 5


def test_identity_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    c = covariance(features(2, 4))
    merge, unmerge = match_tensors_identity({"covariance": c})
    assert_matrices(merge, unmerge, torch.cat([torch.eye(4)] * 2))
    sims = torch.eye(4)
    sims[0, 2] = sims[2, 0] = 0.75
    sims[1, 3] = sims[3, 1] = 0.25
    got = match_tensors_zipit({"cossim": sims}, print_merges=True, get_merge_value=True)
    assert float(got[2]) == 0.5
    assert capsys.readouterr().out == "groups of one model: 0 | of several: 2\n"


# ---- in the place of ZipIt's ------------------------------------------------------------------


@pytest.fixture
def stand_ins() -> Iterator[dict[str, ModuleType]]:
    """Modules of ZipIt's names with functions of its signatures."""
    code = {
        "matching_functions": "def compute_correlation(covariance, eps=1e-7): return 1\n"
        "def match_tensors_identity(metric, r=.5, add_bias=False, **kwargs): return 2\n"
        "def match_tensors_permute(metric, r=.5, get_merge_value=False, add_bias=False, **kwargs):"
        " return 3\n"
        "def match_tensors_zipit(metric, r=.5, a=0.3, b=.125, print_merges=False, "
        "get_merge_value=False, add_bias=False, **kwargs): return 4\n",
        "metric_calculators": "def compute_correlation(covariance, eps=1e-7): return 5\n"
        "class CovarianceMetric:\n  def update(self, batch_size, *feats, **aux_params): pass\n",
        "model_merger": "from matching_functions import match_tensors_zipit as matching\n",
    }
    modules = {name: ModuleType(name) for name in code}
    with mock.patch.dict(sys.modules, modules):
        for name, text in code.items():
            exec(text, modules[name].__dict__)
        yield modules
        zipit.uninstall()


def test_install_and_uninstall(stand_ins: dict[str, ModuleType]) -> None:
    before = {m: dict(vars(module)) for m, module in stand_ins.items()}
    zipit.install()
    zipit.install()
    assert stand_ins["matching_functions"].match_tensors_zipit is match_tensors_zipit
    assert stand_ins["metric_calculators"].CovarianceMetric is CovarianceMetric
    assert stand_ins["model_merger"].matching is match_tensors_zipit
    zipit.uninstall()
    assert {m: dict(vars(module)) for m, module in stand_ins.items()} == before
    noise = torch.randn(72, 200, generator=torch.Generator().manual_seed(0))
    metric = {"covariance": covariance([noise])}
    with zipit.accelerated(host=True):
        match = stand_ins["matching_functions"].match_tensors_zipit
        with pytest.warns(RuntimeWarning, match="loses"):
            _, unmerge = match(metric, r=2 / 3, b=0.0)
    assert bool((unmerge.sum(1) == 0).any())
    assert {m: dict(vars(module)) for m, module in stand_ins.items()} == before


def test_install_refuses_what_it_does_not_know(stand_ins: dict[str, ModuleType]) -> None:
    before = dict(vars(stand_ins["matching_functions"]))
    exec("def compute_correlation(cov): pass", stand_ins["metric_calculators"].__dict__)
    with pytest.raises(BackendError, match="compute_correlation is not what this drop-in replaces"):
        zipit.install()
    assert dict(vars(stand_ins["matching_functions"])) == before


def test_install_without_zipit() -> None:
    with (
        mock.patch.dict(sys.modules, {"matching_functions": None}),
        pytest.raises(BackendError, match="matching_functions does not import"),
    ):
        zipit.install()
