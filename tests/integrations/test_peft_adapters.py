"""Adapters that PEFT wrote, and PEFT on those that mergekern wrote."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mergekern.adapters.files import load_adapter, save_adapter
from mergekern.adapters.merge import merge_adapters
from mergekern.errors import CheckpointError

from accuracy import assert_bits_equal, assert_within
from required import peer

peft = peer("peft", "peft")
lora = peer("peft.tuners.lora.model", "peft")


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.names = nn.Embedding(11, 8)
        self.q = nn.Linear(8, 24)
        self.fc = nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)


TARGETS = ["stem", "names", "q", "fc"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"fc": 2}, "alpha_pattern": {"q": 3}},
}


def wrapped(seed: int, targets: list[str] = TARGETS, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = Encoder()
    torch.manual_seed(seed)
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


def deltas(model: Any, name: str = "default") -> dict[str, Tensor]:
    inner = model.base_model.model
    return {t: getattr(inner, t).get_delta_weight(name).detach().double() for t in TARGETS}


def saved(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def bound(x: Tensor, steps: int = 256) -> Tensor:
    return torch.full_like(x, steps * 2.0**-24 * float(x.abs().max()))


@pytest.mark.parametrize("settings", SETTINGS)
def test_task_vectors_are_those_of_peft(settings: str, tmp_path: Path) -> None:
    model = wrapped(1, **SETTINGS[settings])
    got = load_adapter(saved(model, tmp_path))
    expected = deltas(model)
    assert set(got.modules) == set(expected)
    for name, x in expected.items():
        assert_within(got.modules[name].delta(), x, bound(x))


def test_modules_to_save_are_kept(tmp_path: Path) -> None:
    model = wrapped(1, r=2, modules_to_save=["head"])
    got = load_adapter(saved(model, tmp_path))
    assert set(got.saved) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("settings", SETTINGS)
def test_peft_loads_what_was_saved(settings: str, tmp_path: Path) -> None:
    model = wrapped(1, **SETTINGS[settings])
    save_adapter(load_adapter(saved(model, tmp_path / "a")), tmp_path / "b")
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Encoder(), tmp_path / "b")
    for name, x in deltas(model).items():
        assert_within(deltas(again)[name], x, bound(x))


KINDS = ("svd", "cat", "ties_svd", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd")
APART = ("linear", "ties", "magnitude_prune", "dare_linear", "dare_ties")
WEIGHTS = [0.7, -0.4]


def combined(kind: str, tmp_path: Path, **given: Any) -> tuple[Any, Any]:
    """PEFT's model with the adapter "sum", and ours of the same folders, random draws included.

    PEFT first draws an adapter that it overwrites, then in the order of modules; we in that of
    names: one module, and a seed when the former is done.
    """
    targets = ["q"] if "dare" in kind else TARGETS
    model, other = (wrapped(i, targets, r=4, lora_alpha=4 * (3 - i)) for i in (1, 2))
    folders = [saved(m, tmp_path / str(i)) for i, m in enumerate((model, other))]
    model.load_adapter(folders[1], adapter_name="other")
    reseed = mock.Mock(side_effect=lambda *_: torch.manual_seed(4))
    with mock.patch.object(lora, "_freeze_adapter", reseed):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "sum", kind, density=0.5, **given)
    torch.manual_seed(4)
    rank, density = (
        given.get("svd_rank"),
        {} if kind in ("svd", "cat", "linear") else {"density": 0.5},
    )
    return model, merge_adapters(folders, kind, weight=WEIGHTS, rank=rank, host="peft", **density)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_combines_the_same(kind: str, tmp_path: Path) -> None:
    model, merged = combined(kind, tmp_path, **({} if kind == "cat" else {"svd_rank": 6}))
    for name, f in merged.modules.items():
        expected = getattr(model.base_model.model, name).get_delta_weight("sum").detach().double()
        assert_within(f.delta(), expected, bound(expected, 2048))


@pytest.mark.parametrize("kind", APART)
def test_peft_combines_factors_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    """But for the sign of zeros."""
    model, merged = combined(kind, tmp_path)
    for name, f in merged.modules.items():
        layer = getattr(model.base_model.model, name)
        if f.embedding:
            a, b = layer.lora_embedding_A["sum"], layer.lora_embedding_B["sum"]
        else:
            a, b = layer.lora_A["sum"].weight, layer.lora_B["sum"].weight
        assert_bits_equal(f.a, a.detach().flatten(1) + 0.0)
        assert_bits_equal(f.b, b.detach().flatten(1) + 0.0)


def test_peft_finds_the_modules_of_a_union(tmp_path: Path) -> None:
    """Of adapters that target different ones; the first one's settings alone would lose some."""
    models = []
    for seed, targets in ((1, ["q"]), (2, ["fc", "stem"])):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        models.append(peft.get_peft_model(Encoder(), config))
    folders = [saved(m, tmp_path / str(i)) for i, m in enumerate(models)]
    merge_adapters(folders, "cat", union=True, out=tmp_path / "both")
    both = peft.PeftModel.from_pretrained(Encoder(), tmp_path / "both").base_model.model
    for model, names in zip(models, (["q"], ["fc", "stem"]), strict=True):
        for name in names:
            of = (getattr(m, name) for m in (model.base_model.model, both))
            expected, got = (m.get_delta_weight("default").detach().double() for m in of)
            assert_within(got, expected, bound(expected))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_whose_factors_come_out_of_the_base_are_refused(init: str, tmp_path: Path) -> None:
    """PEFT changes the base too when it adds one; added to the plain base it is another model."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8))
    base = net[0].weight.detach().clone()
    config = peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=init)
    model = peft.get_peft_model(net, config)
    assert not torch.equal(model.base_model.model[0].base_layer.weight, base)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="taken out of its base; got init_lora_weights"):
        load_adapter(tmp_path)
