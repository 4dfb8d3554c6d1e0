"""Files of kohya and of diffusers, written by hand after their rules: read, refused, written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergekern as mk
from mergekern.adapters.adapter import Adapter, Factors

from accuracy import assert_bits_equal, assert_bytes_equal, assert_within
from adapters.random_adapters import adapter, dense
from refusal import refused

Tensors = dict[str, Tensor]
Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
SELF = "text_encoder.text_model.encoder.layers.0.self_attn."


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kohya(dtype: torch.dtype = torch.float16) -> Tensors:
    """A linear layer, a convolution of 3 x 3, one without alpha."""
    return {
        f"{Q}.lora_down.weight": normal(4, 6, dtype=dtype),
        f"{Q}.lora_up.weight": normal(8, 4, seed=1, dtype=dtype),
        f"{Q}.alpha": torch.tensor(2.5, dtype=dtype),
        f"{CONV}.lora_down.weight": normal(2, 3, 3, 3, seed=2, dtype=dtype),
        f"{CONV}.lora_up.weight": normal(5, 2, 1, 1, seed=3, dtype=dtype),
        f"{CONV}.alpha": torch.tensor(1, dtype=dtype),
        f"{TEXT}.lora_down.weight": normal(3, 6, seed=4, dtype=dtype),
        f"{TEXT}.lora_up.weight": normal(6, 3, seed=5, dtype=dtype),
    }


def diffusers() -> Tensors:
    return {
        f"{UNET}to_q.lora_A.weight": normal(4, 6),
        f"{UNET}to_q.lora_B.weight": normal(8, 4, seed=1),
        f"{SELF}q_proj.lora_A.weight": normal(2, 6, seed=2),
        f"{SELF}q_proj.lora_B.weight": normal(6, 2, seed=3),
    }


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    save_file(tensors, path, None if metadata is None else dict(metadata))
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


# ---- kohya -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_kohya_is_alpha_over_rank_up_down(tmp_path: Path, dtype: torch.dtype) -> None:
    t = kohya(dtype)
    got = mk.load_adapter(write(tmp_path / "a.safetensors", t))
    assert got.layout == "kohya"
    assert list(got.modules) == sorted([Q, CONV, TEXT])
    up, down = t[f"{Q}.lora_up.weight"].double(), t[f"{Q}.lora_down.weight"].double()
    assert_bits_equal(got.modules[Q].delta(), 2.5 / 4 * (up @ down))
    assert got.modules[TEXT].scale == 1.0  # no alpha: alpha is the rank
    conv = got.modules[CONV]
    up, down = t[f"{CONV}.lora_up.weight"].double(), t[f"{CONV}.lora_down.weight"].double()
    oracle = torch.einsum("orxy,rihw->oihw", up, down) / 2
    assert conv.delta().shape == (5, 3, 3, 3)
    assert_within(conv.delta(), oracle, oracle.abs() * 4 * 2.0**-53 + 2.0**-50)


def test_kohya_comes_back_to_the_bit(tmp_path: Path) -> None:
    """A file in which every module has an alpha, as kohya's scripts write them."""
    t = kohya() | {f"{TEXT}.alpha": torch.tensor(3, dtype=torch.float16)}
    about = {"ss_network_dim": "4", "ss_network_alpha": "2.5", "ss_base_model_version": "sd_v1"}
    one = write(tmp_path / "a.safetensors", t, {**about, "sshs_model_hash": "00"})
    mk.save_adapter(mk.load_adapter(one), tmp_path / "sub" / "b.safetensors")
    back = load_file(tmp_path / "sub" / "b.safetensors")
    assert set(back) == set(t)
    for name, x in t.items():
        assert_bytes_equal(back[name], x)
    assert metadata_of(tmp_path / "sub" / "b.safetensors") == metadata_of(one)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["b.safetensors"]


@pytest.mark.parametrize(
    ("alpha", "rank", "dtype"),
    [(0.1, 3, torch.float32), (0.1, 49, torch.bfloat16), (1.0, 49, torch.float16), (5.0, 7, None)],
)
def test_kohya_keeps_every_alpha(
    tmp_path: Path, alpha: float, rank: int, dtype: torch.dtype | None
) -> None:
    """Also one that the dtype of the factors does not hold, and a quotient that is rounded."""
    factors = {"lora_unet_x.lora_down.weight": normal(rank, 5, dtype=dtype or torch.bfloat16)}
    factors["lora_unet_x.lora_up.weight"] = normal(4, rank, dtype=dtype or torch.bfloat16)
    given = {"lora_unet_x.alpha": torch.tensor(alpha, dtype=torch.float32), **factors}
    one = mk.load_adapter(write(tmp_path / "a.safetensors", given))
    mk.save_adapter(one, tmp_path / "b.safetensors")
    back = load_file(tmp_path / "b.safetensors")["lora_unet_x.alpha"]
    assert float(back) == float(given["lora_unet_x.alpha"])
    assert mk.load_adapter(tmp_path / "b.safetensors").modules["lora_unet_x"].scale == (
        one.modules["lora_unet_x"].scale
    )


def test_metadata_says_what_the_file_holds(tmp_path: Path) -> None:
    about = {"ss_network_dim": "16", "ss_network_alpha": "16", "ss_base_model_version": "sd_v1"}
    about |= {"sshs_model_hash": "00", "ss_tag_frequency": '{"a": 1}'}
    one = write(tmp_path / "a.safetensors", kohya(), about)
    mk.merge_adapters([one, one], "cat", weight=0.5, out=tmp_path / "b.safetensors")
    got = metadata_of(tmp_path / "b.safetensors")
    assert got["ss_network_dim"] == got["ss_network_alpha"] == "Dynamic"  # as kohya resizes
    assert got["ss_tag_frequency"] == '{"a": 1}'
    assert "sshs_model_hash" not in got  # of other tensors
    other = write(tmp_path / "c.safetensors", kohya(), {"ss_base_model_version": "sdxl_base_v1-0"})
    with refused("merge_adapters", "their bases have the names ['sd_v1', 'sdxl_base_v1-0']"):
        mk.merge_adapters([one, other], "cat")


# ---- diffusers -------------------------------------------------------------------------------


def older(tensors: Tensors, version: str) -> Tensors:
    """The names of earlier versions of diffusers for the same tensors."""
    halves = {"lora_A": "down", "lora_B": "up"}
    found = {}
    for name, x in tensors.items():
        module, half, _ = name.rsplit(".", 2)
        stem, layer = module.rsplit(".", 1)
        text = module.startswith("text_encoder")
        end = f"{halves[half]}.weight"
        if version == "lora":
            found[f"{module}.{'lora_linear_layer' if text else 'lora'}.{end}"] = x
        elif text:
            found[f"{stem}.to_{layer[0]}_lora.{end}"] = x
        else:
            found[f"{stem}.processor.{layer}_lora.{end}"] = x
    return found


@pytest.mark.parametrize("version", ["lora", "processors"])
def test_older_names_are_the_same_modules(tmp_path: Path, version: str) -> None:
    now = mk.load_adapter(write(tmp_path / "a.safetensors", diffusers()))
    then = mk.load_adapter(write(tmp_path / "b.safetensors", older(diffusers(), version)))
    assert now.layout == then.layout == "diffusers"
    assert list(now.modules) == list(then.modules) == sorted([f"{UNET}to_q", f"{SELF}q_proj"])
    for name, f in now.modules.items():
        assert f.scale == 1.0
        assert_bits_equal(then.modules[name].delta(), f.delta())


def test_the_first_files_had_no_component(tmp_path: Path) -> None:
    given = {
        f"mid_block.attn1.processor.to_out_lora.{h}.weight": normal(2, 2) for h in ("down", "up")
    }
    got = mk.load_adapter(write(tmp_path / "a.safetensors", given))
    assert list(got.modules) == ["mid_block.attn1.to_out.0"]


def test_diffusers_scales_by_header_or_alpha(tmp_path: Path) -> None:
    settings = {"unet.r": 4, "unet.lora_alpha": 6, "unet.lora_dropout": 0.1}
    settings |= {"text_encoder.r": 8, "text_encoder.lora_alpha": 8, "text_encoder.use_rslora": True}
    settings |= {"text_encoder.rank_pattern": {r"self_attn\.q_proj": 2}}
    header = {"lora_adapter_metadata": json.dumps(settings), "of": "a test"}
    path = write(tmp_path / "pytorch_lora_weights.safetensors", diffusers(), header)
    got = mk.load_adapter(tmp_path)  # by the folder
    assert got.modules[f"{UNET}to_q"].scale == 6 / 4
    assert got.modules[f"{SELF}q_proj"].scale == 8 / 2**0.5
    alphas = {f"{UNET}to_q.alpha": torch.tensor(3.0)}
    by_alpha = mk.load_adapter(write(tmp_path / "b.safetensors", diffusers() | alphas))
    assert by_alpha.modules[f"{UNET}to_q"].scale == 3 / 4
    assert by_alpha.modules[f"{SELF}q_proj"].scale == 1.0
    with pytest.raises(mk.CheckpointError, match="two scales; got alpha 3 beside lora_"):
        mk.load_adapter(write(path, diffusers() | alphas, header))


def test_diffusers_come_back(tmp_path: Path) -> None:
    """Scales in the header, where diffusers looks; tensors to the bit; the rest of it stays."""
    alphas = {f"{UNET}to_q.alpha": torch.tensor(0.3), f"{SELF}q_proj.alpha": torch.tensor(2.0)}
    one = write(tmp_path / "a.safetensors", diffusers() | alphas, {"of": "a test"})
    given = mk.load_adapter(one)
    mk.save_adapter(given, tmp_path / "b.safetensors")
    back = load_file(tmp_path / "b.safetensors")
    assert set(back) == set(diffusers())
    for name, x in diffusers().items():
        assert_bytes_equal(back[name], x)
    about = metadata_of(tmp_path / "b.safetensors")
    assert about["of"] == "a test"
    settings = json.loads(about["lora_adapter_metadata"])
    module = UNET.removeprefix("unet.") + "to_q"
    assert settings["unet.r"] == 4
    assert settings["unet.lora_alpha"] == float(torch.tensor(0.3))
    assert settings["unet.target_modules"] == [module]
    got = mk.load_adapter(tmp_path / "b.safetensors")
    assert {n: f.scale for n, f in got.modules.items()} == {
        n: f.scale for n, f in given.modules.items()
    }


def test_diffusers_merge_with_ranks_that_differ(tmp_path: Path) -> None:
    one = write(tmp_path / "a.safetensors", diffusers())
    out = tmp_path / "folder"
    out.mkdir()
    merged = mk.merge_adapters([one, one], "cat", weight=[1.0, 0.5], out=out)
    got = mk.load_adapter(out)
    assert [f.rank for f in got.modules.values()] == [4, 8]
    for name, f in merged.modules.items():
        assert_bits_equal(got.modules[name].delta(), f.delta())


# ---- what is refused -------------------------------------------------------------------------


def without(t: Tensors, *names: str) -> Tensors:
    return {k: x for k, x in t.items() if k not in names}


UNREADABLE: dict[str, tuple[Any, list[str]]] = {
    "LoCon": (
        kohya() | {f"{CONV}.lora_mid.weight": normal(2, 2, 3, 3)},
        ["lora_mid.weight", "Tuck"],
    ),
    "LoHa": ({"lora_unet_x.hada_w1_a": normal(2, 2)}, ["LoHa", "lora_unet_x.hada_w1_a"]),
    "LoKr": ({"lora_unet_x.lokr_w1": normal(2, 2)}, ["LoKr", "lora_unet_x.lokr_w1"]),
    "DoRA": (kohya() | {f"{Q}.dora_scale": normal(8, 1)}, ["DoRA", f"{Q}.dora_scale"]),
    "a norm": (
        kohya() | {"lora_unet_norm.w_norm": normal(8)},
        ["none of the two factors", "w_norm"],
    ),
    "no up": (
        without(kohya(), f"{Q}.lora_up.weight"),
        [f"{Q} has no lora_up.weight", "one factor"],
    ),
    "no down": (without(kohya(), f"{Q}.lora_down.weight"), [f"{Q} has no lora_down.weight"]),
    "alpha alone": (
        kohya() | {"lora_unet_x.alpha": normal()},
        ["lora_unet_x has no", "none of two"],
    ),
    "alphas": (kohya() | {f"{Q}.alpha": normal(4)}, ["an alpha that is no number; got [4]"]),
    "NaN": (kohya() | {f"{Q}.alpha": torch.tensor(torch.nan)}, [f"{Q}.alpha holds NaN"]),
    "rank 0": (
        {"lora_unet_x.lora_down.weight": normal(0, 4), "lora_unet_x.lora_up.weight": normal(4, 0)},
        ["factors that do not fit"],
    ),
    "ranks": (kohya() | {f"{Q}.lora_up.weight": normal(8, 3)}, ["factors that do not fit"]),
    "an up of 3 x 3": (
        kohya() | {f"{CONV}.lora_up.weight": normal(5, 2, 3, 3)},
        ["factors that do not fit"],
    ),
    "quantised": (
        kohya() | {f"{Q}.lora_up.weight": torch.zeros(8, 4, dtype=torch.int8)},
        ["is not floating, dequantise it first; got int8"],
    ),
    "mixed": (kohya() | diffusers(), ["names of several layouts", "(diffusers)", "(kohya)"]),
    "PEFT's weights": (
        {"base_model.model.fc.lora_A.weight": normal(2, 3)},
        ["without their settings", "adapter_config.json"],
    ),
    "no adapter": ({"fc.weight": normal(2, 3)}, ["no readable adapter; got fc.weight"]),
    "nothing": ({}, ["no readable adapter; got no tensors"]),
    "a bias": (diffusers() | {f"{UNET}to_q.lora_B.bias": normal(8)}, ["no factor", "lora_B.bias"]),
    "twice": (
        diffusers() | {f"{UNET}to_q.lora.down.weight": normal(4, 6)},
        [f"come to one name; got {UNET}to_q.lora_A.weight twice"],
    ),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_is_no_adapter(what: str, tmp_path: Path) -> None:
    tensors, words = UNREADABLE[what]
    with pytest.raises(mk.CheckpointError) as caught:
        mk.load_adapter(write(tmp_path / "a.safetensors", tensors))
    for word in [str(tmp_path), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{]", "[1]", '{"unet.use_dora": true}'])
def test_headers_that_are_none(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", diffusers(), {"lora_adapter_metadata": text})
    with pytest.raises(mk.CheckpointError, match=r"is no JSON|is no mapping|use_dora is not supp"):
        mk.load_adapter(path)


def test_two_adapters_in_a_folder(tmp_path: Path) -> None:
    mk.save_adapter(adapter(0), tmp_path)
    write(tmp_path / "pytorch_lora_weights.safetensors", diffusers())
    with pytest.raises(mk.CheckpointError, match="two adapters"):
        mk.load_adapter(tmp_path)


def test_layouts_do_not_mix(tmp_path: Path) -> None:
    one = mk.load_adapter(write(tmp_path / "a.safetensors", kohya()))
    with refused("save_adapter", "named as kohya names them; got layout='peft'"):
        mk.save_adapter(one, tmp_path / "b", layout="peft")
    with refused("save_adapter", "layout is unknown"):
        mk.save_adapter(one, tmp_path / "b", layout="lycoris")
    with refused("merge_adapters", "name modules in different ways; got layouts kohya, peft"):
        mk.merge_adapters([one, adapter(0)], "cat", union=True)


def test_what_a_layout_has_no_place_for(tmp_path: Path) -> None:
    f = Factors(normal(2, 3), normal(4, 2), 1.0, (3,))
    biased = Factors(f.a, f.b, 1.0, (3,), bias=normal(4))
    for layout, name in (("kohya", "lora_unet_x"), ("diffusers", "unet.x")):
        with refused("save_adapter", "of layers only; got a bias in"):
            mk.save_adapter(Adapter({name: biased}, layout=layout), tmp_path / "a")
        with refused("save_adapter", "got head.weight"):
            mk.save_adapter(Adapter({name: f}, {"head.weight": f.a}, layout=layout), tmp_path / "a")
    with refused("save_adapter", "factors of components only; got fc"):
        mk.save_adapter(Adapter({"fc": f}, layout="diffusers"), tmp_path / "a")
    assert not list(tmp_path.iterdir())


# ---- PEFT's scales and biases ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_peft_keeps_factors_and_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    """A scale that is no power of 2 would cost a bit of every number of the second factor."""
    given = adapter(0, scale=0.3, dtype=dtype)
    given.modules["stem"] = Factors(*_of(given, "stem"), 16 / 8**0.5, (3, 5, 5))
    mk.save_adapter(given, tmp_path)
    got = mk.load_adapter(tmp_path)
    for name, f in given.modules.items():
        assert_bytes_equal(got.modules[name].a, f.a)
        assert_bytes_equal(got.modules[name].b, f.b)
        assert abs(got.modules[name].scale - f.scale) <= 2.0**-52 * f.scale


def _of(given: Adapter, name: str) -> tuple[Tensor, Tensor]:
    return given.modules[name].a, given.modules[name].b


def test_biases_of_second_factors(tmp_path: Path) -> None:
    """Kept, added by cat and svd with the weights, and refused where nobody says what to do."""
    one, other = (adapter(i, scale=0.5 + i) for i in range(2))
    f = one.modules["blocks.0.q"]
    one.modules["blocks.0.q"] = Factors(f.a, f.b, f.scale, f.shape, bias=normal(48))
    mk.save_adapter(one, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_bias"] is True
    loaded = mk.load_adapter(tmp_path)
    assert loaded.modules["stem"].bias is None
    bias = loaded.modules["blocks.0.q"].bias
    assert bias is not None
    assert_bytes_equal(bias, normal(48))
    for method in ("cat", "svd"):
        merged = mk.merge_adapters([loaded, other], method, weight=[2.0, 1.0])
        summed = merged.modules["blocks.0.q"].bias
        assert summed is not None
        assert_bits_equal(summed, normal(48))  # 2 * 0.5 * bias
    with refused("merge_adapters", "biases of second factors merge; got blocks.0.q"):
        mk.merge_adapters([loaded, other], "knots_ties")
    bad = load_file(tmp_path / "adapter_model.safetensors")
    bad["base_model.model.blocks.0.q.lora_B.bias"] = normal(47)
    save_file(bad, tmp_path / "adapter_model.safetensors")
    with pytest.raises(mk.CheckpointError, match=r"a bias that does not fit; got \[47\]"):
        mk.load_adapter(tmp_path)


def test_kohya_merges_by_any_method(tmp_path: Path) -> None:
    one = write(tmp_path / "a.safetensors", kohya(torch.float32))
    merged = mk.merge_adapters([one, one], "knots_ta", weight=0.5, out=tmp_path / "b.safetensors")
    expected = mk.load_adapter(one)
    got = mk.load_adapter(tmp_path / "b.safetensors")
    for name, f in expected.modules.items():
        x = dense(f)
        limit = torch.full_like(x, 64 * 2.0**-24 * float(x.abs().max()))
        assert_within(dense(got.modules[name]), x, limit)
        assert_bits_equal(got.modules[name].delta(), merged.modules[name].delta())


def test_ranks_without_a_scale_are_named(tmp_path: Path) -> None:
    """diffusers takes one alpha for all modules of a component; older files have none: 1."""
    mixed = {
        f"unet.{m}.lora_{half}.weight": normal(*((r, 4) if half == "A" else (4, r)))
        for m, r in (("a", 2), ("b", 3))
        for half in "AB"
    }
    one = write(tmp_path / "a.safetensors", mixed)
    with pytest.warns(UserWarning, match="nothing says the scales in unet of ranks 2, 3; taken"):
        assert {f.scale for f in mk.load_adapter(one).modules.values()} == {1.0}
