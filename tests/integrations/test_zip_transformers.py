"""mergekern zip on checkpoints of transformers, into a folder that transformers loads."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from accuracy import assert_bytes_equal
from required import peer

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import mergekern as mk
from mergekern import cli

pytestmark = pytest.mark.filterwarnings("ignore")

transformers = peer("transformers", "transformers")

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {**SIZE, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
BERT = {**SIZE, "intermediate_size": 24, "vocab_size": 30, "max_position_embeddings": 12}
RNG = np.random.default_rng(0)


def folders(root: Path, kind: str, settings: dict[str, Any], seeds: int = 2) -> list[Path]:
    config = getattr(transformers, f"{kind}Config")(**settings)
    made = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        made.append(root / f"{kind}{seed}")
        getattr(transformers, f"{kind}Model")(config).save_pretrained(made[-1])
    return made


@pytest.fixture
def vits(tmp_path: Path) -> list[Path]:
    found = folders(tmp_path, "ViT", VIT)
    preprocessor = {
        "size": {"height": 8, "width": 8},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (found[0] / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    image = pytest.importorskip("PIL.Image", reason="pillow: not installed")
    (tmp_path / "images").mkdir()
    for i in range(20):
        pixels = RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return found


def zipped(*arguments: object) -> int:
    return cli.run(["zip", "--no-picture", *map(str, arguments)])


def test_images_and_an_output_that_transformers_loads(vits: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--model", vits[0], "--data", tmp_path / "images", *vits]
    assert zipped(*given, "--out", out, "--outputs", "pooler_output") == 0
    assert (out / "preprocessor_config.json").is_file()
    model, found = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(found.values())
    inputs = json.loads((out / "zip.json").read_text())["inputs"]
    assert inputs == {"pixel_values": {"dtype": "float32", "shape": [3, 8, 8]}}
    loaded = mk.load_zip(out, transformers.ViTModel(model.config))
    for name, x in model.state_dict().items():
        assert_bytes_equal(loaded.state_dict()[name], x)


def test_a_partial_zip_is_loaded_with_its_heads(vits: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--model", vits[0], "--data", tmp_path / "images", *vits, "--out", out]
    assert zipped(*given, "--until", "layers.0.mlp.fc1") == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "labels.safetensors",
        "model.safetensors",
        "zip.json",
    ]
    models = [transformers.AutoModel.from_pretrained(path) for path in vits]
    partial = mk.load_zip(out, transformers.ViTModel(models[0].config))
    with torch.no_grad():
        outputs = partial(pixel_values=torch.zeros(3, 3, 8, 8))
    assert [y.last_hidden_state.shape for y in outputs] == [(3, 5, 16)] * 2
    for i, model in enumerate(models):
        name = "pooler.dense.weight"
        assert_bytes_equal(partial.state_dict()[f"heads.{i}.{name}"], model.state_dict()[name])


@pytest.fixture
def berts(tmp_path: Path) -> list[Path]:
    tokens = RNG.integers(0, 30, (40, 9))
    marks = (np.arange(9) < RNG.integers(2, 10, (40, 1))).astype(np.int64)
    np.savez(tmp_path / "text.npz", input_ids=tokens, attention_mask=marks)
    return folders(tmp_path, "Bert", BERT)


def test_tokens_with_padding(berts: list[Path], tmp_path: Path) -> None:
    """A reordered model is found in the same bits, by tokens that are none of the padding."""
    data = np.load(tmp_path / "text.npz")
    inputs = {name: torch.from_numpy(data[name]) for name in data.files}
    model = transformers.AutoModel.from_pretrained(berts[0]).eval()
    outputs = ["pooler_output"]
    spaces = mk.discover_spaces(model, inputs, outputs=outputs)
    state = load_file(berts[0] / "model.safetensors")
    save_file(spaces.permuted(spaces.random(1), state), berts[1] / "model.safetensors")
    given = ["--model", berts[0], "--data", tmp_path / "text.npz", "--mask", "attention_mask"]
    given += ["--method", "permute", "--repair", "none", "--outputs", *outputs, *berts]
    assert zipped(*given, "--out", tmp_path / "out") == 0
    for name, x in load_file(tmp_path / "out" / "model.safetensors").items():
        assert_bytes_equal(x, state[name])


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(path / "model.safetensors")
    edit(state)
    save_file(state, path / "model.safetensors")


def test_old_names_are_read_as_transformers_reads_them(berts: list[Path], tmp_path: Path) -> None:
    def rename(state: dict[str, torch.Tensor]) -> None:
        for name in [n for n in state if "LayerNorm" in n]:
            old = name.replace(".weight", ".gamma").replace(".bias", ".beta")
            state[old] = state.pop(name)
        state["embeddings.position_ids"] = torch.arange(12)[None]

    given = ["--model", berts[0], "--data", tmp_path / "text.npz", *berts, "--out"]
    assert zipped(*given, tmp_path / "new") == 0
    for path in berts:
        change(path, rename)
    assert zipped(*given, tmp_path / "old") == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("new", "old")]
    assert files[0] == files[1]


def test_every_tensor_that_does_not_fit_is_listed(
    berts: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        del state["pooler.dense.bias"]
        state["pooler.dense.weight"] = torch.ones(3, 3)
        state["classifier.weight"] = torch.ones(3)

    change(berts[1], spoil)
    capfd.readouterr()
    given = ["--model", berts[0], "--data", tmp_path / "text.npz", *berts]
    assert zipped(*given, "--out", tmp_path / "out") == 2
    first, *rest = capfd.readouterr().err.splitlines()
    assert first == f"mergekern: {berts[1]}: 3 tensors do not fit the model:"
    assert [line.strip() for line in rest] == [
        "classifier.weight: missing from the model",
        "pooler.dense.bias: missing from the checkpoint",
        "pooler.dense.weight: shape differs: [3, 3] in the checkpoint, [16, 16] in the model",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{}", "no json", '{"model_type": "unheard"}'])
def test_a_config_that_is_none(
    text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    given = ["--model", tmp_path, "--data", tmp_path, "--out", tmp_path / "out", tmp_path, tmp_path]
    assert zipped(*given) == 2
    errors = capfd.readouterr().err
    assert "config.json cannot be read" in errors
    assert errors.count("\n") == 1


def test_transformers_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    given = ["--model", tmp_path, "--data", tmp_path, "--out", tmp_path / "out", tmp_path, tmp_path]
    assert zipped(*given) == 2
    assert "transformers is not installed" in capfd.readouterr().err
