"""A published classifier merged with noisy copies of itself, by every method, through files.

The original is trained on uncompressed CIFAR-10 (published: 91.78 %); the JPEG bytes that we have
cost it a tenth: 81.03 % of all test images, 86.3 % of training images, measured with this file's
network. So the oracle of the merged networks is the original on the same images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergekern as mk

from accuracy import assert_bytes_equal
from cifar import Cifar10, Images, network, outputs, percent, weights

VALUES = {"weight": 0.5, "t": 0.5, "density": 0.5, "lambda": 0.4}
# A Fisher matrix is a tensor, which no configuration holds.
METHODS = [name for name, method in mk.methods().items() if not method.tensor_valued]


@pytest.fixture(scope="module")
def images() -> Images:
    """Every fifth test image."""
    cifar = Cifar10()
    chosen = cifar.test_indices()[::5]
    return cifar.images(chosen, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    """The published weights, with the integer counters of BatchNorm."""
    state = network(weights("resnet_cifar10/resnet20.safetensors"), "linear").state_dict()
    counters = [k for k, x in state.items() if not x.is_floating_point()]
    assert (len(state), len(counters)) == (97 + 19, 19)
    return state | {k: torch.tensor(7) for k in counters}


def noisy(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Each float multiplied by 1 + e, |e| < 2**-8: up to one unit of bfloat16's last place."""
    g = torch.Generator().manual_seed(seed)
    return {
        k: x * (1 + (2 * torch.rand(x.shape, generator=g) - 1) / 256)
        if x.is_floating_point()
        else x.clone()
        for k, x in state.items()
    }


def rounded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.bfloat16() if x.is_floating_point() else x.clone() for k, x in state.items()}


@pytest.fixture(scope="module")
def states(original: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By file name; mixed dtypes, as checkpoints of different origin have."""
    return {"original": original, "noisy": noisy(original, 1), "rounded": rounded(original)}


@pytest.fixture(scope="module")
def folder(states: dict[str, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resnet20")
    for name, state in states.items():
        save_file(state, path / f"{name}.safetensors")
    return path


@pytest.fixture(scope="module")
def predictions(original: dict[str, Tensor], images: Images) -> Tensor:
    return outputs(network(original, "linear"), images).argmax(1)


def inputs(name: str) -> tuple[str | None, list[str]]:
    """The base and the models that a method is given."""
    method = mk.methods()[name]
    base = "original" if method.base in ("required", "first") else None
    room = method.models[1] or 2
    if method.base == "first":
        room -= 1
    return base, ["noisy", "rounded"][:room]


def parameters(name: str) -> dict[str, float]:
    method = mk.methods()[name]
    given = {p.name: VALUES[p.name] for p in method.parameters if p.name in VALUES}
    missing = [p.name for p in method.parameters if p.required and p.name not in given]
    assert not missing, f"{name}: this test has no value for {missing}"
    return given


def test_the_original_scores_as_measured_before(predictions: Tensor, images: Images) -> None:
    assert len(images) == 2000
    # 5 images at a tie of two classes may change sides with the order of float32 sums.
    assert abs(percent(predictions == images.label) - 80.45) <= 0.25


@pytest.mark.parametrize("name", METHODS)
def test_merged_with_noise_it_is_still_itself(
    name: str,
    states: dict[str, dict[str, Tensor]],
    folder: Path,
    images: Images,
    predictions: Tensor,
    tmp_path: Path,
) -> None:
    base, models = inputs(name)
    config: dict[str, Any] = {
        "merge_method": name,
        "models": [{"model": str(folder / f"{m}.safetensors")} for m in models],
        "parameters": parameters(name),
    }
    if base:
        config["base_model"] = str(folder / f"{base}.safetensors")
    manifest = mk.merge_checkpoints(config, tmp_path / "out", seed=3, progress=False)
    merged = load_file(tmp_path / "out" / "model.safetensors")

    # Every tensor is there, of the dtype that its inputs promote to; counters are copied.
    assert (manifest.merged, manifest.copied, manifest.dropped) == (97, 19, ())
    read = [states[m] for m in ([base] if base else []) + models]
    assert merged.keys() == read[0].keys()
    for key, x in merged.items():
        if x.is_floating_point():
            widest = torch.float32 if any(s[key].dtype == torch.float32 for s in read) else None
            assert x.dtype == (widest or torch.bfloat16), key
        else:
            assert_bytes_equal(x, read[0][key])

    # The same bits as in memory.
    expected = mk.merge_state_dicts(
        [states[m] for m in models],
        name,
        base=states[base] if base else None,
        seed=3,
        **parameters(name),
    )
    for key, x in merged.items():
        assert_bytes_equal(x, expected[key])

    # Something was merged, and the network is the one it was.
    got = outputs(network(merged, "linear"), images).argmax(1)
    moved = [k for k, x in merged.items() if not torch.equal(x.float(), states["original"][k])]
    print(f"{name}: {percent(got == images.label):.2f} %, {int((got != predictions).sum())} differ")
    assert moved
    assert percent(got != predictions) <= 1.0
    assert abs(percent(got == images.label) - percent(predictions == images.label)) <= 0.5
