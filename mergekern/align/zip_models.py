"""zip_models: from several models and some batches to one model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from .. import check
from ..errors import ArgumentError
from .batches import Batches
from .discover import discover_spaces
from .matching.match import METHODS, match
from .merging.apply import apply
from .merging.repair import has_norms
from .merging.repair import repair as repair_model
from .merging.split import split
from .spaces import Spaces
from .statistics.collect import collect_statistics
from .tracing.inputs import arguments_of

_OP = "zip_models"
REPAIRS = ("auto", "none")


def zip_models(
    models: Sequence[nn.Module],
    batches: Batches,
    *,
    method: str = "zip",
    until: str | None = None,
    repair: str = "auto",
    example_inputs: Any = None,
    outputs: str | Sequence[str] = "fixed",
    spaces: Spaces | None = None,
    memory: int | str = "4GiB",
    weights: Sequence[float] | None = None,
    progress: bool = False,
    **parameters: Any,
) -> nn.Module:
    """apply(models, match(collect_statistics(models, batches, discover_spaces(model)))), repaired.

    Shapes: models of one architecture. batches: an iterable that can be read several times (a
    list, a DataLoader) or a callable that returns one; of what the models take, and labels after it
    are left out. example_inputs, outputs: for `discover_spaces`; by default the first batch, and
    outputs that stay. spaces: those of an earlier call, which saves the tracing.
    method, parameters: of `match` (alpha, beta, blend, ...) and of `collect_statistics` (probes,
    mask, nan). until, weights: of `apply`. memory: of `collect_statistics`. repair: "auto" measures
    BatchNorm's statistics anew, or does REPAIR in networks without; "none" leaves that out.
    Result: a new model, or a `PartialZip` with `until`; `models` stay as they are.
    Cost: a forward pass of each model (more where statistics do not fit `memory`) and one of the
    result, and what the parts cost. method="weights" reads no activations.
    Raises: ArgumentError as the parts do, for parameters that none of them has, and for batches
    that can be read once only.
    Source: ZipIt (Stoica et al., 2305.03053).

    >>> import torch
    >>> make = lambda: torch.nn.Sequential(
    ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    ... )
    >>> merged = zip_models([make(), make()], [torch.randn(32, 4)])
    >>> merged(torch.randn(3, 4)).shape
    torch.Size([3, 2])
    """
    check.choice(_OP, "repair", repair, REPAIRS)
    check.choice(_OP, "method", method, METHODS)
    reading, matching = _split(parameters)
    if not callable(batches) and iter(batches) is batches:
        got, expected = type(batches).__name__, "a list, a DataLoader, or a callable"
        raise ArgumentError.of(_OP, "batches can be read once only", got, expected)
    if spaces is None:
        if example_inputs is None:
            example_inputs = _first(models, batches)
        spaces = discover_spaces(models[0], example_inputs, outputs=outputs)
    if until is not None:
        split(_OP, spaces, until)  # refused before the passes
    if method == "weights" or "blend" in matching:
        matching["models"] = models
    stats = None
    if method != "weights" or (repair == "auto" and not has_norms(models[0])):
        stats = collect_statistics(
            models,
            batches,
            spaces,
            within=method == "zip",
            memory=memory,
            progress=progress,
            **reading,
        )
    found = match(spaces if stats is None else stats, method, **matching)
    merged = apply(models, found, until=until, weights=weights)
    if repair == "auto":
        repair_model(merged, batches, match=found, statistics=stats, weights=weights)
    return merged


def _split(parameters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of collect_statistics, and those of match."""
    known = [
        {n for n, p in inspect.signature(f).parameters.items() if p.kind is p.KEYWORD_ONLY}
        for f in (collect_statistics, match)
    ]
    reading = known[0] - {"within", "memory", "progress", "group"}
    matching = known[1] - {"models"}
    for name in parameters:
        check.choice(_OP, "parameter", name, sorted(reading | matching))
    return (
        {name: x for name, x in parameters.items() if name in reading},
        {name: x for name, x in parameters.items() if name in matching},
    )


def _first(models: Sequence[nn.Module], batches: Batches) -> Any:
    """What models[0] takes of the first batch."""
    for batch in batches() if callable(batches) else batches:
        args, kwargs = arguments_of(_OP, models[0], batch)
        return kwargs or args
    raise ArgumentError.of(_OP, "there are no batches", "none", "at least one")
