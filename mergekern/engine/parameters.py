"""The method's arguments for one tensor: filters, gradients over layers, precedence, defaults."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError
from .config import MergeConfig

_LAYER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.|$)")


def _container(name: str) -> tuple[str, int] | None:
    """The name before the first number among its parts, and the number."""
    found = _LAYER.search(name)
    return (name[: found.start()], int(found.group(1))) if found else None


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Where each tensor lies in the depth of its stack of layers, 0 (first) to 1 (last).

    A layer is the first number in a name ("encoder.layer.11.output.weight"); layers with the same
    prefix make a stack. Tensors outside of any stack (embeddings, heads) lie at 0, and the layer
    of a stack of one at 1, as in mergekit.
    """
    names = list(names)
    depth: dict[str, int] = {}
    for name in names:
        if found := _container(name):
            depth[found[0]] = max(depth.get(found[0], 0), found[1])
    positions = {}
    for name in names:
        found = _container(name)
        if not found:
            positions[name] = 0.0
        else:
            last = depth[found[0]]
            positions[name] = found[1] / last if last else 1.0
    return positions


def evaluate(setting: Any, name: str, position: float) -> Any:
    """A setting's value for one tensor; None if it is a list of filters and none fits.

    Scalar: itself. List of numbers: a gradient, interpolated at `position`. {filter, value}, or a
    list of such: the first whose filter is contained in the name, is "*" or is missing.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not setting:
        raise ConfigError("config: a parameter is an empty list")
    if not all(isinstance(s, Mapping) for s in setting):
        return _gradient(setting, position)
    for condition in setting:
        unknown = set(condition) - {"filter", "value"}
        if unknown or "value" not in condition:
            raise ConfigError(
                f"config: a conditional parameter has filter and value; got {dict(condition)!r}"
            )
        pattern = condition.get("filter")
        if pattern in (None, "*") or str(pattern) in name:
            return evaluate(condition["value"], name, position)
    return None


def _gradient(values: list[Any], position: float) -> Any:
    place = position * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    if any(isinstance(v, bool | str) for v in values):
        return values[round(place)]
    if not all(isinstance(v, int | float) for v in values):
        raise ConfigError(f"config: a gradient is a list of numbers; got {values!r}")
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def arguments(config: MergeConfig, name: str, position: float, models: list[int]) -> dict[str, Any]:
    """The method's arguments for one tensor; `models` are the indices of those that take part.

    A model's own setting goes before the global one, and that before the default.
    """
    given: dict[str, Any] = {}
    for p in config.method.parameters:
        shared = (
            evaluate(config.parameters[p.name], name, position)
            if (p.name in config.parameters)
            else None
        )
        if p.scope != "model":
            if shared is not None:
                given[p.name] = shared
            continue
        values = []
        for i in models:
            entry = config.models[i]
            own = (
                evaluate(entry.parameters[p.name], name, position)
                if p.name in entry.parameters
                else None
            )
            value = own if own is not None else shared
            if value is None and p.required:
                raise ConfigError(
                    f"config: parameter '{p.name}' is required for {entry.path} (tensor {name})"
                )
            values.append(p.default if value is None else value)
        given[p.name] = values
    return config.method.arguments(given, len(models))
