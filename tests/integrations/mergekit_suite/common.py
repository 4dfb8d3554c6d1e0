"""What mergekit's tests import as `tests.common`: tiny models, and a merge that is looked at.

The source distribution of mergekit lacks that file. This one is written from what the tests ask
for: names, arguments, the sizes and tensor names they look at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}


def saved(model: Any, path: object) -> str:
    model.save_pretrained(path, safe_serialization=True)
    return str(path)


def make_picollama(path: object, vocab_size: int = 64) -> str:
    return saved(LlamaForCausalLM(LlamaConfig(**DECODER | {"vocab_size": vocab_size})), path)


def make_picogranite(path: object, vocab_size: int = 64) -> str:
    return saved(GraniteForCausalLM(GraniteConfig(**DECODER | {"vocab_size": vocab_size})), path)


def make_gpt2size(path: object, vocab_size: int = 64) -> str:
    """As many layers as GPT-2: a test takes [0, 12] of them."""
    config = GPT2Config(vocab_size=vocab_size, n_embd=32, n_head=4, n_layer=12, n_positions=64)
    return saved(GPT2LMHeadModel(config), path)


def make_picoLlaVa(path: object) -> str:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**DECODER))
    return saved(LlavaForConditionalGeneration(config), path)


def tensors_of(path: str) -> LazyTensorLoader:
    return LazyTensorLoader.from_disk(path)


def run_and_check_merge(
    config: MergeConfiguration,
    validate: Callable[[str], None] | None = None,
    auto_arch: bool = False,
) -> None:
    """Merge; every tensor is there and finite; then what the test itself looks at."""
    with tempfile.TemporaryDirectory() as folder:
        run_merge(config, folder, MergeOptions(quiet=True))
        assert (Path(folder) / "config.json").is_file()
        out = tensors_of(folder)
        names = set(out.index.tensor_paths)
        if config.models:
            source = tensors_of(str(config.models[0].model.model.path))
            assert names == set(source.index.tensor_paths)
        assert names
        for name in names:
            assert out.get_tensor(name).isfinite().all(), name
        if validate:
            validate(folder)
