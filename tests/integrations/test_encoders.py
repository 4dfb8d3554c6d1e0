"""Encoders that mergekit drops or refuses, merged by the command line and loaded without a gap.

Tiny random models of transformers, saved as it saves them. Every tensor of the checkpoint must be
in the result with the value its method gives, and the result must load with no key missing,
unexpected or mismatched. mergekit 0.1.5 loses the blocks of ViT, DeiT and BEiT, 16 of 43 tensors of
DINOv2 and the head of BertForQuestionAnswering, and refuses BertModel, RobertaModel,
DistilBertModel, BertForMaskedLM, CLIPModel, ConvNeXt, ResNet, Wav2Vec2, Whisper and T5 v1.0.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accuracy import assert_bits_equal, assert_bytes_equal
from required import peer

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import mergekern as mk
from mergekern import cli

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

transformers = peer("transformers", "transformers")

SEED = 7
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.3, "lambda": 0.9},
    "della": {"density": 0.5, "epsilon": 0.2, "lambda": 0.9},
}
WEIGHTS = [0.7, 0.4, -0.2]


class Encoder(NamedTuple):
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]  # of a forward pass


def ids(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 19 + 3


def image(size: int = 16) -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)


def text_inputs() -> dict[str, Tensor]:
    return {"input_ids": ids(2, 7)}


def image_inputs(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": image(size)}


def pair_inputs() -> dict[str, Tensor]:
    return text_inputs() | image_inputs()


def patch_inputs() -> dict[str, Tensor]:
    """Siglip2 takes patches and how many of them lie in each direction."""
    return {
        "input_ids": ids(2, 7),
        "pixel_values": image().reshape(2, 16, 48),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def sequence_inputs() -> dict[str, Tensor]:
    return {"input_ids": ids(2, 7), "decoder_input_ids": ids(2, 3)}


def whisper_inputs() -> dict[str, Tensor]:
    return {
        "input_features": torch.linspace(-1, 1, 2 * 8 * 24).reshape(2, 8, 24),
        "decoder_input_ids": ids(2, 3),
    }


def sound_inputs() -> dict[str, Tensor]:
    return {"input_values": torch.linspace(-1, 1, 2 * 400).reshape(2, 400)}


TRUNK = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TEXT = {**TRUNK, "vocab_size": 31, "max_position_embeddings": 24, "pad_token_id": 1}
VISION = {**TRUNK, "image_size": 16, "patch_size": 4}
CLIP_TEXT = {**TEXT, "bos_token_id": 0, "eos_token_id": 2}
T5 = {
    "vocab_size": 31,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
WHISPER = {
    "vocab_size": 31,
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_source_positions": 12,
    "max_target_positions": 9,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    "decoder_start_token_id": 2,
}
SOUND = {
    **TRUNK,
    "vocab_size": 31,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}

ENCODERS = {
    "BertModel": Encoder(TEXT, text_inputs),
    "BertForMaskedLM": Encoder(TEXT, text_inputs),
    "BertForQuestionAnswering": Encoder(TEXT, text_inputs),
    "BertForSequenceClassification": Encoder(TEXT, text_inputs),
    "RobertaModel": Encoder(TEXT, text_inputs),
    "DistilBertModel": Encoder(
        {
            "vocab_size": 31,
            "max_position_embeddings": 24,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
        },
        text_inputs,
    ),
    "ViTModel": Encoder(VISION, image_inputs),
    "ViTForImageClassification": Encoder({**VISION, "num_labels": 5}, image_inputs),
    "DeiTModel": Encoder(VISION, image_inputs),
    "BeitModel": Encoder(
        {**VISION, "use_relative_position_bias": True, "layer_scale_init_value": 0.1}, image_inputs
    ),
    "Dinov2Model": Encoder(VISION, image_inputs),
    "CLIPModel": Encoder(
        {"text_config": CLIP_TEXT, "vision_config": VISION, "projection_dim": 12}, pair_inputs
    ),
    "CLIPVisionModel": Encoder(VISION, image_inputs),
    "CLIPVisionModelWithProjection": Encoder({**VISION, "projection_dim": 12}, image_inputs),
    "SiglipModel": Encoder({"text_config": CLIP_TEXT, "vision_config": VISION}, pair_inputs),
    "Siglip2Model": Encoder(
        {
            "text_config": CLIP_TEXT,
            "vision_config": {**TRUNK, "patch_size": 4, "num_patches": 16},
        },
        patch_inputs,
    ),
    "ConvNextModel": Encoder(
        {"hidden_sizes": [8, 8, 12, 12], "depths": [1, 1, 2, 1], "num_stages": 4},
        functools.partial(image_inputs, 64),
    ),
    "ResNetModel": Encoder(
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1], "layer_type": "basic"},
        functools.partial(image_inputs, 32),
    ),
    "Wav2Vec2Model": Encoder(SOUND, sound_inputs),
    "WhisperModel": Encoder(WHISPER, whisper_inputs),
    "WhisperForConditionalGeneration": Encoder(WHISPER, whisper_inputs),
    "T5EncoderModel": Encoder(T5, text_inputs),
    "T5ForConditionalGeneration": Encoder(T5, sequence_inputs),
}


def make(name: str) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**ENCODERS[name].config)).eval()


def fine_tuned(model: Any, seed: int) -> Any:
    """Noise on every float in place (so that what is tied stays tied), squares stay positive."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, x in [*model.named_parameters(), *model.named_buffers()]:
            if x.is_floating_point():
                noise = 0.05 * torch.randn(x.shape, generator=g)
                x += (noise.abs() if key.endswith("running_var") else noise).to(x.dtype)
    return model


def save_family(root: Path, name: str, dtype: torch.dtype = torch.float32) -> list[Path]:
    """The base and three fine-tunes of it, as save_pretrained writes them."""
    folders = []
    for seed in range(4):
        model = make(name).to(dtype)
        folders.append(root / f"{name}-{seed}")
        (fine_tuned(model, seed) if seed else model).save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[Path]]:
    name: str = request.param
    return name, save_family(tmp_path_factory.mktemp("encoders"), name)


def configuration(method: str, folders: list[Path]) -> dict[str, Any]:
    """linear: base and fine-tunes are models alike; the others: task vectors from the base."""
    listed = folders[:3] if method == "linear" else folders[1:]
    config = {
        "merge_method": method,
        "models": [
            {"model": str(p), "parameters": {"weight": w}}
            for p, w in zip(listed, WEIGHTS, strict=True)
        ],
        "parameters": METHODS[method],
    }
    return config if method == "linear" else {**config, "base_model": str(folders[0])}


def merge(
    config: dict[str, Any], out: Path, capfd: pytest.CaptureFixture[str], *options: str
) -> str:
    """`mergekern merge`, and what it printed."""
    file = out.with_suffix(".yml")
    file.write_text(json.dumps(config))
    capfd.readouterr()
    code = cli.run(["merge", str(file), str(out), "--seed", str(SEED), *options])
    printed, errors = capfd.readouterr()
    assert (code, errors) == (0, "")
    return printed


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, as it lies in the files."""
    return {k: x for f in sorted(folder.glob("*.safetensors")) for k, x in load_file(f).items()}


def assert_merged(method: str, folders: list[Path], out: Path) -> dict[str, Tensor]:
    """Every tensor of the base's files is in the result, with the method's value."""
    base, *models = map(weights, folders)
    xs = [base, *models[:2]] if method == "linear" else models
    merged = weights(out)
    assert set(merged) == set(base)
    for key, original in base.items():
        if not original.is_floating_point():
            assert_bytes_equal(merged[key], original)
            continue
        expected = mk.merge_tensors(
            [x[key] for x in xs],
            method,
            base=None if method == "linear" else original,
            name=key,
            seed=SEED,
            weight=WEIGHTS,
            **METHODS[method],
        )
        assert_bits_equal(merged[key], expected)
    return merged


def load(name: str, folder: Path) -> Any:
    """The model, by its own class, with nothing left over on either side."""
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    odd = {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
    assert not odd, odd
    return model.eval()


def shared(model: Any) -> list[list[str]]:
    """Names of parameters that are one and the same."""
    owners: dict[int, list[str]] = {}
    for key, x in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(x), []).append(key)
    return sorted(keys for keys in owners.values() if len(keys) > 1)


def assert_runs(name: str, model: Any) -> None:
    with torch.no_grad():
        output = model(**ENCODERS[name].inputs())
    tensors = [x for x in output.to_tuple() if isinstance(x, Tensor)]
    assert tensors
    for x in tensors:
        assert x.isfinite().all()


# ---- tests -----------------------------------------------------------------------------------


def test_the_three_methods_are_there() -> None:
    assert set(METHODS) <= set(mk.methods())


@pytest.mark.parametrize("method", [m for m in METHODS if m in mk.methods()])
@pytest.mark.parametrize("family", ENCODERS, indirect=True)
def test_encoder_merges_completely(
    family: tuple[str, list[Path]],
    method: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name, folders = family
    out = tmp_path / "merged"
    printed = merge(configuration(method, folders), out, capfd)
    merged = assert_merged(method, folders, out)
    integers = sum(not x.is_floating_point() for x in merged.values())
    assert f"{len(merged) - integers} tensors merged, {integers} copied" in printed
    model = load(name, out)
    assert shared(model) == shared(load(name, folders[0]))
    assert_runs(name, model)
    model.save_pretrained(tmp_path / "again")  # what was loaded is what was merged
    again = weights(tmp_path / "again")
    assert set(again) == set(merged)
    for key, x in again.items():
        assert_bytes_equal(x, merged[key])


@pytest.mark.parametrize("method", [m for m in METHODS if m in mk.methods()])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "SiglipModel", "ConvNextModel", "ResNetModel"])
def test_bfloat16(
    name: str, method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = save_family(tmp_path, name, torch.bfloat16)
    out = tmp_path / "merged"
    merge(configuration(method, folders), out, capfd)
    merged = assert_merged(method, folders, out)
    assert {x.dtype for x in merged.values() if x.is_floating_point()} == {torch.bfloat16}
    load(name, out)


def test_old_checkpoint_with_position_ids_and_tied_weights_stored_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As older transformers wrote BERT: a pickle, a buffer, the tied decoder as well."""
    name, tied = "BertForMaskedLM", "cls.predictions.decoder"
    folders = save_family(tmp_path, name)
    for folder in folders:
        state = weights(folder)
        state["bert.embeddings.position_ids"] = torch.arange(24)[None]
        state[f"{tied}.weight"] = state["bert.embeddings.word_embeddings.weight"]
        state[f"{tied}.bias"] = state["cls.predictions.bias"]
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    out = tmp_path / "merged"
    merge(configuration("ties", folders), out, capfd)
    merged = weights(out)
    assert_bytes_equal(merged["bert.embeddings.position_ids"], torch.arange(24)[None])
    both = (f"{tied}.weight", "bert.embeddings.word_embeddings.weight")
    assert_bits_equal(*(merged[key] for key in both))
    model = load(name, out)
    assert shared(model)
    assert_bits_equal(model.get_output_embeddings().weight, merged[both[0]])
    assert_runs(name, model)


def test_counters_that_differ_are_copied_when_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fine-tunes of a network with batch norm have seen different numbers of batches."""
    name = "ResNetModel"
    folders = save_family(tmp_path, name)
    for i, folder in enumerate(folders):
        state = weights(folder)
        for key in state:
            if key.endswith("num_batches_tracked"):
                state[key] += 100 * i
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    config, out = configuration("ties", folders), tmp_path / "merged"
    with pytest.raises(mk.CheckpointError, match=r"num_batches_tracked: int64 values differ in "):
        mk.merge_checkpoints(config, out, progress=False)
    copied = {"filter": "num_batches_tracked", "action": "copy", "from": str(folders[0])}
    merge({**config, "exceptions": [copied]}, out, capfd)
    assert_merged("ties", folders, out)
    assert_runs(name, load(name, out))


@pytest.mark.parametrize("out_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_host_mergekit_gives_the_bits_of_its_command(
    dtype: str | None, out_dtype: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where it knows all tensors: mergekit-pytorch, which takes files; nothing is selected."""
    peer("mergekit", "mergekit")
    folders = save_family(tmp_path, "BertForSequenceClassification")
    files = [folder / "model.safetensors" for folder in folders]
    config = {**configuration("ties", files), "merge_method": "task_arithmetic"}
    config |= {"parameters": {"lambda": 0.9}, "dtype": dtype, "out_dtype": out_dtype}
    theirs, out = tmp_path / "theirs", tmp_path / "ours"
    merge(config, out, capfd, "--host", "mergekit")
    command = "from mergekit.scripts.merge_raw_pytorch import main; main()"
    subprocess.run(
        [sys.executable, "-c", command, str(out.with_suffix(".yml")), str(theirs)],
        check=True,
        capture_output=True,
    )
    expected = weights(theirs)
    assert set(expected) == set(weights(out))
    for key, x in weights(out).items():
        assert_bits_equal(x, expected[key])


def test_what_the_encoders_are_made_of(tmp_path: Path) -> None:
    """The hard cases are really there: scalars, depthwise convolutions, norms, counters, ties."""
    kinds = {}
    for name in ("SiglipModel", "CLIPModel", "ConvNextModel", "ResNetModel", "BeitModel"):
        make(name).save_pretrained(tmp_path / name)
        kinds[name] = weights(tmp_path / name)
    assert {"logit_scale", "logit_bias"} <= set(kinds["SiglipModel"])
    assert kinds["SiglipModel"]["logit_bias"].shape == (1,)
    assert kinds["CLIPModel"]["logit_scale"].shape == ()
    assert any(x.ndim == 4 and x.shape[1:] == (1, 7, 7) for x in kinds["ConvNextModel"].values())
    assert any(k.endswith("num_batches_tracked") for k in kinds["ResNetModel"])
    assert all(any(x.ndim == 1 for x in state.values()) for state in kinds.values())
    assert all(shared(make(n)) for n in ("BertForMaskedLM", "T5ForConditionalGeneration"))
