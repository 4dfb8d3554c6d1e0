"""Names: prefixes and renames found and settled, patterns of what is merged, part-model merges."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mergekern import CheckpointError, ConfigError, merge_checkpoints, merge_tensors
from mergekern.engine.checkpoint import Checkpoint
from mergekern.engine.config import load_config
from mergekern.engine.keys import RENAMES, Naming, misnamed, select, vocabularies
from mergekern.methods.compat import Signature

from accuracy import assert_bits_equal, assert_bytes_equal
from engine.models import linear, nothing_left, read_folder, tensors, write_file, write_folder
from refusal import refused

NAMES = ["embed.weight", "blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.1.fc.weight", "head"]


def behind(prefix: str) -> list[str]:
    return [prefix + name for name in NAMES]


# ---- naming ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("naming", "stored", "name"),
    [
        (Naming(), "a.b", "a.b"),
        (Naming(("module.", "")), "module.module.x", "module.x"),
        (Naming(("module.", "")), "x.module.y", "x.module.y"),
        (Naming(("", "model.")), "x", "model.x"),
        (Naming(("model.", "m.")), "model.x", "m.x"),
        (Naming(renames=(("a.b", "c"),)), "a.b.a.b", "c.c"),
        (Naming(renames=(("a.b", "c"),)), "xa.b.a.bx.a.b", "xa.b.a.bx.c"),
        (Naming(renames=(("a", "b"), ("b", "c"))), "a.b", "c.c"),  # in turn
        (Naming(renames=(("a", "b"), ("b", "a"))), "a.b", "a.a"),
        (Naming(renames=((".*", "x"), ("a+", "y"))), "aa.b", "aa.b"),  # text, no pattern
        (Naming(renames=(("a", r"\1\g<0>"),)), "a", r"\1\g<0>"),
        (Naming(("m.", ""), (("m", "n"),)), "m.m.x", "n.x"),  # the prefix first
    ],
)
def test_name(naming: Naming, stored: str, name: str) -> None:
    assert naming.name(stored) == name


def test_a_naming_that_changes_nothing_or_brings_two_together() -> None:
    with refused("keys", "change no name of m", 'from: "x."', "blocks", error=CheckpointError):
        Naming(("x.", "")).check(NAMES, "m")
    with refused("keys", "two tensors of m", "a.w and w as w", error=CheckpointError):
        Naming(("a.", "")).names(["a.w", "w"], "m")
    assert Naming().names(NAMES, "m") == dict(zip(NAMES, NAMES, strict=True))
    Naming().check(NAMES, "m")


def test_a_prefix_need_not_be_in_every_file(tmp_path: Path) -> None:
    content = {"a.w": torch.ones(2), "b.w": torch.ones(3), "c": torch.ones(1)}
    root = write_folder(tmp_path / "m", content, shards=3)
    assert set(Checkpoint(root, Naming(("b.", "x."))).signatures) == {"a.w", "x.w", "c"}
    with refused("keys", "change no name", "no.", error=CheckpointError):
        Checkpoint(root, Naming(("no.", "")))
    with pytest.raises(CheckpointError, match=r"tensor a\.w is also in"):
        Checkpoint(root, Naming(("b.", "a.")))
    with pytest.raises(CheckpointError, match=r"got '\.\./w'"):
        Checkpoint(root, Naming(("b.", "../")))


# ---- which are merged --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only", "skip", "chosen"),
    [
        ([], [], NAMES),
        (["*"], [], NAMES),
        (["blocks.*"], [], NAMES[1:4]),
        (["blocks.[1-5].*", "head"], [], NAMES[3:]),
        ([], ["*norm*"], [NAMES[0], *NAMES[3:]]),
        (["blocks.*"], ["*.bias"], [NAMES[1], NAMES[3]]),
        (["blocks.?.norm.*"], [], NAMES[1:3]),
    ],
)
def test_select(only: list[str], skip: list[str], chosen: list[str]) -> None:
    assert select(NAMES, only, skip) == set(chosen)


@pytest.mark.parametrize("pattern", ["norm", "BLOCKS.*", "blocks", "", "blocks.[0-", "*head.*"])
@pytest.mark.parametrize("key", ["only", "skip"])
def test_a_pattern_that_fits_nothing(key: str, pattern: str) -> None:
    given = {"only": ["*"], "skip": []} | {key: ["head", pattern]}
    with refused("keys", f"'{key}' fits no tensor", repr(pattern), error=CheckpointError):
        select(NAMES, **given)


def test_patterns_that_leave_nothing() -> None:
    with refused("keys", "leave no tensor", error=CheckpointError):
        select(NAMES, ["head"], ["h*"])


def test_patterns_do_not_hang() -> None:
    started = time.perf_counter()
    with pytest.raises(CheckpointError):
        select(["a" * 2000 + "b"], ["*a" * 40 + "c"], [])
    assert time.perf_counter() - started < 5


# ---- why names disagree ------------------------------------------------------------------------

PREFIXES = [
    ("", "module."),
    ("module.", ""),
    ("model.", "module."),
    ("", "model.vision_model."),
    ("vision_model.", "vision_tower.vision_model."),
    ("model.encoder.", "encoder."),
    ("a.b.", "b.a."),
]


@pytest.mark.parametrize(("own", "other"), PREFIXES)
@pytest.mark.parametrize("extra", ["none", "first", "second", "both"])
def test_a_prefix_is_found_and_the_lines_it_names_settle_it(
    tmp_path: Path, own: str, other: str, extra: str
) -> None:
    """Also where one is a part of the other, or each has a head of its own."""
    first, second = behind(own), behind(other)
    first += ["classifier.weight"] if extra in ("first", "both") else []
    second += ["pooler.weight"] if extra in ("second", "both") else []
    text = misnamed({"A": first, "B": second})
    assert text is not None
    assert text.startswith("keys: models name the same tensors differently; got ")
    lines = yaml.safe_load(text.partition("at model B: ")[2])
    prefix = lines["prefix"]["from"], lines["prefix"]["to"]
    found = Naming(prefix).names(second, "B")
    assert {found[name] for name in behind(other)} == set(behind(own))
    data = linear(Path("A"), Path("B"))
    data["models"][1] |= lines
    assert load_config(data).namings == (Naming(), Naming(prefix))


@pytest.mark.parametrize("what", RENAMES)
@pytest.mark.parametrize("newer", ["first", "second"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_renaming_between_versions_is_found(what: str, newer: str, prefix: str) -> None:
    old = [f"encoder.layer.0.{a}.weight" for a, _ in RENAMES[what]] + NAMES
    new = list(Naming(renames=RENAMES[what]).names(old, "old").values())
    first, second = (new, old) if newer == "first" else (old, new)
    second = [prefix + name for name in second]
    text = misnamed({"A": first, "B": second, "C": second})
    assert text is not None
    assert what in text
    assert ", and at model C: " in text
    lines = text.partition("at model B: ")[2].partition(", and at")[0]
    read = [yaml.safe_load(line) for line in lines.split("; ")]
    both = {k: v for part in read for k, v in part.items()}
    naming = Naming(
        tuple(both.get("prefix", {"": "", "to": ""}).values()),
        tuple((a, b) for a, b in both["renames"]),
    )
    assert set(map(naming.name, second)) == set(first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (NAMES, NAMES),
        (NAMES, NAMES[:3]),
        (NAMES, [*NAMES, "more"]),
        ([*NAMES, "classifier.weight"], [*NAMES, "score.weight"]),  # heads are not one tensor
        ([*NAMES, "a.gamma"], [*NAMES, "a.weight"]),
        (NAMES, ["x.y", "z.w"]),
        (["a", "b", "c"], ["m.a", "m.b", "m.c", "a"]),  # two would come to one name
        ([], NAMES),
        (NAMES, []),
    ],
)
def test_what_is_missing_is_missing(first: list[str], second: list[str]) -> None:
    assert misnamed({"A": first, "B": second}) is None


parts = st.lists(st.sampled_from(["a", "b", "layer", "0", "weight"]), min_size=1, max_size=4)
names = st.sets(parts.map(".".join), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(first=names, second=names)
def test_a_naming_that_is_found_always_helps(first: set[str], second: set[str]) -> None:
    text = misnamed({"A": first, "B": second})
    if text is None:
        return
    lines = yaml.safe_load(text.partition("at model B: ")[2].partition("; renames")[0])
    prefix = lines.get("prefix", {"from": "", "to": ""})
    found = Naming((prefix["from"], prefix["to"])).names(second, "B")
    assert len(set(found.values()) & first) > len(second & first)


def test_names_that_disagree_are_explained_in_time() -> None:
    """20,000 tensors in other words; the parts are many, so that all of the table is tried."""
    layers = [f"encoder.layer.{i}.attention.self.part{j}" for i in range(200) for j in range(100)]
    started = time.perf_counter()
    text = misnamed({"A": layers, "B": [f"module.{name}" for name in layers]})
    assert text is not None
    assert text.endswith('at model B: prefix: {from: "module.", to: ""}')
    assert misnamed({"A": layers, "B": [f"x{i}.{n}y" for i, n in enumerate(layers)]}) is None
    assert time.perf_counter() - started < 10


# ---- as transformers writes them ---------------------------------------------------------------


def _saved(name: str, folder: Path, **how: Any) -> Path:
    transformers = pytest.importorskip("transformers", "5", reason="transformers >= 5")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    image = sizes | {"image_size": 8, "patch_size": 4}
    text = sizes | {"vocab_size": 11, "num_key_value_heads": 1}
    own: dict[str, dict[str, Any]] = {
        "Llava": {
            "text_config": {"model_type": "llama"} | text,
            "vision_config": {"model_type": "clip_vision_model"} | image,
        },
        "Qwen2VL": {
            "text_config": text,
            "vision_config": {"depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 2},
        },
    }
    config = getattr(transformers, f"{name}Config")(**own.get(name, image))
    kind = "Model" if name not in own else "ForConditionalGeneration"
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    getattr(transformers, name + kind)(config).save_pretrained(folder, **how)
    return folder


@pytest.mark.filterwarnings("ignore")  # those of the library
@pytest.mark.parametrize("name", ["ViT", "DeiT", "Beit", "Dinov2", "Llava", "Qwen2VL"])
@pytest.mark.parametrize("first", ["older", "newer"])
def test_both_names_of_transformers_5(tmp_path: Path, name: str, first: str) -> None:
    """One model saved in its names and in those of transformers 4: merged, it is itself."""
    older = _saved(name, tmp_path / "older", save_original_format=True)
    newer = _saved(name, tmp_path / "newer", save_original_format=False)
    base, other = (older, newer) if first == "older" else (newer, older)
    data = linear(base, other)
    with pytest.raises(CheckpointError, match="name the same tensors differently") as caught:
        merge_checkpoints(data, tmp_path / "out", progress=False)
    assert "transformers" in str(caught.value)
    lines = str(caught.value).partition(f"at model {other}: ")[2]
    data["models"][1] |= yaml.safe_load(lines)
    merge_checkpoints(data, tmp_path / "out", progress=False)
    with safe_open(base / "model.safetensors", "pt") as file:
        merged = read_folder(tmp_path / "out")
        assert set(merged) == set(file.keys())
        for key, x in merged.items():
            assert_bits_equal(x, file.get_tensor(key))


# ---- vocabularies ------------------------------------------------------------------------------


def test_vocabularies_of_different_sizes_are_named(tmp_path: Path) -> None:
    for model, rows in (("a", 256), ("b", 320)):
        table = torch.ones(rows, 4)
        content = {"model.embed_tokens.weight": table, "lm_head.weight": table + 1}
        write_file(tmp_path / model / "model.safetensors", content)
    config = linear(tmp_path / "a", tmp_path / "b")
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoints(config, tmp_path / "out", progress=False)
    assert (
        f"the vocabularies differ: lm_head.weight has 256 rows in {tmp_path / 'a'}, 320 in "
        f"{tmp_path / 'b'}; bring the models to one tokenizer"
    ) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("fc.weight", (320, 4)),
        ("embed.weight", (256, 8)),
        ("embed.weight", (320, 8)),
        ("embed.weight", (256,)),
        ("embed.weight", ()),
        ("embed.weight", (256, 4)),
    ],
)
def test_other_shapes_are_no_vocabularies(name: str, other: tuple[int, ...]) -> None:
    own = {name: Signature(torch.float32, (256, 4))}
    assert vocabularies({"a": own, "b": {name: Signature(torch.float32, other)}}) is None
    assert vocabularies({"a": own, "b": {}}) is None


# ---- the configuration -------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prefix": "module."}, "models[0].prefix' is no prefix; got 'module.'; expected such as"),
    ({"prefix": {"from": "x"}}, "is no prefix"),
    ({"prefix": {"from": "x", "to": None}}, "is no prefix"),
    ({"prefix": {"from": "x", "to": "", "more": ""}}, "is no prefix"),
    ({"renames": {"a": "b"}}, "models[0].renames' is no list of renames"),
    ({"renames": [["a"]]}, "no list of renames"),
    ({"renames": ["ab"]}, "no list of renames"),
    ({"renames": [["", "b"]]}, "no list of renames"),
    ({"renames": [["a", 1]]}, "no list of renames"),
]


@pytest.mark.parametrize(("entry", "text"), WRONG)
def test_refused_names_of_a_model(entry: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"merge_method": "linear", "models": [{"model": "a"} | entry]})
    assert text in str(caught.value)


@pytest.mark.parametrize("value", ["vision.*", [1], {"a": "b"}, [None], None])
@pytest.mark.parametrize("key", ["only", "skip"])
def test_refused_patterns(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"config: '{key}' is no list"):
        load_config(linear(Path("a")) | {key: value})


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]  # mine",
        '{"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}',
        "---\nmerge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 1}\n...\n",
    ],
)
def test_options_are_in_the_text(tmp_path: Path, text: str) -> None:
    """Which is kept beside the result, to merge it again."""
    path = tmp_path / "c.yml"
    path.write_text(text)
    assert load_config(path).text == text
    read = load_config(path, only=["vision.*", "it's: [odd]"], skip=["*.bias"])
    assert (read.only, read.skip) == (("vision.*", "it's: [odd]"), ("*.bias",))
    path.write_text(read.text)
    assert load_config(path) == read
    with pytest.raises(ConfigError, match="'only' is also given as an option"):
        load_config(path, only=["x"])


# ---- merges ------------------------------------------------------------------------------------


def renamed(content: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: x for name, x in content.items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("where", ["model", "base", "both"])
def test_a_merge_over_prefixes_is_that_of_equal_names(
    tmp_path: Path, where: str, suffix: str, shards: int
) -> None:
    """Names of the result are those that the base has after its own prefix."""
    config: dict[str, Any] = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}}
    for kind in ("plain", "prefixed"):
        for i, model in enumerate(("base", "a")):
            odd = kind == "prefixed" and where in (("base", "both"), ("model", "both"))[i]
            content = renamed(tensors(i), "module." if odd else "")
            write_folder(tmp_path / kind / model, content, shards=shards, suffix=suffix)
        models: list[dict[str, Any]] = [{"model": tmp_path / kind / m} for m in ("base", "a")]
        if kind == "prefixed":
            for i, m in enumerate(models):
                if where in (("base", "both"), ("model", "both"))[i]:
                    m["prefix"] = {"from": "module.", "to": ""}
        data = config | {"base_model": tmp_path / kind / "base", "models": models}
        merge_checkpoints(data, tmp_path / f"out_{kind}", progress=False)
    expected, merged = read_folder(tmp_path / "out_plain"), read_folder(tmp_path / "out_prefixed")
    assert list(merged) == list(expected)
    for key, x in expected.items():
        assert_bytes_equal(merged[key], x)


def test_a_prefix_is_of_the_names_in_each_file(tmp_path: Path) -> None:
    for model, prefix in (("a", ""), ("b", "module.")):
        write_file(tmp_path / model / "model.safetensors", renamed(tensors(), prefix))
        dense = {f"{prefix}linear.weight": torch.ones(2)}
        write_file(tmp_path / model / "2_Dense" / "model.safetensors", dense)
    data = linear(tmp_path / "a", tmp_path / "b")
    with pytest.raises(CheckpointError, match=r'prefix: \{from: "module.", to: ""\}'):
        merge_checkpoints(data, tmp_path / "out", progress=False)
    assert nothing_left(tmp_path, "out")
    data["models"][1]["prefix"] = {"from": "module.", "to": ""}
    merge_checkpoints(data, tmp_path / "out", progress=False)
    merged = read_folder(tmp_path / "out" / "2_Dense")
    assert_bytes_equal(merged["linear.weight"], torch.ones(2))


def part_models(tmp_path: Path) -> tuple[Path, Path]:
    """A CLIP-like base, and an expert that has its vision tower in another model."""
    vision = renamed(tensors(1), "vision_model.")
    text = {"text_model.w": torch.ones(3), "logit_scale": torch.tensor(2.0)}
    base = write_folder(tmp_path / "clip", renamed(tensors(0), "vision_model.") | text)
    mine = {"language_model.w": torch.zeros(5, dtype=torch.int8)}
    expert = write_folder(tmp_path / "vlm", renamed(vision, "vision_tower.") | mine)
    return base, expert


def test_only_the_vision_tower_is_merged_and_the_rest_is_the_base(tmp_path: Path) -> None:
    base, expert = part_models(tmp_path)
    data: dict[str, Any] = linear(base, expert, weights=(0.25, 0.75), only=["vision_model.*"])
    data["models"][1]["prefix"] = {"from": "vision_tower.", "to": ""}
    manifest = merge_checkpoints(data, tmp_path / "out", progress=False)
    assert manifest.dropped == ("language_model.w",)
    merged = read_folder(tmp_path / "out")
    towers = [tensors(0), tensors(1)]
    for key, x in towers[0].items():
        if x.is_floating_point():
            x = merge_tensors([x, towers[1][key]], "linear", weight=[0.25, 0.75])
        assert_bits_equal(merged[f"vision_model.{key}"], x)
    assert_bytes_equal(merged["text_model.w"], torch.ones(3))
    assert_bytes_equal(merged["logit_scale"], torch.tensor(2.0))
    assert len(merged) == len(towers[0]) + 2


def test_skip_as_an_option_is_only_of_the_others(tmp_path: Path) -> None:
    base, expert = part_models(tmp_path)
    data: dict[str, Any] = linear(base, expert)
    data["models"][1]["prefix"] = {"from": "vision_tower.", "to": ""}
    options: list[dict[str, list[str]]] = [
        {"only": ["vision_model.*"]},
        {"skip": ["text_model.*", "language_model.*", "logit_scale"]},
    ]
    results = []
    for i, option in enumerate(options):
        merge_checkpoints(data, tmp_path / f"out{i}", progress=False, **option)
        results.append(read_folder(tmp_path / f"out{i}"))
        written = load_config(tmp_path / f"out{i}" / "mergekern_config.yml")
        assert {"only": list(written.only), "skip": list(written.skip)} == {
            "only": [],
            "skip": [],
            **option,
        }
    assert results[0].keys() == results[1].keys()
    for key, x in results[0].items():
        assert_bytes_equal(results[1][key], x)


def test_exceptions_go_before_only(tmp_path: Path) -> None:
    base, expert = part_models(tmp_path)
    drop = {"filter": "text_model", "action": "drop"}
    data: dict[str, Any] = linear(base, expert, only=["vision_model.*"], exceptions=[drop])
    data["models"][1]["prefix"] = {"from": "vision_tower.", "to": ""}
    manifest = merge_checkpoints(data, tmp_path / "out", progress=False)
    assert set(manifest.dropped) == {"text_model.w", "language_model.w"}
