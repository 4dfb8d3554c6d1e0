"""The whole zip of two ResNet-50s, ours beside ZipIt's own, by part.

`python -m bench.table_resnet50` prints both and writes them under bench/results. Weights are random
and BatchNorm's statistics those of the images, so that features have a spread at every depth.
Forward passes, ZipIt's with the copies that its hooks make, are told apart: "beside" is all else.
ZipIt's part needs MERGEKERN_ZIPIT, a checkout of it, and takes minutes. Its matching keeps a matrix
of every step, 12 d**3 bytes for d features of each model: 103 GB for the last 2,048. So places of
more than LARGEST features are told by their first steps, which tells a tenth too little of those
of 512; then they are averaged, which takes as long to apply.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

import mergekern as mk
from bench import paths  # noqa: F401
from mergekern.align.statistics import collector

import original_zipit
import zipit
from report import describe

RESULTS = Path(__file__).parent / "results"
Parts = dict[str, float]  # seconds
BATCH, SIDE = 32, 224
LARGEST = 512  # 1.6 GB


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, named as torchvision names them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride > 1 or channels != out:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """25.6 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            width, made = 64 << stage, []
            for i in range(blocks):
                made.append(Bottleneck(channels, width, 2 if stage and not i else 1))
                channels = 4 * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def pair(images: Tensor) -> list[ResNet50]:
    """From two seeds, with the statistics of these images."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = ResNet50()
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = None  # the plain average
        with torch.no_grad():
            model(images)
        models.append(model.eval())
    return models


def beside(parts: Parts) -> float:
    """All but the forward passes."""
    return sum(parts.values()) - parts["forward"]


def after(parts: Parts) -> float:
    """From the last batch of the statistics on."""
    return sum(parts.get(part, 0.0) for part in ("finishing", "matching", "applying"))


def theirs(models: Sequence[nn.Module], batches: Sequence[Tensor]) -> tuple[Parts, Parts]:
    """Seconds by part, and those of matching by how many places of how many features."""
    with zipit.original() as merger:
        made = original_zipit.zip_pair(merger, models, batches, stages=4, largest=LARGEST)
    places = defaultdict[int, list[float]](list)
    for node in made.nodes:
        places[node.features].append(node.seconds)
    return made.seconds, {f"{len(x)} of {n}": sum(x) for n, x in sorted(places.items())}


def ours(models: Sequence[nn.Module], batches: Sequence[Tensor]) -> Parts:
    """Seconds by part: statistics batch by batch, and comparing the models with the traced one."""
    clock = original_zipit.Clock()
    update = clock.timed("statistics", mk.Covariance.update)
    forward = clock.timed("forward", collector.run_together)
    spaces = clock.timed("spaces", mk.discover_spaces)(models[0], batches[0][:2])
    with (
        mock.patch.object(mk.Covariance, "update", update),
        mock.patch.object(collector, "run_together", forward),
    ):
        found = clock.timed("comparing", mk.collect_statistics)(models, batches, spaces)
    clock["comparing"] -= clock["forward"]
    clock["forward"] -= clock["statistics"]
    match = clock.timed("matching", mk.match)(found, "zip")
    clock.timed("applying", mk.apply)(models, match)
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table_resnet50")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument(
        "--processor-time", action="store_true", help="where others share the cores"
    )
    options = parser.parse_args()
    if options.processor_time:
        original_zipit.now = time.process_time
    g = torch.Generator().manual_seed(2)
    batches = torch.randn(options.images, 3, SIDE, SIDE, generator=g).split(BATCH)
    models = pair(batches[0])
    parts = {"mergekern": ours(models, batches)}
    out: dict[str, Any] = {"machine": describe(), "images": options.images}
    out["clock"] = original_zipit.now.__name__
    if zipit.AT_HAND:
        parts["zipit"], out["zipit's matching by places"] = theirs(models, batches)
    for name, x in parts.items():
        out[name] = {**x, "beside": beside(x), "after": after(x)}
    if zipit.AT_HAND:
        for key in ("beside", "after"):
            out[f"times faster {key}"] = out["zipit"][key] / out["mergekern"][key]
    print(json.dumps(out, indent=1))
    (RESULTS / "zip-resnet50.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
