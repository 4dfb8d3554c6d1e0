"""fold_adapter beside PEFT's merge_and_unload: no error above its own, of a float64 oracle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.test_peft_adapters import saved
from safetensors.torch import save_file
from torch import Tensor, nn

import mergekern as mk

from accuracy import assert_bits_equal, assert_within, half_ulp
from engine.models import read_folder
from required import peer

peft = peer("peft", "peft")
transformers = peer("transformers", "transformers")


class Encoder(nn.Module):
    """Every kind of layer that PEFT folds, one that it saves whole, one that it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.point = nn.Conv2d(8, 8, 1)
        self.names = nn.Embedding(11, 8)
        self.q = nn.Linear(8, 24)
        self.attn = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(16, 4)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = transformers.pytorch_utils.Conv1D(24, 8)  # weight [8, 24]
        self.c_proj = transformers.pytorch_utils.Conv1D(8, 8)


MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "layers": (
        Encoder,
        {"target_modules": ["stem", "point", "names", "q", "attn"], "modules_to_save": ["head"]},
    ),
    "biases": (Encoder, {"target_modules": ["stem", "q", "attn"], "bias": "all"}),
    "biases of factors": (Encoder, {"target_modules": ["stem", "q"], "lora_bias": True}),
    "rslora": (Encoder, {"target_modules": ["q"], "use_rslora": True, "r": 3}),
    "transposed": (Transposed, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


def trained(kind: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """A model of PEFT with random numbers in all that it trains, and its base."""
    of, settings = MODELS[kind]
    torch.manual_seed(0)
    model = of().to(dtype)
    base = copy.deepcopy(model.state_dict())
    config = peft.LoraConfig(init_lora_weights=False, **{"r": 4, "lora_alpha": 7, **settings})
    wrapped = peft.get_peft_model(model, config).to(dtype)
    with torch.no_grad():
        for x in wrapped.parameters():
            if x.requires_grad:
                x.copy_(torch.randn_like(x))
    return wrapped, base


def folded(wrapped: Any, base: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    saved(wrapped, folder / "adapter")
    save_file(base, folder / "model.safetensors")
    given = folder / "adapter", folder / "model.safetensors", folder / "out"
    mk.fold_adapter(*given, progress=False)
    return read_folder(folder / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_no_error_above_that_of_peft(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    wrapped, base = trained(kind, dtype)
    oracle = copy.deepcopy(wrapped).double().merge_and_unload().state_dict()
    got = folded(wrapped, base, tmp_path)
    theirs = wrapped.merge_and_unload().state_dict()
    assert set(got) == set(theirs) == set(base)
    for name, x in oracle.items():
        assert got[name].dtype == theirs[name].dtype == dtype
        # PEFT adds in float64 here what we add in float64: they may differ in its last places.
        slack = 2.0**-48 * float(x.abs().max())
        assert_within(got[name], x, half_ulp(x, dtype) + slack)
        ours, host = ((y[name].double() - x).abs().max() for y in (got, theirs))
        assert float(ours) <= float(host) + slack, name
        if torch.equal(base[name], theirs[name]):
            assert_bits_equal(got[name], base[name])


def test_an_attention_computes_what_it_did(tmp_path: Path) -> None:
    """PEFT's forward adds the task vector of the output projection twice; the fold does as well."""
    wrapped, base = trained("layers", torch.float64)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    got = Encoder().double()
    got.load_state_dict(folded(wrapped, base, tmp_path))
    with torch.no_grad():
        expected, y = (m.attn(x, x, x)[0] for m in (wrapped.base_model.model, got))
    assert_within(y, expected, torch.full_like(y, 2.0**-44 * float(y.abs().max())))
