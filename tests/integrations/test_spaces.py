"""discover_spaces on encoders of transformers, known by none of their names.

Each model is small and random. Its movable spaces are exact, no more can be found by letting the
outputs move than those outputs' own, and every attention has its heads.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from align.networks import assert_same_output, reordered
from required import peer

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import mergekern as mk
from mergekern.align.spaces import Spaces
from mergekern.align.tracing.program import state_of

from accuracy import assert_bytes_equal

pytestmark = pytest.mark.filterwarnings("ignore")

transformers = peer("transformers", "transformers")

EXACT = 1e-11  # of outputs in float64; a wrong space changes them by 1e-3 and more
ROUNDED = {"t5": 1e-5, "qwen3": 1e-5}  # their norms compute in float32
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {"intermediate_size": 48}
VISION = {"image_size": 16, "patch_size": 4}
TEXT = {
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "sep_token_id": 2,
}


class Encoder(NamedTuple):
    """A class of transformers, its settings, and how many of its spaces move (outputs free)."""

    name: str
    settings: dict[str, Any]
    movable: int
    attentions: int = 2
    config: str = ""


ENCODERS = {
    "vit": Encoder("ViTModel", {**SIZE, **MLP, **VISION}, 8),
    "deit": Encoder("DeiTModel", {**SIZE, **MLP, **VISION}, 8),
    "dinov2": Encoder("Dinov2Model", {**SIZE, **VISION}, 7),
    "dinov2_swiglu": Encoder("Dinov2Model", {**SIZE, **VISION, "use_swiglu_ffn": True}, 7),
    "dinov2_other_size": Encoder("Dinov2Model", {**SIZE, **VISION, "image_size": 24}, 7),
    "dinov2_registers": Encoder(
        "Dinov2WithRegistersModel", {**SIZE, **VISION, "num_register_tokens": 2}, 7
    ),
    "dinov3": Encoder(
        "DINOv3ViTModel",
        {**SIZE, **MLP, **VISION, "num_register_tokens": 2, "use_gated_mlp": True},
        7,
        config="DINOv3ViTConfig",
    ),
    "clip_vision": Encoder(
        "CLIPVisionModelWithProjection",
        {**SIZE, **MLP, **VISION, "projection_dim": 24},
        8,
        config="CLIPVisionConfig",
    ),
    "clip_text": Encoder(
        "CLIPTextModelWithProjection",
        {**SIZE, **MLP, **TEXT, "projection_dim": 24},
        8,
        config="CLIPTextConfig",
    ),
    "siglip_vision": Encoder(
        "SiglipVisionModel", {**SIZE, **MLP, **VISION}, 11, config="SiglipVisionConfig"
    ),
    "siglip_text": Encoder("SiglipTextModel", {**SIZE, **MLP, **TEXT}, 8, 2, "SiglipTextConfig"),
    "beit": Encoder("BeitModel", {**SIZE, **MLP, **VISION, "use_relative_position_bias": True}, 9),
    "bert": Encoder("BertModel", {**SIZE, **MLP, **TEXT}, 8),
    "roberta": Encoder("RobertaModel", {**SIZE, **MLP, **TEXT}, 8),
    "distilbert": Encoder(
        "DistilBertModel",
        {"vocab_size": 50, "n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 48},
        7,
    ),
    "modernbert": Encoder("ModernBertModel", {**SIZE, **MLP, **TEXT}, 7),
    # Its bias of relative positions is shared by all layers, and so are the heads' places.
    "t5": Encoder(
        "T5EncoderModel",
        {"vocab_size": 50, "num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 48},
        8,
        1,
        config="T5Config",
    ),
    "qwen3": Encoder(
        "Qwen3Model",
        {**SIZE, **MLP, **TEXT, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False},
        7,
    ),
    "swin": Encoder(
        "SwinModel",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4]}
        | {"window_size": 4},
        18,
        4,
    ),
    "convnext": Encoder(
        "ConvNextModel", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, 4, 0
    ),
    "resnet": Encoder(
        "ResNetModel", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]}, 11, 0
    ),
    "regnet": Encoder(
        "RegNetModel",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
        9,
        0,
    ),
    "mobilenet": Encoder("MobileNetV2Model", {"image_size": 32, "depth_multiplier": 0.5}, 25, 0),
}


@functools.cache
def encoder(name: str) -> tuple[nn.Module, Any]:
    made = ENCODERS[name]
    config = made.config or made.name.replace("Model", "Config")
    torch.manual_seed(0)
    known: Callable[..., Any] = getattr(transformers, config)
    model = getattr(transformers, made.name)(known(**made.settings)).double().eval()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.rand(x.shape) + 0.5 if x.ndim < 2 else torch.randn(x.shape) / 4)
    if any("vocab" in key for key in made.settings):
        return model, torch.randint(3, 50, (2, 7))
    return model, torch.randn(2, 3, 16, 16, dtype=torch.float64)


@functools.cache
def spaces_of(name: str) -> Spaces:
    return mk.discover_spaces(*encoder(name), outputs="free")


@pytest.mark.parametrize("name", ENCODERS)
def test_every_space_is_exact(name: str) -> None:
    spaces = spaces_of(name)
    assert len(spaces.movable) == ENCODERS[name].movable, str(spaces)
    assert spaces.verify(*encoder(name)).error < ROUNDED.get(name, EXACT)


@pytest.mark.parametrize("name", ENCODERS)
def test_fixed_outputs_hold_their_spaces(name: str) -> None:
    fixed = mk.discover_spaces(*encoder(name))
    assert set(fixed.movable) < set(spaces_of(name).movable)
    assert fixed.verify(*encoder(name)).error < ROUNDED.get(name, EXACT)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_attention_has_its_heads(name: str) -> None:
    """Queries and keys, and values, in one group of heads for each attention of tokens."""
    groups = spaces_of(name).groups().values()
    attentions = [g for g in groups if any("multiplied" in str(s.approximate) for s in g)]
    assert all(g[0].heads in (2, 4) for g in attentions)
    assert len(attentions) == ENCODERS[name].attentions


@pytest.mark.parametrize("name", ["vit", "bert", "clip_vision", "convnext"])
def test_nothing_is_left_out(name: str) -> None:
    """Every axis of every weight belongs to a space, movable or fixed for a reason."""
    model, _ = encoder(name)
    known = {(p.name, p.axis) for space in spaces_of(name).values() for p in space.places}
    for tensor, x in state_of(model).items():
        if x.ndim == 2 and tensor in model.state_dict():
            assert {(tensor, 0), (tensor, 1)} <= known, tensor


def test_a_mask_of_padding_and_named_inputs() -> None:
    model, ids = encoder("bert")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][:, 5:] = 0
    spaces = mk.discover_spaces(model, inputs, outputs=["pooler_output"])
    assert spaces.verify(model, inputs).error < EXACT
    assert len(spaces.movable) == 7
    more = {key: torch.cat([x] * 3) for key, x in inputs.items()}
    assert spaces.verify(model, more).error < EXACT


def test_outputs_named_free_the_others() -> None:
    model, images = encoder("clip_vision")
    spaces = mk.discover_spaces(model, images, outputs=["image_embeds"])
    assert len(spaces.movable) == 7
    assert spaces.verify(model, images).error < EXACT


def test_rotary_pairs_stay_in_their_heads() -> None:
    turned = [s for s in spaces_of("dinov3").movable.values() if s.inside]
    assert [(s.size, s.heads) for s in turned] == [(16, 4), (16, 4)]
    assert all(p.positions.shape == (16, 2) for s in turned for p in s.places)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_reordered_encoder_is_merged_back(name: str) -> None:
    """Weights to the bit; behind a cut each head is its own model."""
    model, inputs = encoder(name)
    models, match = reordered(model, mk.discover_spaces(model, inputs), 2)
    for key, x in mk.apply(models, match).state_dict().items():
        assert_bytes_equal(x, model.state_dict()[key])
    cuts = [c for c in match.spaces.movable if "relative" not in c]  # biases lie within weights
    with torch.no_grad():
        expected = [each(inputs) for each in models]
        for until in cuts[::3]:
            outputs = mk.apply(models, match, until=until)(inputs)
            for output, y in zip(outputs, expected, strict=True):
                assert type(output) is type(y)
                assert_same_output(output, y)
