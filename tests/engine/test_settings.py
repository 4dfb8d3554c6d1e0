"""Settings without effect are named, and a host's rules reach every tensor of a merge."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekern as mk
from mergekern import ArgumentError, ConfigWarning
from mergekern.engine.config import load_config
from mergekern.engine.parameters import idle

from accuracy import assert_bits_equal
from engine.models import linear, nothing_left, read_folder, tensors, ties, write_folder
from refusal import refused

NAMES = ["embed", "layers.0.attn.w", "layers.0.mlp.w", "layers.1.attn.w", "layers.1.mlp.w"]


def slerp(t: Any) -> dict[str, Any]:
    models = [{"model": "a"}, {"model": "b"}]
    return {"merge_method": "slerp", "models": models, "parameters": {"t": t}}


# ---- what is idle ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "texts"),
    [
        (0.5, []),
        ([0, 1], []),
        ([{"filter": "attn", "value": 1}, {"filter": "mlp", "value": [0, 1]}, {"value": 0}], []),
        ({"filter": "*", "value": 1}, []),
        ([{"filter": "atn", "value": 1}, {"value": 0}], ["filter 'atn' fits no tensor"]),
        (
            [{"filter": "xx", "value": 1}, {"filter": "zz", "value": [0, 1]}, {"value": 0}],
            ["filter 'xx' fits no tensor", "filter 'zz' fits no tensor"],
        ),
        (
            [{"filter": "layers", "value": 1}, {"filter": "attn", "value": 2}, {"value": 0}],
            ["filter 'attn' fits only tensors that are settled before it"],
        ),
        (
            [{"value": 1}, {"filter": "attn", "value": 2}],
            ["filter 'attn' fits only tensors that are settled before it"],
        ),
        (
            [{"filter": "embed", "value": [0, 1]}, {"value": 0}],
            ["gradient [0, 1] meets no stack of layers, so its first value counts"],
        ),
        ([{"filter": "embed", "value": [1]}, {"value": 0}], []),  # one value is no gradient
        (
            [{"filter": "attn", "value": [{"filter": "mlp", "value": 1}, {"value": 2}]}],
            ["filter 'mlp' fits only tensors that are settled before it"],
        ),
    ],
    ids=str,
)
def test_idle_settings(setting: Any, texts: list[str]) -> None:
    found = idle(load_config(slerp(setting)), NAMES)
    assert found == [f"t of all models: {text}" for text in texts]


def test_gradient_of_a_model_without_layers_is_idle() -> None:
    assert idle(load_config(slerp([0, 1])), ["conv.weight", "fc.bias"])
    assert not idle(load_config(slerp([0, 1])), [])  # nothing is merged: no setting is to blame


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_folder(tmp_path / name, tensors(i)) for i, name in enumerate("abc")]


def test_one_warning_lists_all_of_them_and_the_merge_goes_on(
    models: list[Path], tmp_path: Path
) -> None:
    density = [{"filter": "attention", "value": 0.1}, {"value": 0.5}]
    config = ties(*models, density=density)
    config["models"][1]["parameters"]["weight"] = [
        {"filter": "head", "value": [0.5, 1]},
        {"filter": "position_ids", "value": 3},  # only a buffer, which is copied
        {"value": 1},
    ]
    with pytest.warns(ConfigWarning) as caught:
        mk.merge_checkpoints(config, tmp_path / "out", progress=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message).splitlines() == [
        "config: without effect:",
        "  density of all models: filter 'attention' fits no tensor",
        f"  weight of model {models[2]}: gradient [0.5, 1] meets no stack of layers, "
        "so its first value counts",
        f"  weight of model {models[2]}: filter 'position_ids' fits no tensor",
    ]
    plain = ties(*models, density=0.5)
    plain["models"][1]["parameters"]["weight"] = [
        {"filter": "head", "value": 0.5},
        {"value": 1},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mk.merge_checkpoints(plain, tmp_path / "plain", progress=False)
    expected = read_folder(tmp_path / "plain")
    for key, x in read_folder(tmp_path / "out").items():
        assert_bits_equal(x, expected[key])


# ---- bad values, before anything is written ---------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "heavy", True, [0.5, float("nan")]])
def test_bad_weight_names_key_model_and_tensor(
    models: list[Path], tmp_path: Path, value: Any
) -> None:
    config = linear(*models)
    config["models"][1]["parameters"]["weight"] = [
        {"filter": "layer.2.dense.bias", "value": value},
        {"value": 1},
    ]
    with pytest.raises(mk.ConfigError) as caught:
        mk.merge_checkpoints(config, tmp_path / "out", progress=False)
    text = str(caught.value)
    assert text.startswith("config: weight is ")
    assert text.endswith(f"(weight of model {models[1]}, tensor encoder.layer.2.dense.bias)")
    assert nothing_left(tmp_path, "out")


@pytest.mark.parametrize("call", [mk.merge_tensors, mk.merge_state_dicts])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": [1.0]}, ("wrong length", "got 1", "expected 2")),
        ({"weight": [1.0, 2.0, 3.0]}, ("wrong length", "got 3", "expected 2")),
        ({"weight": 1, "density": [0.5] * 3}, ("density", "wrong length", "got 3")),
        ({"weight": [1.0, float("nan")]}, ("weight", "not finite", "got nan")),
        ({"weight": 1, "lambda_": float("nan")}, ("lambda", "not finite")),
        ({"weight": 1, "density": 1.5}, ("density", "out of range")),
    ],
    ids=str,
)
def test_bad_values_of_a_call(
    call: Callable[..., Any], given: dict[str, Any], words: tuple[str, ...]
) -> None:
    def one() -> Any:
        x = torch.ones(2)
        return x if call is mk.merge_tensors else {"w": x}

    with refused("ties", *words):
        call([one(), one()], "ties", base=one(), **given)
    with refused("ties", "needs a base model"):
        call([one(), one()], "ties", weight=1)


# ---- hosts -----------------------------------------------------------------------------------


def test_unknown_host_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    missing = ties(tmp_path / "none", tmp_path / "no")
    with refused("ties", "unknown host", "'mergekti'", "mergekit"):
        mk.merge_checkpoints(missing, tmp_path / "out", host="mergekti")
    with pytest.raises(ArgumentError, match="slerp: unknown host"):
        mk.merge_checkpoints(slerp(0.5), tmp_path / "out", host="nobody")


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("out_dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_host_mergekit_rounds_where_mergekit_does(
    models: list[Path], tmp_path: Path, method: str, dtype: str | None, out_dtype: str | None
) -> None:
    """Inputs to dtype, every step in it, the result to it and then to out_dtype."""
    config = {**ties(*models, method=method, density=0.5), "dtype": dtype, "out_dtype": out_dtype}
    if method == "task_arithmetic":
        del config["parameters"]["density"]
    mk.merge_checkpoints(config, tmp_path / "out", host="mergekit", progress=False)
    inputs = getattr(torch, dtype or "float32")
    base, *states = ({k: x.to(inputs) for k, x in tensors(i).items()} for i in range(3))
    for key, x in read_folder(tmp_path / "out").items():
        if not tensors()[key].is_floating_point():
            assert x.dtype == tensors()[key].dtype
            continue
        expected = mk.merge_tensors(
            [s[key] for s in states],
            method,
            base=base[key],
            name=key,
            host="mergekit",
            weight=1.0,
            **config["parameters"],
        )
        assert_bits_equal(x, expected.to(getattr(torch, out_dtype or dtype or "float32")))


def test_masks_of_a_host_depend_on_the_seed_alone(models: list[Path], tmp_path: Path) -> None:
    config = ties(*models, method="dare_ties", density=0.5)
    state = torch.get_rng_state()
    found = []
    for i, (seed, host) in enumerate([(1, "mergekit"), (1, "mergekit"), (2, "mergekit")]):
        out = tmp_path / f"out{i}"
        mk.merge_checkpoints(config, out, seed=seed, host=host, progress=False)
        found.append(read_folder(out)["head.weight"])
    assert_bits_equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), state)  # the caller's draws are left alone
