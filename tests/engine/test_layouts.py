"""Folders of sentence-transformers, timm and open_clip, merged into folders that these read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekern import CheckpointError, merge_checkpoints, merge_tensors
from mergekern.engine.checkpoint import Checkpoint

from accuracy import assert_bytes_equal
from engine.models import linear, tensors, write_file


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def mean(contents: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        key: merge_tensors([c[key] for c in contents], "linear", weight=1.0)
        if x.is_floating_point()
        else x
        for key, x in contents[0].items()
    }


def holds(path: Path, expected: dict[str, Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert_bytes_equal(found[key], x)


# ---- sentence-transformers ---------------------------------------------------------------------


def dense(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"linear.weight": torch.randn(4, 8, generator=g), "linear.bias": torch.ones(4) * seed}


def sentence_encoder(root: Path, seed: int, *, nested: bool, suffix: str) -> Path:
    """As `SentenceTransformer.save` writes it; before version 2 the encoder was in a subfolder."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    encoder = root / ("0_Transformer" if nested else "")
    write_file(encoder / f"{stem}{suffix}", tensors(seed))
    write_json(encoder / "config.json", {"model_type": "bert"})
    write_json(encoder / "tokenizer.json", {"version": "1.0"})
    write_json(encoder / "sentence_bert_config.json", {"max_seq_length": 256})
    write_json(root / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    write_json(root / "2_Dense" / "config.json", {"in_features": 8, "out_features": 4})
    write_file(root / "2_Dense" / f"{stem}{suffix}", dense(seed))
    (root / "3_Normalize").mkdir()
    write_json(root / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    paths = ["0_Transformer" if nested else "", "1_Pooling", "2_Dense", "3_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"}
        for i, (p, k) in enumerate(zip(paths, kinds))
    ]
    write_json(root / "modules.json", modules)
    return root


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sentence_transformers(tmp_path: Path, nested: bool, suffix: str) -> None:
    """Every module with weights is merged, the others are carried along."""
    roots = [
        sentence_encoder(tmp_path / m, i, nested=nested, suffix=suffix) for i, m in enumerate("ab")
    ]
    manifest = merge_checkpoints(linear(*roots), tmp_path / "out", progress=False)
    assert manifest.left_out == ()
    encoder = tmp_path / "out" / ("0_Transformer" if nested else "")
    holds(encoder / "model.safetensors", mean([tensors(0), tensors(1)]))
    holds(tmp_path / "out/2_Dense/model.safetensors", mean([dense(0), dense(1)]))
    for path in roots[0].rglob("*.json"):
        assert (tmp_path / "out" / path.relative_to(roots[0])).read_bytes() == path.read_bytes()


def test_sentence_transformers_of_both_kinds_of_files(tmp_path: Path) -> None:
    roots = [
        sentence_encoder(tmp_path / m, i, nested=False, suffix=s)
        for i, (m, s) in enumerate((("a", ".safetensors"), ("b", ".bin")))
    ]
    merge_checkpoints(linear(*roots), tmp_path / "out", progress=False)
    holds(tmp_path / "out/2_Dense/model.safetensors", mean([dense(0), dense(1)]))


# ---- timm --------------------------------------------------------------------------------------

TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 0,
    "num_features": 192,
    "pretrained_cfg": {"input_size": [3, 224, 224], "mean": [0.5, 0.5, 0.5]},
}


@pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
def test_timm(tmp_path: Path, out_dtype: str | None) -> None:
    """`timm.models.push_to_hf_hub` writes both kinds of files, and a config.json without dtype."""
    for i, model in enumerate("ab"):
        write_file(tmp_path / model / "model.safetensors", tensors(i))
        write_file(tmp_path / model / "pytorch_model.bin", tensors(i))
        write_json(tmp_path / model / "config.json", TIMM)
    config = linear(tmp_path / "a", tmp_path / "b")
    config |= {"out_dtype": out_dtype} if out_dtype else {}
    manifest = merge_checkpoints(config, tmp_path / "out", progress=False)
    assert manifest.left_out == ("pytorch_model.bin",)
    assert json.loads((tmp_path / "out/config.json").read_text()) == TIMM
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged["head.weight"].dtype == (torch.bfloat16 if out_dtype else torch.float32)


# ---- open_clip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clip(tmp_path: Path, name: str) -> None:
    """`open_clip.push_to_hf_hub`; the result goes by the name that open_clip looks for."""
    for i, model in enumerate("ab"):
        write_file(tmp_path / model / name, tensors(i))
        write_json(tmp_path / model / "open_clip_config.json", {"model_cfg": {"embed_dim": 8}})
    manifest = merge_checkpoints(
        linear(tmp_path / "a", tmp_path / "b"), tmp_path / "out", progress=False
    )
    assert manifest.weights == ("open_clip_model.safetensors",)
    holds(tmp_path / "out/open_clip_model.safetensors", mean([tensors(0), tensors(1)]))
    assert (tmp_path / "out/open_clip_config.json").is_file()


def test_open_clip_beside_the_weights_of_transformers(tmp_path: Path) -> None:
    """Its repositories often hold both; config.json says how to read model.safetensors."""
    for i, model in enumerate("ab"):
        write_file(tmp_path / model / "open_clip_pytorch_model.bin", {"x": torch.ones(1)})
        write_file(tmp_path / model / "open_clip_model.safetensors", {"x": torch.ones(1)})
        write_file(tmp_path / model / "model.safetensors", tensors(i))
    config = linear(tmp_path / "a", tmp_path / "b")
    manifest = merge_checkpoints(config, tmp_path / "out", progress=False)
    assert manifest.weights == ("model.safetensors",)
    assert "open_clip_model.safetensors" in manifest.left_out


def test_open_clip_checkpoint_of_distributed_training(tmp_path: Path) -> None:
    """A `state_dict` of names behind "module."; the published weights are the base."""
    base = write_file(tmp_path / "open_clip_pytorch_model.bin", tensors(0))
    trained = {"epoch": 30, "name": "run", "scaler": {"scale": 65536.0}}
    trained["state_dict"] = {f"module.{key}": x for key, x in tensors(1).items()}
    torch.save(trained, tmp_path / "epoch_30.pt")
    data: dict[str, Any] = linear(base, tmp_path / "epoch_30.pt")
    with pytest.raises(CheckpointError, match=r'prefix: \{from: "module.", to: ""\}$'):
        merge_checkpoints(data, tmp_path / "out", progress=False)
    data["models"][1]["prefix"] = {"from": "module.", "to": ""}
    manifest = merge_checkpoints(data, tmp_path / "out", progress=False)
    holds(tmp_path / "out" / manifest.weights[0], mean([tensors(0), tensors(1)]))


def test_a_stem_of_another_library_is_not_kept(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m" / "weights.safetensors", tensors())
    assert Checkpoint(path.parent).stems == {"": "model"}
