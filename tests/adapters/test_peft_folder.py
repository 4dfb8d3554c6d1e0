"""Folders that are no whole adapter say so in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergekern as mk
from mergekern.adapters import peft_folder
from mergekern.adapters.adapter import Adapter, Factors

from accuracy import assert_bits_equal, assert_within
from adapters.random_adapters import adapter, dense

Tensors = dict[str, Tensor]
Config = dict[str, Any]
Q = "base_model.model.blocks.0.q.lora_"


def spoilt(folder: Path, change: Callable[[Tensors, Config], object]) -> Path:
    """A saved adapter whose tensors or settings `change` changes in place."""
    mk.save_adapter(adapter(0), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


PROBLEMS: dict[str, tuple[Callable[[Tensors, Config], object], str]] = {
    "no b": (lambda t, c: t.pop(f"{Q}B.weight"), "blocks.0.q has no lora_B"),
    "no a": (lambda t, c: t.pop(f"{Q}A.weight"), "blocks.0.q has no lora_A"),
    "nan": (lambda t, c: t[f"{Q}A.weight"][0, :1].fill_(math.nan), "holds NaN or infinities"),
    "infinity": (lambda t, c: t[f"{Q}B.weight"][0, :1].fill_(math.inf), "holds NaN or infinities"),
    "quantised": (
        lambda t, c: t.update({f"{Q}A.weight": torch.zeros(4, 40, dtype=torch.uint8)}),
        "is not floating, dequantise it first; got uint8",
    ),
    "ranks": (
        lambda t, c: t.update({f"{Q}A.weight": torch.zeros(3, 40)}),
        "factors that do not fit; got [3, 40] and [48, 4]; expected [r, in] and [out, r] for r = 4",
    ),
    "rank of the config": (lambda t, c: c.update(r=5), "factors that do not fit"),
    "no rank": (lambda t, c: c.pop("r"), "no scale of blocks.0.fc; got r = None"),
    "no alpha": (lambda t, c: c.pop("lora_alpha"), "no scale of blocks.0.fc; got r = 4 and"),
    "rank 0": (lambda t, c: c.update(r=0), "no scale of blocks.0.fc; got r = 0"),
    "a vector": (lambda t, c: t.update({f"{Q}A.weight": torch.zeros(4)}), "that do not fit"),
    "dora": (lambda t, c: c.update(use_dora=True), "use_dora is not supported (DoRA scales"),
    "its vectors": (
        lambda t, c: t.update({f"{Q}magnitude_vector": torch.zeros(4)}),
        "unknown part of an adapter",
    ),
    **{
        key: (lambda t, c, key=key: c.update({key: {"x": [1]}}), f"{key} is not supported (")
        for key in peft_folder._UNKNOWN
    },
    **{
        init: (
            lambda t, c, init=init: c.update(init_lora_weights=init),
            f"taken out of its base; got init_lora_weights '{init}'; expected what",
        )
        for init in ("pissa", "pissa_niter_16", "olora", "CorDA", "loftq", "lora_ga")
    },
    "another kind": (
        lambda t, c: c.update(peft_type="IA3"),
        "no LoRA adapter; got peft_type 'IA3'",
    ),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_what_is_no_adapter(what: str, tmp_path: Path) -> None:
    change, words = PROBLEMS[what]
    with pytest.raises(mk.CheckpointError) as caught:
        mk.load_adapter(spoilt(tmp_path, change))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{]", b"\x08\0\0\0\0\0\0\0{}"], ids=str)
def test_files_that_are_none(name: str, content: bytes | None, tmp_path: Path) -> None:
    mk.save_adapter(adapter(0), tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(mk.CheckpointError, match="no readable adapter"):
        mk.load_adapter(tmp_path)


def test_ranks_scales_and_kernels_come_back(tmp_path: Path) -> None:
    """Ranks that differ, names that end in each other, an embedding, a scale that is no power."""
    stem, fc = (adapter(0).modules[name] for name in ("stem", "blocks.0.fc"))
    given = Adapter(
        {
            "fc": Factors(fc.a[:2], fc.b[:, :2], 0.3, fc.shape),
            "blocks.0.fc": fc,
            "names": Factors(torch.ones(3, 7), torch.ones(5, 3), 0.5, (7,), True),
            "stem": Factors(stem.a, stem.b, 2.5, stem.shape),
        },
        saved={"head.bias": torch.arange(3.0)},
    )
    mk.save_adapter(given, tmp_path)
    got = mk.load_adapter(tmp_path)
    assert list(got.modules) == sorted(given.modules)
    for name, f in given.modules.items():
        mine = got.modules[name]
        assert (mine.rank, mine.shape, mine.embedding) == (f.rank, f.shape, f.embedding)
        expected = dense(f)
        limit = torch.full_like(expected, 8 * 2.0**-24 * float(expected.abs().max()))
        assert_within(dense(mine), expected, limit)
    assert_bits_equal(got.saved["head.bias"], given.saved["head.bias"])


def test_an_interrupted_write_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mk.save_adapter(adapter(0), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("mergekern.adapters.tensors.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        mk.save_adapter(adapter(1), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
