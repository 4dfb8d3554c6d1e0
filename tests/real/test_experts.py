"""Experts of a small ViT on real images: adapters folded by us answer as PEFT's model does, and a
merge of factors is that of the folded weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergekern as mk

from accuracy import assert_within
from cifar import ROOT, Cifar10, Images

sys.path.append(str(ROOT))  # for the package `bench`; last, so that mergekern is what is installed

from experts import TASKS, State, network, pixels, seen, tune, with_adapter
from table_experts import changes, onto

CHOSEN = ("quarter turn", "inverted", "animals")
RATE, STEPS = 1e-2, 3


@pytest.fixture(scope="module")
def images() -> Images:
    """500 of all classes."""
    cifar = Cifar10()
    return pixels(cifar, cifar.test_indices()[::20])


@pytest.fixture(scope="module")
def base() -> State:
    torch.manual_seed(0)
    return network().state_dict()


@pytest.fixture(scope="module")
def adapters(
    images: Images, base: State, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Tensor]]:
    """PEFT's folder of each task, and what its model answers."""
    pytest.importorskip("peft", reason="peft: not installed")
    found = {}
    for seed, name in enumerate(CHOSEN):
        model = with_adapter(base, seed)
        tune(model, images, TASKS[name], RATE, STEPS, seed)
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        with torch.inference_mode():
            found[name] = folder, model(seen(TASKS[name], images.x))
    return found


def answers(state: State, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return network(state)(x)


def test_a_folded_adapter_answers_as_pefts_model(
    images: Images, base: State, adapters: dict[str, tuple[Path, Tensor]]
) -> None:
    for name, (folder, expected) in adapters.items():
        x = seen(TASKS[name], images.x)
        got = answers(onto(base, changes(mk.load_adapter(folder))), x)
        # Float32 in another order: sums of at most 576 products in each of 20 layers one above the
        # other, relative to the largest answer.
        bound = 20 * 576 * 2.0**-24 * float(expected.abs().max())
        assert_within(got, expected.double(), torch.tensor(bound))
        far = (answers(base, x) - expected).abs().max()
        assert far > bound  # the adapter says something


@pytest.mark.parametrize("method", ["cat", "knots_ta", "core_ta"])
def test_merged_factors_are_merged_weights(
    method: str, base: State, adapters: dict[str, tuple[Path, Tensor]]
) -> None:
    folders = [folder for folder, _ in adapters.values()]
    whole = [onto(base, changes(mk.load_adapter(folder))) for folder in folders]
    expected = mk.merge_state_dicts(whole, "task_arithmetic", base=base, weight=0.4)
    got = onto(base, changes(mk.merge_adapters(folders, method, weight=0.4)))
    for key, x in expected.items():
        # Each folded weight is rounded once, and each sum of three task vectors a few times.
        assert_within(got[key], x.double(), 16 * 2.0**-24 * x.double().abs().max())


def test_what_the_adapters_of_tasks_share(adapters: dict[str, tuple[Path, Tensor]]) -> None:
    """Spectra of trained factors against those of dense matrices; a merge by `cat` keeps all."""
    folders = [folder for folder, _ in adapters.values()]
    study = mk.study_adapters(folders, mk.merge_adapters(folders, "cat"))
    assert len(study.modules) == 16
    for i, folder in enumerate(folders):
        for name, f in mk.load_adapter(folder).modules.items():
            spectrum = study.modules[name].spectra[i]
            assert spectrum is not None
            exact = torch.linalg.svdvals(f.delta())
            error = torch.tensor(64 * 2.0**-52 * f.scale * float(f.a.norm() * f.b.norm()))
            assert_within(torch.tensor(spectrum, dtype=exact.dtype), exact[: len(spectrum)], error)
            kept = study.modules[name].kept
            assert kept is not None
            # The factors of `cat` are rounded to float32.
            assert_within(torch.tensor(kept), torch.ones(()).double(), torch.tensor(2.0**-20))
