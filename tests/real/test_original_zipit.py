"""ZipIt's own pipeline on two real encoders, with its functions and with those of the drop-in.

MERGEKERN_ZIPIT names a checkout of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mergekern.integrations import zipit

from accuracy import assert_bytes_equal
from cifar import Cifar10, weights
from zipit import needed
from zipit import original as zipit_original
from zipit_encoder import encoder


@pytest.fixture
def original() -> Iterator[ModuleType]:
    with zipit_original() as module:
        yield module


@needed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", ["match_tensors_zipit", "match_tensors_permute"])
@pytest.mark.parametrize("stop_at", [None, 21, 42], ids=["all", "7 of 20", "13 of 20"])
def test_original_scripts_give_the_same(
    original: ModuleType, function: str, stop_at: int | None
) -> None:
    """Groups, permutations and merged weights, on statistics of 500 images."""
    cifar = Cifar10()
    chosen = cifar.statistics_indices()[:500]
    images = cifar.normalized(chosen)
    batches = tuple((x, None) for x in images.x.split(100))  # a list would be one of loaders

    a, b = (weights(f"cifar5/{name}.safetensors") for name in "ab")

    def run() -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        graphs = importlib.import_module("graphs.resnet_graph")
        models = [
            graphs.ResNetGraph(encoder(m), shortcut_name="downsample", head_name="fc").graphify()
            for m in (a, b)
        ]
        merge = original.ModelMerge(*models, device="cpu")
        matching = importlib.import_module("matching_functions")
        metrics = importlib.import_module("metric_calculators").get_metric_fns(["covariance"])
        result = encoder(a)
        merge.transform(
            result,
            batches,
            metric_classes=metrics,
            transform_fn=getattr(matching, function),
            stop_at=stop_at,
        )
        unmerges = {node: torch.cat([*u]) for node, u in merge.unmerges.items()}
        return unmerges, merge.get_merged_state_dict()

    theirs, their_state = run()
    with zipit.accelerated():
        ours, our_state = run()
    assert theirs.keys() == ours.keys()
    assert len(theirs) >= 4
    for node, unmerge in theirs.items():
        assert_bytes_equal(ours[node], unmerge)
    for key, x in their_state.items():
        assert_bytes_equal(our_state[key], x)
