"""Statistics and matching of a pair of ViT-B/16, against what their FLOPs cost at the GEMM rate."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from bench_covariance import over_bound
from torch import nn

import mergekern as mk
from mergekern.align import collector
from mergekern.align.capture import features, run_together
from mergekern.align.collect import collect_statistics
from mergekern.align.statistics import Statistics
from mergekern.ops import covariance
from mergekern.ops._cost import Cost

pytestmark = pytest.mark.alignment

BATCHES = 4


def encoders(timed: bool) -> tuple[list[nn.Module], list[Any]]:
    """Random ones, with two of the twelve blocks, which are all alike; and batches of images."""
    transformers = pytest.importorskip("transformers", reason="transformers: not installed")
    side, count = (224, 8) if timed else (32, 16)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        image_size=side, num_hidden_layers=2, **({} if timed else small)
    )
    models = [transformers.ViTModel(config).eval() for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(count, 3, side, side, generator=g) for _ in range(BATCHES)]
    return models, [{"pixel_values": x} for x in images]


class Replay:
    """Stands for `run_together`: shows again what calls took and gave when the models really ran.

    What is timed then is all but the forward passes, whose speed is torch's.
    """

    def __init__(self) -> None:
        self.taken: dict[str, Any] = {}
        self.given: dict[str, Any] = {}

    def __call__(self, program: Any, states: Any, flat: Any, before: Any, after: Any) -> list[Any]:
        if not self.taken:
            takers = {node: [partial(self.taken.__setitem__, node)] for node in before}
            givers = {node: [partial(self.given.__setitem__, node)] for node in after}
            run_together(program, states, flat, takers, givers)
        for looks, seen in ((before, self.taken), (after, self.given)):
            for node, each in looks.items():
                for look in each:
                    look(seen[node])
        return []


def cost(stats: Statistics) -> Cost:
    each = [
        covariance.cost(stats.count(name), stats.models * space.size, 4)
        for name, space in stats.spaces.movable.items()
    ]
    return Cost(sum(c.bytes for c in each), sum(c.flops for c in each))


def bench_collect_statistics(row, monkeypatch: pytest.MonkeyPatch, timed: bool) -> None:
    """Batches of eight images, all but the forward passes."""
    replay = Replay()
    monkeypatch.setattr(collector, "run_together", replay)
    monkeypatch.setattr(collector.Collector, "_compare", lambda *_: None)
    models, batches = encoders(timed)
    spaces = mk.discover_spaces(models[0], batches[0])
    stats = collect_statistics(models, batches, spaces)
    name = next(n for n in spaces.movable if n.endswith("fc1"))
    (probe,) = spaces[name].probes
    read = [features(args[probe.arg], probe) for args in replay.taken[probe.node]]
    x = torch.cat(read, -1).flatten(0, -2).repeat(BATCHES, 1)
    row(
        lambda: collect_statistics(models, batches, spaces),
        cost=cost(stats),
        error=over_bound(stats.covariances[name].covariance(), x, x),
        allowed=1.5,
    )
