"""mergekit's YAML: every key read or refused by name, values per tensor, precedence, the base."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekern import ArgumentError, ConfigError, MergekernError
from mergekern.engine.config import load_config
from mergekern.engine.parameters import arguments, evaluate, layer_positions

from mutants import doubled


def config(**changes: Any) -> dict[str, Any]:
    """A small valid configuration; a change to None removes the key."""
    data: dict[str, Any] = {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 1.0}},
            {"model": "b", "parameters": {"weight": 3.0}},
        ],
    }
    data.update(changes)
    return {k: v for k, v in data.items() if v is not None}


def with_base(method: str = "ties", **changes: Any) -> dict[str, Any]:
    return config(merge_method=method, base_model="base", **changes)


# ---- reading ---------------------------------------------------------------------------------


def test_every_supported_key(tmp_path: Path) -> None:
    text = """
merge_method: dare_ties
base_model: base
models:
  - model: base
  - model: a
    parameters:
      weight: 0.5
      density: [1, 0.5]
  - model: b
    parameters: {weight: 1e-3}
parameters:
  lambda: 0.7
  normalize: true
  rescale: false
  int8_mask: true
  density:
    - {filter: attn, value: 0.25}
    - value: 0.75
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
exceptions:
  - {filter: pooler, action: drop}
  - {filter: head, action: copy, from: a}
  - {filter: extra, action: present}
"""
    path = tmp_path / "merge.yml"
    path.write_text(text)
    read = load_config(path)
    assert read.method.name == "dare_ties"
    assert [m.path for m in read.models] == ["a", "b"]
    assert (read.base, read.base_apart, read.home) == ("base", True, "base")
    assert read.paths == ("base", "a", "b")
    assert (read.dtype, read.out_dtype) == (torch.float32, torch.bfloat16)
    assert [(e.filter, e.action, e.source) for e in read.exceptions] == [
        ("pooler", "drop", None),
        ("head", "copy", "a"),
        ("extra", "present", None),
    ]
    assert read.text == text
    given = arguments(read, "layers.0.attn", 1.0, [0, 1])
    assert given == {
        "weight": [0.5, 1e-3],
        "density": [0.5, 0.25],
        "normalize": True,
        "rescale": False,
        "lambda_": 0.7,
        "int8_mask": True,
    }


def test_a_mapping_with_paths_and_tuples_is_as_good_as_yaml(tmp_path: Path) -> None:
    models = ({"model": tmp_path / "a", "parameters": {"weight": 1}},)
    read = load_config({"merge_method": "linear", "models": models})
    assert read.paths == (str(tmp_path / "a"),)
    assert yaml.safe_load(read.text)["models"][0]["model"] == str(tmp_path / "a")


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64"])
def test_dtypes(name: str) -> None:
    read = load_config(config(dtype=name, out_dtype=name))
    assert read.dtype == read.out_dtype == getattr(torch, name)


def test_out_dtype_auto_is_the_stored_one() -> None:
    assert load_config(config(out_dtype="auto")).out_dtype is None


# ---- the base --------------------------------------------------------------------------------


def test_base_is_not_a_model_of_ties() -> None:
    listed = [{"model": "base"}, *config()["models"]]
    for models in (listed, listed[::-1], config()["models"]):
        read = load_config(with_base(models=models))
        assert "base" not in [m.path for m in read.models]
        assert read.paths[0] == "base"


def test_base_of_linear_stays_in_its_place_or_comes_last() -> None:
    models = config()["models"]
    read = load_config(with_base("linear", parameters={"weight": 1}))
    assert read.paths == ("a", "b", "base")
    assert (read.base, read.base_apart, read.home) == (None, False, "base")
    inside = [models[0], {"model": "base"}, models[1]]
    read = load_config(with_base("linear", models=inside, parameters={"weight": 1}))
    assert read.paths == ("a", "base", "b")


def test_an_optional_base_is_not_a_model_and_may_be_missing() -> None:
    models = config()["models"]
    for listed in (models, [{"model": "base"}, *models]):
        read = load_config(with_base("nuslerp", models=listed))
        assert (read.paths, read.base, read.base_apart) == (("base", "a", "b"), "base", True)
    read = load_config(config(merge_method="nuslerp"))
    assert (read.paths, read.base, read.base_apart, read.home) == (("a", "b"), None, False, "a")
    with pytest.raises(ArgumentError, match="beside the base; got 1; expected exactly 2"):
        load_config(with_base("nuslerp", models=[models[0], {"model": "base"}]))


@pytest.mark.parametrize("models", [["other"], ["base", "other"], ["other", "base"]])
def test_base_of_slerp_is_first(models: list[str]) -> None:
    listed = [{"model": m} for m in models]
    read = load_config(with_base("slerp", models=listed, parameters={"t": 0.5}))
    assert read.paths == ("base", "other")


def test_slerp_without_base_takes_the_order_of_the_list() -> None:
    listed = [{"model": "y"}, {"model": "x"}]
    read = load_config(config(merge_method="slerp", models=listed, parameters={"t": 0.5}))
    assert read.paths == ("y", "x")
    assert read.home == "y"


def test_the_same_model_may_be_listed_twice_unless_it_is_the_base() -> None:
    twice = [config()["models"][0]] * 2
    assert load_config(config(models=twice)).paths == ("a", "a")
    with pytest.raises(ConfigError, match="base model is listed more than once; got a"):
        load_config(config(models=twice, base_model="a"))


# ---- refusals --------------------------------------------------------------------------------

FILTER = {"filter": "x", "action": "drop"}
WRONG: list[tuple[dict[str, Any], str]] = [
    (config(slices=[]), "key 'slices' is not supported"),
    (config(modules={}), "key 'modules' is not supported"),
    (config(tokenizer={"source": "union"}), "key 'tokenizer' is not supported"),
    (config(chat_template="auto"), "key 'chat_template' is not supported"),
    (config(nonsense=1), "unknown key 'nonsense'"),
    ({"models": []}, "key 'merge_method' is missing"),
    (config(merge_method="delta"), "unknown method; got 'delta'"),
    (config(merge_method=["linear"]), "'merge_method' is no name; got ['linear']"),
    ({"merge_method": "linear"}, "'models' is no list"),
    (config(models={"model": "a"}), "'models' is no list"),
    (config(models=[]), "wrong number of models"),
    (config(models=["a"]), "'models[0]' is no mapping"),
    (config(models=[{"parameters": {}}]), "key 'model' is missing in models[0]"),
    (config(models=[{"model": "a", "weight": 1}]), "unknown key 'weight' in models[0]"),
    (config(models=[{"model": 5}]), "'models[0].model' is no path; got 5"),
    (config(models=[{"model": {"path": "a"}}]), "'models[0].model' is no path"),
    (config(models=[{"model": "a+lora"}]), "names a LoRA adapter"),
    (config(base_model="a+lora"), "'base_model' names a LoRA adapter"),
    (config(base_model=["a"]), "'base_model' is no path"),
    (config(parameters=[1]), "'parameters' is no mapping"),
    (config(parameters={"density": 1}), "linear: unknown parameter; got 'density'"),
    (config(models=[{"model": "a", "parameters": {"t": 1}}]), "unknown parameter; got 't'"),
    (config(merge_method="ties"), "ties: needs a base model; got none; expected one"),
    (with_base(models=[{"model": "base"}]), "ties: wrong number of models beside the base; got 0"),
    (config(merge_method="passthrough", models=[{"model": "a"}, {"model": "b"}]), "exactly 1"),
    (with_base("slerp", parameters={"t": 1}), "slerp: "),
    (config(dtype="int8"), "'dtype' is unknown; got 'int8'"),
    (config(dtype="auto"), "'dtype' is unknown; got 'auto'"),
    (config(dtype=["float32"]), "'dtype' is unknown; got ['float32']"),
    (config(out_dtype=16), "'out_dtype' is unknown; got 16"),
    (config(tokenizer_source="union"), "'tokenizer_source' is only supported as 'base'"),
    (config(tokenizer_source="a"), "'tokenizer_source'"),
    (config(exceptions=FILTER), "'exceptions' is no list"),
    (config(exceptions=["x"]), "'exceptions' is no mapping"),
    (config(exceptions=[FILTER | {"why": 1}]), "unknown key 'why' in exceptions"),
    (config(exceptions=[{"filter": "x"}]), "an exception needs a filter and an action"),
    (config(exceptions=[{"filter": "x", "action": "keep"}]), "an exception needs"),
    (config(exceptions=[{"filter": 3, "action": "drop"}]), "an exception needs"),
    (config(exceptions=[{"filter": "x", "action": "copy"}]), "'from' names the model"),
    (config(exceptions=[FILTER | {"from": "a"}]), "'from' names the model"),
    (config(exceptions=[{"filter": "x", "action": "copy", "from": "c"}]), "got 'c'"),
]


@pytest.mark.parametrize(("data", "text"), WRONG, ids=[w[1][:40] for w in WRONG])
def test_refused_in_one_sentence_naming_the_key(data: dict[str, Any], text: str) -> None:
    with pytest.raises((ConfigError, ArgumentError)) as caught:
        load_config(data)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"- a\n- b\n", "holds no mapping; got list"),
        (b"", "holds no mapping; got NoneType"),
        (b"a: [1\nb: }", "is no valid YAML"),
        (b"a: \xff\xfe", "is no valid YAML"),
        (b"\x00\x01", "is no valid YAML"),
        (b"a: !!python/object/apply:os.system [true]", "is no valid YAML"),
    ],
)
def test_file_that_is_no_configuration(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "merge.yml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert text in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


HOSTILE = {
    "aliases that double": doubled("[1]", "[{}]"),
    "merge keys that double": doubled("{a: 1}", "{{<<: [{}]}}"),
    "texts that double": doubled("['" + "a" * 4000 + "']", "[{}]"),
    "a list in itself": "a: &a [*a]",
    "a list in itself, twice": "a: &a [*a, *a]",
    "a mapping in itself": "a: &a {b: *a}",
    "a mapping merged into itself": "a: &a {<<: *a}",
    "lists in lists": "[" * 100_000,
    "mappings in mappings": "".join(f"{' ' * i}k:\n" for i in range(900)),
    "dashes": "- " * 5000,
    "many digits": "merge_method: " + "9" * 5000,
    "many hexadecimal digits": "merge_method: 0x" + "f" * 4000,
    "base 60": "merge_method: " + "1:" * 2000 + "1",
    "base 60, long": "merge_method: " + "1:" * 400_000 + "1",
    "65 bits": "merge_method: 18446744073709551616",
    "a long text": "merge_method: " + "a" * 5000,
    "a long file": "# " + "a" * (1 << 20),
    "NaN as keys": ".nan: 1\n.nan: 2",
    "a key that is a list": "? [a, b]\n: c",
    "a key that is a mapping": "? {a: b}\n: c",
    "31st of June": "merge_method: 2001-06-31",
    "no boolean": "merge_method: !!bool x",
    "no time": "merge_method: !!timestamp x",
    "no integer": "merge_method: !!int x",
    "two documents": "---\na: 1\n---\nb: 2",
    "a line break": 'merge_method: "a\\nb"',
    "a line separator": 'merge_method: linear\nmodels: [{model: "\\L"}]',
    "half a character": 'merge_method: "\\uD800"',
    "a zero": 'models: [{model: "\\0"}]\nmerge_method: linear',
    "an empty path": "models: [{model: ''}]\nmerge_method: linear",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_yaml_that_would_cost_much_or_break_a_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(content)
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert time.process_time() - started < 5
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_aliases_and_merge_keys_are_read_as_yaml_means_them(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text("""
merge_method: ties
base_model: base
models:
  - {model: a, parameters: &own {weight: 1, density: 0.5}}
  - {model: b, parameters: {<<: *own, weight: 2}}
  - {model: c, parameters: *own}
""")
    given = arguments(load_config(path), "w", 0.0, [0, 1, 2])
    assert (given["weight"], given["density"]) == ([1, 2, 1], [0.5, 0.5, 0.5])


def test_a_mapping_in_itself() -> None:
    data = config()
    data["parameters"] = data
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config(data)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yml")


def test_mapping_that_yaml_cannot_hold() -> None:
    with pytest.raises(MergekernError):
        load_config(config(parameters={"weight": object()}))


# ---- values of one tensor --------------------------------------------------------------------


def test_positions_in_the_depth_of_each_stack() -> None:
    names = ["embed", "head.weight"]
    names += [f"encoder.layer.{i}.w" for i in range(5)]
    names += [f"decoder.{i}.ffn.7.w" for i in range(3)]
    names += ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "conv2d.w", "1_Pooling.w"]
    at = layer_positions(names)
    assert [at[f"encoder.layer.{i}.w"] for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [at[f"decoder.{i}.ffn.7.w"] for i in range(3)] == [0, 0.5, 1]
    assert [at[f"layer1.{i}.conv1"] for i in range(2)] == [0, 1]
    assert at["layer2.0.conv1"] == 1  # a stack of one
    assert at["embed"] == at["head.weight"] == at["conv2d.w"] == at["1_Pooling.w"] == 0


@pytest.mark.parametrize(
    ("setting", "position", "value"),
    [
        (0.3, 0.7, 0.3),
        ([0, 1], 0.25, 0.25),
        ([0, 1], 1.0, 1.0),
        ([0, 0.5, 1], 0.5, 0.5),
        ([0, 0.5, 0], 0.75, 0.25),
        ([7], 0.4, 7),
        ([1, 3, 2], 0.0, 1),
        (["1e-3", 1], 0.5, 0.5005),  # a text to YAML
        ([True, False], 0.2, True),
        ([True, False], 0.8, False),
        ({"filter": "attn", "value": 2}, 0.0, 2),
        ({"filter": "mlp", "value": 2}, 0.0, None),
        ([{"filter": "mlp", "value": 2}, {"filter": "attn", "value": 3}, {"value": 4}], 0.0, 3),
        ([{"filter": "mlp", "value": 2}, {"value": 4}], 0.0, 4),
        ([{"filter": "*", "value": 5}, {"filter": "attn", "value": 3}], 0.0, 5),
        ([{"filter": None, "value": 5}], 0.0, 5),
        ([{"filter": "attn", "value": [0, 10]}, {"value": 1}], 0.5, 5),
    ],
)
def test_value_of_a_setting(setting: Any, position: float, value: Any) -> None:
    got = evaluate(setting, "layer.3.attn.w", position)
    assert got == value
    assert type(got) is type(value) or isinstance(value, int | float)


@pytest.mark.parametrize(
    "setting",
    [
        [],
        [1, {"value": 2}],
        [None, 1],
        [[1], [2]],
        [{"filter": "x"}],
        {"filter": "x", "values": 1},
        [{"value": 1, "other": 2}],
    ],
)
def test_setting_that_cannot_be_read(setting: Any) -> None:
    with pytest.raises(ConfigError):
        evaluate(setting, "x", 0.5)


def test_gradient_over_layers_of_the_method_t() -> None:
    models = [{"model": "a"}, {"model": "b"}]
    t = [{"filter": "attn", "value": [0, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]
    read = load_config(config(merge_method="slerp", models=models, parameters={"t": t}))
    names = [f"layers.{i}.{part}" for i in range(5) for part in ("attn", "mlp", "norm")]
    at = layer_positions(names)
    for i in range(5):
        got = [arguments(read, n, at[n], [0, 1])["t"] for n in names[3 * i : 3 * i + 3]]
        assert got == [i / 4, 1 - i / 4, 0.5]


def test_model_goes_before_global_and_that_before_default() -> None:
    models = [
        {"model": "a", "parameters": {"weight": 1, "density": 0.1}},
        {"model": "b", "parameters": {"weight": [{"filter": "attn", "value": 2}]}},
        {"model": "c"},
    ]
    everywhere = {"weight": 9, "density": [{"filter": "attn", "value": 0.3}]}
    read = load_config(with_base(models=models, parameters=everywhere))
    given = arguments(read, "attn", 0.0, [0, 1, 2])
    assert given["weight"] == [1, 2, 9]
    assert given["density"] == [0.1, 0.3, 0.3]
    given = arguments(read, "mlp", 0.0, [0, 1, 2])
    assert given["weight"] == [1, 9, 9]  # no filter of b fits, so the global value stands
    assert given["density"] == [0.1, 1.0, 1.0]
    assert arguments(read, "mlp", 0.0, [2])["weight"] == [9]


def test_weight_zero_is_a_weight() -> None:
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 0), ("b", 0.0))]
    read = load_config(config(models=models, parameters={"weight": 5}))
    assert arguments(read, "x", 0.0, [0, 1])["weight"] == [0, 0]


def test_missing_weight_names_model_and_tensor() -> None:
    models = [{"model": "a", "parameters": {"weight": [{"filter": "attn", "value": 1}]}}]
    read = load_config(config(models=models))
    with pytest.raises(ConfigError, match=r"'weight' is required for a \(tensor mlp\.w\)"):
        arguments(read, "mlp.w", 0.0, [0])


BAD: list[tuple[Any, str]] = [
    ("heavy", "weight is no number; got 'heavy'; expected a number"),
    ({"a": 1}, "a conditional parameter has filter and value; got {'a': 1}"),
    (math.nan, "weight is not finite; got nan; expected a finite number"),
    ([math.nan, 1.0], "weight is not finite; got nan"),
    (math.inf, "weight is not finite; got inf"),
    (True, "weight is no number; got True"),
    ([], "a parameter is an empty list"),
    ([[1]], "a gradient is a list of numbers; got [[1]]"),
    ([{"value": [1, {"value": 2}]}], "a gradient is a list of numbers"),
]


@pytest.mark.parametrize(("value", "text"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_value_names_key_model_and_tensor(value: Any, text: str) -> None:
    """Of a model's own setting, and of one for all."""
    own = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}]
    read = load_config(config(parameters={"weight": value}, models=own))
    with pytest.raises(ConfigError) as caught:
        arguments(read, "layers.0.x", 0.5, [0, 1])
    assert str(caught.value).startswith(f"config: {text}")
    assert str(caught.value).endswith("(weight of all models, tensor layers.0.x)")
    own[1]["parameters"] = {"weight": value}
    read = load_config(config(models=own))
    with pytest.raises(ConfigError) as caught:
        arguments(read, "layers.0.x", 0.5, [0, 1])
    assert str(caught.value).endswith("(weight of model b, tensor layers.0.x)")
    assert "\n" not in str(caught.value)


def test_bad_density_names_its_range_and_a_bad_switch_its_values() -> None:
    for key, value, text in (
        ("density", 1.5, "density is out of range; got 1.5; expected 0 to 1"),
        ("density", -0.1, "density is out of range; got -0.1"),
        ("normalize", "yes", "normalize is no boolean; got 'yes'; expected true or false"),
        ("lambda", math.nan, "lambda is not finite; got nan"),
    ):
        read = load_config(with_base(parameters={"weight": 1, key: value}))
        with pytest.raises(ConfigError) as caught:
            arguments(read, "w", 0.0, [0, 1])
        assert str(caught.value).startswith(f"config: {text}")
        assert str(caught.value).endswith(f"({key} of all models, tensor w)")


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("merge_method: linear\nmodels: []\nparameters: {weight: 1, weight: 2}\n")
    with pytest.raises(ConfigError, match=r"'weight' is given twice \(line 3\)"):
        load_config(path)


def test_a_subtracted_base_takes_no_parameters() -> None:
    models = [{"model": "a"}, {"model": "base", "parameters": {"weight": 2.0, "density": 1}}]
    with pytest.raises(ConfigError) as caught:
        load_config(with_base(models=models, parameters={"weight": 1.0}))
    assert str(caught.value) == (
        "config: models[1] is the base, which ties subtracts from the others; "
        "got parameters weight, density; expected none"
    )
    models[1]["parameters"] = {"weight": 2.0}
    read = load_config(with_base("linear", models=models, parameters={"weight": 1.0}))
    assert arguments(read, "w", 0.0, [0, 1])["weight"] == [1.0, 2.0]


@pytest.mark.parametrize("spelling", ["./base", "base/", "x/../base"])
def test_the_base_is_known_by_any_spelling(spelling: str) -> None:
    models = [{"model": "a"}, {"model": spelling}]
    copy = {"filter": "head", "action": "copy", "from": spelling}
    everywhere = {"weight": 1.0}
    read = load_config(with_base(models=models, parameters=everywhere, exceptions=[copy]))
    assert read.paths == ("base", "a")
    assert read.exceptions[0].source == "base"
    read = load_config(with_base("linear", models=models, parameters=everywhere))
    assert read.paths == ("a", "base")
    with pytest.raises(ConfigError, match="base model is listed more than once; got base"):
        load_config(with_base(models=[*models, {"model": "base"}], parameters=everywhere))
