"""ZipIt's own pipeline on two real encoders, with its functions and with those of the drop-in.

MERGEKERN_ZIPIT names a checkout of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mergekern.integrations import zipit

from accuracy import assert_bytes_equal
from cifar import Block, Cifar10, ResNet20, weights
from zipit import Anything, checkout, needed


class BasicBlock(Block):
    """The name by which ZipIt's graphs know a block."""


class Encoder(ResNet20):
    """With average pooling as a module, which they hook."""

    def __init__(self) -> None:
        super().__init__("fc")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, Block):
                module.__class__ = BasicBlock

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """ZipIt's model_merger, imported afresh; packages that it does not use here stand in."""
    stand_ins = ("clip", "einops", "fvcore", "fvcore.nn", "fvcore.nn.flop_count")
    theirs = ("matching_functions", "metric_calculators", "model_merger", "utils", "graphs")
    with mock.patch.dict(sys.modules, {n: Anything(n) for n in stand_ins}):
        for name in [n for n in sys.modules if n.split(".")[0] in theirs]:
            del sys.modules[name]
        monkeypatch.syspath_prepend(checkout())
        yield importlib.import_module("model_merger")


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
    images = cifar.images(chosen, mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.243, 0.261])
    batches = tuple((x, None) for x in images.x.split(100))  # a list would be one of loaders

    def encoder(name: str) -> Encoder:
        model = Encoder()
        model.load_state_dict(weights(f"cifar5/{name}.safetensors"), strict=False)
        return model.eval()

    def run() -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        graphs = importlib.import_module("graphs.resnet_graph")
        models = [
            graphs.ResNetGraph(encoder(m), shortcut_name="downsample", head_name="fc").graphify()
            for m in ("a", "b")
        ]
        merge = original.ModelMerge(*models, device="cpu")
        matching = importlib.import_module("matching_functions")
        metrics = importlib.import_module("metric_calculators").get_metric_fns(["covariance"])
        result = encoder("a")
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
