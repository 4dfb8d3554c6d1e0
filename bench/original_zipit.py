"""ZipIt's own ResNet graph and ModelMerge on a pair of models, timed part by part.

They run from the checkout that MERGEKERN_ZIPIT names, inside `with zipit.original()`. Nothing of
theirs is changed but that its functions are timed as it calls them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

now = time.perf_counter
STEPS = 16
SETTINGS = {"shortcut_name": "downsample", "head_name": "fc"}  # torchvision's names


class Node(NamedTuple):
    """A place where features are matched."""

    features: int  # of one model
    seconds: float


class Zipped(NamedTuple):
    """model: called with a batch, gives one output, or a list of one for each head."""

    model: nn.Module
    seconds: dict[str, float]
    nodes: list[Node]


class Clock(dict[str, float]):
    """Seconds by part."""

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        self.setdefault(part, 0.0)

        def timing(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = call(*args, **kwargs)
            self[part] += now() - start
            return result

        return timing


def zip_pair(
    merger: ModuleType,
    models: Sequence[nn.Module],
    batches: Sequence[Tensor],
    function: str = "match_tensors_zipit",
    *,
    stages: int = 3,
    until: str | None = None,
    largest: int | None = None,
    **parameters: float,
) -> Zipped:
    """Their `ModelMerge.transform` of copies of the models.

    until: the layer from which each model goes on alone; None zips all. largest: places of more
    features are averaged, and the time of their zip is told by its first steps. Seconds are of the
    forward passes, with the copies that hooks make; of statistics, batch by batch; of finishing
    them; of matching; and of applying, up to the merged state dict.
    """
    graphs = importlib.import_module("graphs.resnet_graph")
    covariance = importlib.import_module("metric_calculators").CovarianceMetric
    functions = importlib.import_module("matching_functions")
    match = getattr(functions, function)
    clock, nodes = Clock(), list[Node]()

    class Covariance(covariance):
        update = clock.timed("statistics", covariance.update)
        finalize = clock.timed("finishing", covariance.finalize)

    def recorded(metric: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        size = len(metric["covariance"]) // len(models)
        if largest is not None and size > largest:
            nodes.append(Node(size, _by_first_steps(match, metric, size)))
            return functions.match_tensors_identity(metric, *args, **kwargs)
        start = now()
        result = match(metric, *args, **kwargs)
        nodes.append(Node(size, now() - start))
        return result

    pair = [
        graphs.ResNetGraph(m, num_layers=stages, **SETTINGS).graphify()
        for m in copy.deepcopy(list(models))
    ]
    for graph in pair:
        graph.compute_intermediates = clock.timed("forward", graph.compute_intermediates)
    merge = merger.ModelMerge(*pair, device="cpu")
    for name in ("apply_transformations", "get_merged_state_dict"):
        setattr(merge, name, clock.timed("applying", getattr(merge, name)))
    with contextlib.redirect_stderr(io.StringIO()):  # progress, and warnings of an old API
        merge.transform(
            copy.deepcopy(models[0]),
            tuple((x, None) for x in batches),  # a list would be one of loaders
            metric_classes={"covariance": Covariance},
            transform_fn=recorded,
            stop_at=None if until is None else _space_before(pair[0], until),
            **parameters,
        )
    return Zipped(merge, {**clock, "matching": sum(n.seconds for n in nodes)}, nodes)


def _by_first_steps(match: Callable[..., Any], metric: dict[str, Tensor], size: int) -> float:
    """Seconds of a zip of two models.

    A step copies matrices of the features that are left, (2 size - t)**2 after t of them: all of
    them cost 7/12 of as many first ones. Budgets are out of reach, so that none ends early.
    """

    def first(steps: int) -> float:
        start = now()
        match(metric, r=steps / (2 * size), a=0.3, b=2.0)
        return now() - start

    before = first(0)
    return before + (first(STEPS) - before) / STEPS * size * 7 / 12


def _space_before(graph: Any, layer: str) -> int:
    """The node of features that the layer reads."""
    (node,) = (n for n in graph.G if graph.get_node_info(n)["layer"] == layer)
    (before,) = graph.preds(node)
    while graph.get_node_info(before)["type"].name != "PREFIX":
        (before,) = graph.preds(before)
    return before
