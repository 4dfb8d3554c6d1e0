"""fold_adapter: W + scale * B A in every layout, through the engine; and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.adapters.adapter import Adapter, Factors
from mergekern.engine import fold
from mergekern.methods import slices

from accuracy import assert_bytes_equal, assert_within, half_ulp
from engine.models import can_go_on, nothing_left, read_folder, write_file, write_folder
from refusal import refused

OP = "fold_adapter"
Tensors = dict[str, Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def base(dtype: torch.dtype = torch.float32) -> Tensors:
    shapes = {
        "stem.weight": (6, 3, 2, 2),
        "stem.bias": (6,),
        "names.weight": (11, 8),
        "layers.0.q.weight": (24, 8),
        "layers.0.q.bias": (24,),
        "layers.1.attn.in_proj_weight": (24, 8),
        "layers.1.attn.out_proj.weight": (8, 8),
        "scale": (),
        "head.weight": (4, 8),
    }
    made = {n: normal(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}
    return made | {"ids": torch.arange(11)}


def factors(rows: int, *shape: int, rank: int = 3, seed: int = 0, **more: Any) -> Factors:
    a, b = normal(rank, math.prod(shape), seed=100 + seed), normal(rows, rank, seed=200 + seed)
    return Factors(a, b, 0.3, shape, **more)


def adapter() -> Adapter:
    return Adapter(
        {
            "stem": factors(6, 3, 2, 2),
            "names": factors(8, 11, seed=1, embedding=True),
            "layers.0.q": factors(24, 8, seed=2, bias=normal(24, seed=300)),
            "layers.1.attn": factors(24, 8, seed=3),
            "layers.1.attn.base_layer.out_proj": factors(8, 8, seed=4),
        },
        saved={"head.weight": normal(4, 8, seed=400), "stem.base_layer.bias": normal(6, seed=401)},
    )


def exact(given: Adapter, tensors: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """(value, bound but for the rounding at the end) of all that changes, in float64."""

    def added(name: str, change: Tensor, size: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        w = tensors[name].double()
        return w + change, (rank + 3) * 2.0**-53 * (w.abs() + size)

    found = {}
    for module, f in given.modules.items():
        if module.endswith(".base_layer.out_proj"):
            f = replace(f, scale=2 * f.scale)  # as PEFT's forward has it
        module = module.replace(".base_layer", "")
        name = f"{module}.in_proj_weight" if module.endswith("attn") else f"{module}.weight"
        size = Factors(f.a.abs(), f.b.abs(), abs(f.scale), f.shape, f.embedding).delta()
        found[name] = added(name, f.delta(), size, f.rank)
        if f.bias is not None:
            change = f.scale * f.bias.double()
            found[f"{module}.bias"] = added(f"{module}.bias", change, change.abs(), 1)
    for name, x in given.saved.items():
        found[name.replace(".base_layer", "")] = x.double(), torch.zeros_like(x).double()
    return found


def require_folded(got: Tensors, given: Adapter, tensors: Tensors) -> None:
    expected = exact(given, tensors)
    assert set(got) == set(tensors)
    for name, x in tensors.items():
        if name in expected:
            value, bound = expected[name]
            assert got[name].dtype == x.dtype
            assert_within(got[name], value, bound + half_ulp(value, x.dtype))
        else:
            assert_bytes_equal(got[name], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_is_the_sum_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """Linear and attention, convolution, embedding, biases added and replaced, whole tensors."""
    one = write_folder(tmp_path / "base", base(dtype))
    made = mk.fold_adapter(adapter(), one, tmp_path / "out", progress=False)
    require_folded(read_folder(tmp_path / "out"), adapter(), base(dtype))
    assert (made.merged, made.copied) == (8, 2)
    assert (tmp_path / "out" / "config.json").read_text() == (one / "config.json").read_text()
    about = json.loads((tmp_path / "out" / "mergekern_manifest.json").read_text())
    assert about["tensors"]["head.weight"]["arguments"]["digest"]
    assert mk.verify(tmp_path / "out", inputs=True, progress=False).problems == ()
    with pytest.raises(mk.CheckpointError, match="replay: what fold added"):
        mk.verify(tmp_path / "out", replay=["*"], progress=False)
    assert "--replay" not in (tmp_path / "out" / "README.md").read_text()


def test_slices_shards_and_memory_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_folder(tmp_path / "base", base(), shards=3)
    monkeypatch.setattr(slices, "SLICE", 16)  # two rows of an embedding at a time
    monkeypatch.setattr(fold, "_BLOCK", 24)
    mk.fold_adapter(adapter(), one, tmp_path / "a", shard_size=700, memory=4096, progress=False)
    got = read_folder(tmp_path / "a")
    require_folded(got, adapter(), base())
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1


def test_transposed_weights(tmp_path: Path) -> None:
    """fan_in_fan_out: GPT-2's layers hold [in, out]; of a square one only the setting tells."""
    given = Adapter({"c": factors(8, 8), "d": factors(24, 8)}, config={"fan_in_fan_out": True})
    tensors = {"c.weight": normal(8, 8), "d.weight": normal(8, 24)}
    mk.fold_adapter(given, write_folder(tmp_path / "b", tensors), tmp_path / "o", progress=False)
    got = read_folder(tmp_path / "o")
    for name in ("c", "d"):
        value = tensors[f"{name}.weight"].double() + given.modules[name].delta().T
        bound = half_ulp(value, torch.float32) + 2.0**-48
        assert_within(got[f"{name}.weight"], value, bound)


# ---- other layouts -----------------------------------------------------------------------------


def pipeline(folder: Path) -> Path:
    """A folder as diffusers writes it."""
    attn = "down_blocks.0.attentions.0.attn1.to_q.weight"
    write_file(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        {attn: normal(8, 6), "down_blocks.0.conv.weight": normal(5, 3, 3, 3)},
    )
    write_file(
        folder / "text_encoder" / "model.safetensors", {"layers.0.q_proj.weight": normal(6, 6)}
    )
    (folder / "model_index.json").write_text("{}")
    return folder


KOHYA = {
    "lora_unet_down_blocks_0_attentions_0_attn1_to_q": factors(8, 6),
    "lora_unet_down_blocks_0_conv": factors(5, 3, 3, 3),
    "lora_te_layers_0_q_proj": factors(6, 6),
}
DIFFUSERS = {
    "unet.down_blocks.0.attentions.0.attn1.to_q": factors(8, 6),
    "unet.down_blocks.0.conv": factors(5, 3, 3, 3),
    "text_encoder.layers.0.q_proj": factors(6, 6),
}
PLACES = [
    "unet/down_blocks.0.attentions.0.attn1.to_q.weight",
    "unet/down_blocks.0.conv.weight",
    "text_encoder/layers.0.q_proj.weight",
]


@pytest.mark.parametrize(("layout", "modules"), [("kohya", KOHYA), ("diffusers", DIFFUSERS)])
def test_a_pipeline(tmp_path: Path, layout: str, modules: dict[str, Factors]) -> None:
    one = pipeline(tmp_path / "base")
    given = tmp_path / "a.safetensors"
    mk.save_adapter(Adapter(modules, layout=layout), given)
    mk.fold_adapter(given, one, tmp_path / "out", progress=False)
    for key, f in zip(PLACES, modules.values(), strict=True):
        folder, name = key.split("/")
        before, got = (
            next(x[name] for p in (where / folder).glob("*.safetensors") for x in [load(p)])
            for where in (one, tmp_path / "out")
        )
        value = before.double() + f.delta()
        assert_within(got, value, half_ulp(value, torch.float32) + 2.0**-48)


def load(path: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_component_alone(tmp_path: Path, layout: str) -> None:
    one = pipeline(tmp_path / "base") / "unet"
    name = {"kohya": "lora_unet_down_blocks_0_conv", "diffusers": "unet.down_blocks.0.conv"}[layout]
    given = Adapter({name: factors(5, 3, 3, 3)}, layout=layout)
    assert mk.fold_adapter(given, one, tmp_path / "out", progress=False).merged == 1


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_component_that_is_not_there_is_no_other(tmp_path: Path, layout: str) -> None:
    """Where a base is one component, a layer of another may have the name of one of its own."""
    one = write_folder(tmp_path / "base", {"proj.weight": normal(4, 3), "x.weight": normal(4, 3)})
    names = {
        "kohya": ["lora_unet_proj", "lora_te_x"],
        "diffusers": ["unet.proj", "text_encoder.x"],
    }[layout]
    given = Adapter(dict.fromkeys(names, factors(4, 3)), layout=layout)
    with refused(OP, "2 of 2 parts", f"{names[1]}.weight (no such tensor)"):
        mk.fold_adapter(given, one, tmp_path / "out")


def test_an_original_checkpoint(tmp_path: Path) -> None:
    """Of one file, with the denoiser and the text encoder under their own prefixes."""
    tensors = {
        "model.diffusion_model.input_blocks.1.0.conv.weight": normal(5, 3, 3, 3),
        "cond_stage_model.transformer.layers.0.q_proj.weight": normal(6, 6),
    }
    one = write_file(tmp_path / "sd.safetensors", tensors)
    names = ["lora_unet_input_blocks_1_0_conv", "lora_te_layers_0_q_proj"]
    modules = dict(zip(names, (factors(5, 3, 3, 3), factors(6, 6)), strict=True))
    given = Adapter(modules, layout="kohya")
    assert mk.fold_adapter(given, one, tmp_path / "out", progress=False).merged == 2


def test_an_underscore_for_two_dots(tmp_path: Path) -> None:
    """a.b_c and a_b.c have one name in kohya's files: which one is meant cannot be told."""
    one = write_folder(tmp_path / "b", {"a.b_c.weight": normal(4, 3), "a_b.c.weight": normal(4, 3)})
    given = Adapter({"lora_unet_a_b_c": factors(4, 3)}, layout="kohya")
    with refused(OP, "lora_unet_a_b_c.weight (which of a.b_c.weight and a_b.c.weight it is)"):
        mk.fold_adapter(given, one, tmp_path / "out")


# ---- merges ------------------------------------------------------------------------------------


def test_merged_into_a_base(tmp_path: Path) -> None:
    """merge_adapters(into=) is the fold of its result, without a rounding between."""
    one = write_folder(tmp_path / "base", base())
    f = factors(24, 8, seed=5)
    given = [
        Adapter({"layers.0.q": Factors(f.a.bfloat16(), (f.b * (1 + i)).bfloat16(), 0.3, f.shape)})
        for i in range(2)
    ]
    mk.merge_adapters(given, "cat", weight=[1.0, 0.7], into=one, out=tmp_path / "out")
    change = sum(
        w * a.modules["layers.0.q"].delta() for w, a in zip([1.0, 0.7], given, strict=True)
    )
    value = base()["layers.0.q.weight"].double() + change
    got = read_folder(tmp_path / "out")["layers.0.q.weight"]
    assert_within(got, value, half_ulp(value, torch.float32) + 2.0**-46)
    text = (tmp_path / "out" / "mergekern_config.yml").read_text()
    assert "merge_method: fold" in text
    assert "\nmethod: cat\n" in text
    with refused("merge_adapters", "into needs out"):
        mk.merge_adapters(given, "cat", into=one)


# ---- refusals ----------------------------------------------------------------------------------


def quantised(*names: str, dtype: torch.dtype = torch.uint8) -> Tensors:
    return {name: torch.ones(4, dtype=dtype) for name in names}


UNFIT: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "missing": (
        lambda t: [t.pop("stem.weight"), t.pop("head.weight")],
        ["2 of 8 parts", "stem.weight (no such tensor)", "head.weight (no such tensor)"],
    ),
    "shape": (
        lambda t: t.update({"layers.0.q.weight": normal(8, 24)}),
        ["layers.0.q.weight of shape [8, 24] (changed as [24, 8])"],
    ),
    "bitsandbytes, 4 bits": (
        lambda t: t.update(
            {"stem.weight": torch.ones(36, 1, dtype=torch.uint8)}
            | quantised("stem.weight.absmax", "stem.weight.quant_state.bitsandbytes__nf4")
        ),
        ["stem (quantised: bitsandbytes, 4 bits)"],
    ),
    "bitsandbytes, 8 bits": (
        lambda t: t.update(
            {"layers.0.q.weight": torch.ones(24, 8, dtype=torch.int8)} | quantised("layers.0.q.SCB")
        ),
        ["layers.0.q (quantised: bitsandbytes, 8 bits)", "not quantised"],
    ),
    "GPTQ or AWQ": (
        lambda t: [t.pop("layers.0.q.weight"), t.update(quantised("layers.0.q.qweight"))],
        ["layers.0.q (quantised: GPTQ or AWQ)"],
    ),
    "compressed": (
        lambda t: [t.pop("layers.0.q.weight"), t.update(quantised("layers.0.q.weight_packed"))],
        ["layers.0.q (quantised: compressed-tensors)"],
    ),
    "float8": (
        lambda t: t.update({"stem.weight": t["stem.weight"].to(torch.float8_e4m3fn)}),
        ["stem.weight (quantised: float8_e4m3fn)"],
    ),
    "integers": (
        lambda t: t.update({"stem.weight": t["stem.weight"].to(torch.int8)}),
        ["stem.weight (quantised: int8)"],
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_base_that_does_not_fit(what: str, tmp_path: Path) -> None:
    change, words = UNFIT[what]
    tensors = base()
    change(tensors)
    one = write_folder(tmp_path / "base", tensors)
    with refused(OP, *words):
        mk.fold_adapter(adapter(), one, tmp_path / "out", progress=False)
    assert nothing_left(tmp_path, "out")


def test_one_tensor_changed_twice(tmp_path: Path) -> None:
    one = write_folder(tmp_path / "base", base())
    given = Adapter({"head": factors(4, 8)}, saved={"head.weight": normal(4, 8)})
    with refused(OP, "head.weight (changed twice)"):
        mk.fold_adapter(given, one, tmp_path / "out")


def test_an_overflow_is_no_infinity(tmp_path: Path) -> None:
    one = write_folder(tmp_path / "base", base(torch.float16))
    f = factors(24, 8)
    given = Adapter({"layers.0.q": Factors(f.a, f.b * 1e6, 1.0, f.shape)})
    with pytest.raises(mk.CheckpointError, match=r"layers.0.q.weight: .*does not fit float16; got"):
        mk.fold_adapter(given, one, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_infinities_of_the_base_stay(tmp_path: Path) -> None:
    tensors = base()
    tensors["layers.0.q.weight"][3, 2] = math.inf
    one = write_folder(tmp_path / "base", tensors)
    mk.fold_adapter(adapter(), one, tmp_path / "out", progress=False)
    got = read_folder(tmp_path / "out")["layers.0.q.weight"]
    assert got.isinf().nonzero().tolist() == [[3, 2]]


def test_it_goes_on_with_the_same_adapter_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was cut off is finished; one with another adapter is not mixed into it."""
    from mergekern.engine import units
    from mergekern.engine.output import Output

    one = write_folder(tmp_path / "base", base())
    monkeypatch.setattr(units, "_BATCH", 0)
    real, calls = Output.write, iter(range(100))

    def write(*a: Any) -> None:
        if next(calls) == 5:
            raise OSError(28, "No space left on device")
        real(*a)

    monkeypatch.setattr(Output, "write", write)
    with pytest.raises(mk.CheckpointError, match="writing failed"):
        mk.fold_adapter(adapter(), one, tmp_path / "out", progress=False)
    monkeypatch.setattr(Output, "write", real)
    assert can_go_on(tmp_path, "out")
    other = adapter()
    f = other.modules["stem"]
    other.modules["stem"] = Factors(f.a, f.b, 0.30000000000000004, f.shape)
    with pytest.raises(mk.CheckpointError, match="unfinished merge of another"):
        mk.fold_adapter(other, one, tmp_path / "out", progress=False)
    made = mk.fold_adapter(adapter(), one, tmp_path / "out", progress=False)
    assert made.bytes_read < sum(x.nbytes for x in base().values())
    require_folded(read_folder(tmp_path / "out"), adapter(), base())
