"""The method's arguments for one tensor: filters, gradients over layers, precedence, defaults."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..errors import ArgumentError, ConfigError
from ..methods.registry import Parameter
from .config import MergeConfig
from .model_entry import ModelEntry
from .yaml_text import shown

_LAYER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.|$)")


def layer_of(name: str) -> tuple[str, int, str] | None:
    """The name before the first number among its parts, the number, and the name after it.

    >>> layer_of("encoder.layer.11.output.weight")
    ('encoder.layer.', 11, '.output.weight')
    """
    found = _LAYER.search(name)
    return (name[: found.start()], int(found.group(1)), name[found.end() :]) if found else None


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Where each tensor lies in the depth of its stack of layers, 0 (first) to 1 (last).

    A layer is the first number in a name ("encoder.layer.11.output.weight"); layers with the same
    prefix make a stack. Tensors outside of any stack (embeddings, heads) lie at 0, and the layer
    of a stack of one at 1, as in mergekit.
    """
    names = list(names)
    depth: dict[str, int] = {}
    for name in names:
        if found := layer_of(name):
            depth[found[0]] = max(depth.get(found[0], 0), found[1])
    positions = {}
    for name in names:
        found = layer_of(name)
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
    conditions = _conditions(setting)
    if conditions is None:
        return _gradient(setting, position) if isinstance(setting, list) else setting
    for pattern, value in conditions:
        if _fits(pattern, name):
            return evaluate(value, name, position)
    return None


def _conditions(setting: Any) -> list[tuple[Any, Any]] | None:
    """Filters and values of a conditional setting; None if it is a scalar or a gradient."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list) or (setting and not isinstance(setting[0], Mapping)):
        return None
    if not setting:
        raise ConfigError("config: a parameter is an empty list")
    for condition in setting:
        if (
            not isinstance(condition, Mapping)
            or "value" not in condition
            or set(condition) - {"filter", "value"}
        ):
            raise ConfigError(
                f"config: a conditional parameter has filter and value; got {shown(condition)}"
            )
    return [(condition.get("filter"), condition["value"]) for condition in setting]


def _fits(pattern: Any, name: str) -> bool:
    return pattern in (None, "*") or str(pattern) in name


def _gradient(values: list[Any], position: float) -> Any:
    """Between numbers (also as YAML leaves them, "1e-3") interpolated, else the nearest."""
    place = position * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    if any(isinstance(v, bool) for v in values):
        return values[round(place)]
    try:
        numbers = [float(v) for v in values]
    except ValueError:
        return values[round(place)]
    except TypeError:
        raise ConfigError(f"config: a gradient is a list of numbers; got {shown(values)}") from None
    high = min(low + 1, len(values) - 1)
    return numbers[low] + (place - low) * (numbers[high] - numbers[low])


def arguments(config: MergeConfig, name: str, position: float, models: list[int]) -> dict[str, Any]:
    """The method's arguments for one tensor; `models` are the indices of those that take part.

    A model's own setting goes before the global one, and that before the default.
    """

    def value(p: Parameter, owner: ModelEntry | None) -> Any:
        settings = config.parameters if owner is None else owner.parameters
        if p.name not in settings:
            return None
        try:
            found = evaluate(settings[p.name], name, position)
            return None if found is None else p.value("config", found)
        except (ArgumentError, ConfigError) as error:
            place = f"{_label(p.name, owner)}, tensor {name}"
            raise ConfigError(f"{error} ({place})") from None

    given: dict[str, Any] = {}
    for p in config.method.parameters:
        shared = value(p, None)
        if p.scope != "model":
            if shared is not None:
                given[p.name] = shared
            continue
        values = []
        for entry in (config.models[i] for i in models):
            own = value(p, entry)
            if own is None and shared is None and p.required:
                raise ConfigError(
                    f"config: parameter '{p.name}' is required for {entry.path} (tensor {name})"
                )
            values.append(own if own is not None else p.default if shared is None else shared)
        given[p.name] = values
    return config.method.arguments(given, len(models))


def arguments_of(config: MergeConfig) -> Callable[..., dict[str, Any]]:
    """`arguments` of that configuration, found once where the name of a tensor changes nothing."""
    settings = [config.parameters, *(entry.parameters for entry in config.models)]
    if any(isinstance(v, (list, Mapping)) for each in settings for v in each.values()):
        return functools.partial(arguments, config)
    found: dict[tuple[int, ...], dict[str, Any]] = {}

    def same(name: str, position: float, models: list[int]) -> dict[str, Any]:
        who = tuple(models)
        if who not in found:
            found[who] = arguments(config, name, position, models)
        return found[who]

    return same


def _label(key: str, owner: ModelEntry | None) -> str:
    return f"{key} of all models" if owner is None else f"{key} of model {owner.path}"


def idle(config: MergeConfig, names: Iterable[str]) -> list[str]:
    """The filters and gradients that change nothing in a merge of these tensors, in words."""
    names = list(names)
    found = []
    for owner in (None, *config.models):
        for key, setting in (config if owner is None else owner).parameters.items():
            for what in _idle(setting, names, names):
                found.append(f"{_label(key, owner)}: {what}")
    return found


def _idle(setting: Any, names: list[str], everything: list[str]) -> Iterator[str]:
    """What is idle of a setting that is asked for `names` only."""
    conditions = _conditions(setting)
    if conditions is None:
        gradient = isinstance(setting, list) and len(setting) > 1 and names
        if gradient and not any(map(layer_of, names)):
            yield f"gradient {setting} meets no stack of layers, so its first value counts"
        return
    left = names
    for pattern, value in conditions:
        fitting = [name for name in left if _fits(pattern, name)]
        left = [name for name in left if not _fits(pattern, name)]
        if fitting:
            yield from _idle(value, fitting, everything)
        elif pattern is not None and pattern != "*":
            somewhere = any(_fits(pattern, name) for name in everything)
            why = "fits only tensors that are settled before it" if somewhere else "fits no tensor"
            yield f"filter '{pattern}' {why}"
