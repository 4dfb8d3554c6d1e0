"""What a base says of itself: layers of [in, out], embeddings that are the head, saved weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.adapters.adapter import Adapter, Factors
from mergekern.adapters.targets import Product
from mergekern.engine import fold
from mergekern.methods import slices

from accuracy import assert_bits_equal, assert_within, half_ulp
from adapters import random_adapters
from engine.models import nothing_left, read_folder, write_folder
from refusal import refused

OP = "fold_adapter"
Tensors = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(rows: int, columns: int, *, embedding: bool = False) -> Factors:
    return replace(random_adapters.factors(rows, (columns,), 3, 100), embedding=embedding)


def gpt2() -> Tensors:
    """Two blocks as GPT-2 names them, of Conv1D, and a head of Linear without a bias."""
    made: Tensors = {"score.weight": normal(8, 8, seed=9), "wpe.weight": normal(5, 8)}
    for i in range(2):
        for name, shape in {"c_attn": (8, 24), "attn.c_proj": (8, 8), "c_fc": (8, 32)}.items():
            made[f"h.{i}.{name}.weight"] = normal(*shape, seed=i)
            made[f"h.{i}.{name}.bias"] = normal(shape[1])
    return made


def folded(given: Adapter, tensors: Tensors, folder: Path, **settings: Any) -> Tensors:
    one = write_folder(folder / "base", tensors)
    if settings:
        (one / "config.json").write_text(json.dumps(settings))
    mk.fold_adapter(given, one, folder / "out", progress=False)
    return read_folder(folder / "out")


@pytest.mark.parametrize("setting", [True, False])
@pytest.mark.parametrize(
    ("module", "out", "turned"),
    [("h.0.attn.c_proj", 8, True), ("h.1.c_attn", 24, True), ("score", 8, False)],
)
def test_layers_of_conv1d_are_told_by_their_neighbours(
    module: str, out: int, turned: bool, setting: bool, tmp_path: Path
) -> None:
    """PEFT saves the setting of the last layer that it changed, whatever the others are."""
    tensors = gpt2()
    given = Adapter({module: factors(out, 8)}, config={"fan_in_fan_out": setting})
    got = folded(given, tensors, tmp_path)
    change = given.modules[module].delta()
    value = tensors[f"{module}.weight"].double() + (change.T if turned else change)
    assert_within(got[f"{module}.weight"], value, half_ulp(value, torch.float32) + 2.0**-48)


def test_the_nearest_layers_count(tmp_path: Path) -> None:
    """A model of two kinds; of a square layer between both nobody knows."""
    tensors = {f"decoder.{k}": x for k, x in gpt2().items()}
    tensors |= {"encoder.0.q.weight": normal(8, 8), "encoder.0.fc.weight": normal(32, 8)}
    tensors |= {"encoder.0.fc.bias": normal(32), "join.weight": normal(8, 8)}
    tensors |= {"join.bias": normal(8)}
    given = Adapter({"encoder.0.q": factors(8, 8), "decoder.h.0.attn.c_proj": factors(8, 8)})
    got = folded(given, tensors, tmp_path)
    for name, f in given.modules.items():
        change = f.delta().T if "decoder" in name else f.delta()
        value = tensors[f"{name}.weight"].double() + change
        assert_within(got[f"{name}.weight"], value, half_ulp(value, torch.float32) + 2.0**-48)
    one = write_folder(tmp_path / "again", tensors)
    with refused(OP, "join.weight (square, among layers of [out, in] and of [in, out])"):
        mk.fold_adapter(Adapter({"join": factors(8, 8)}), one, tmp_path / "none")
    assert nothing_left(tmp_path, "none")


# ---- embeddings that are the output head ---------------------------------------------------------

LM: dict[str, Any] = {"architectures": ["XForCausalLM"], "vocab_size": 11}
CHANGES = {
    "factors": Adapter({"embed": factors(8, 11, embedding=True)}),
    "copy": Adapter({}, {"embed.weight": normal(11, 8, seed=7)}, {"modules_to_save": ["embed"]}),
}


def tied(**more: Tensor) -> Tensors:
    return {"embed.weight": normal(11, 8), "q.weight": normal(8, 6), **more}


@pytest.mark.parametrize("settings", [LM, LM | {"tie_word_embeddings": True}], ids=["default", ""])
@pytest.mark.parametrize("what", CHANGES)
def test_tied_embeddings_do_not_change_alone(
    what: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with refused(OP, "embeddings that are the output head too; got embed.weight; expected a base"):
        folded(CHANGES[what], tied(), tmp_path, **settings)
    assert nothing_left(tmp_path, "out")


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        ({}, tied()),
        (LM | {"architectures": ["XModel"], "tie_word_embeddings": True}, tied()),
        (LM | {"tie_word_embeddings": False}, tied()),
        (LM, tied(head=normal(11, 8))),
        (LM | {"vocab_size": 12}, tied()),
    ],
)
@pytest.mark.parametrize("what", CHANGES)
def test_embeddings_that_are_not_tied(
    what: str, settings: dict[str, Any], tensors: Tensors, tmp_path: Path
) -> None:
    got = folded(CHANGES[what], tensors, tmp_path, **settings)
    assert not torch.equal(got["embed.weight"], tensors["embed.weight"])


def test_what_changes_both_is_added(tmp_path: Path) -> None:
    given = CHANGES["factors"]
    both = Adapter(given.modules, config={"ensure_weight_tying": True})
    whole = Adapter({}, {"embed.weight": normal(11, 8)})  # PEFT's save of the base's own
    for i, adapter in enumerate((both, whole)):
        folded(adapter, tied(), tmp_path / str(i), **LM, tie_word_embeddings=True)


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    one = write_folder(tmp_path / "base", tied())
    (one / "config.json").write_text("{")
    with pytest.raises(mk.CheckpointError, match=r"config.json: no readable settings"):
        mk.fold_adapter(CHANGES["copy"], one, tmp_path / "out", progress=False)


# ---- a weight that is saved beside its factors --------------------------------------------------


def test_factors_are_added_to_the_weight_that_is_saved_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT saves embeddings that it wraps; not those of the base count then. In slices, too."""
    monkeypatch.setattr(slices, "SLICE", 16)
    monkeypatch.setattr(fold, "_BLOCK", 8)
    f, saved = factors(8, 11, embedding=True), normal(11, 8, seed=5)
    given = Adapter({"embed": f}, {"embed.base_layer.weight": saved})
    got = folded(given, tied(), tmp_path)
    value = saved.double() + f.delta()
    assert_within(got["embed.weight"], value, half_ulp(value, torch.float32) + 2.0**-48)
    assert_bits_equal(got["q.weight"], tied()["q.weight"])
    # A run that was interrupted goes on with the same weight alone.
    product = Product(f.a.T, f.b.T, f.scale, saved)
    digests = {fold._digest("embed.weight", product._replace(onto=x)) for x in (saved, -saved)}
    assert len(digests) == 2
