"""mergekit's YAML, read into plain data; every key is understood or refused by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import ConfigError
from ..methods.merge import method_named
from ..methods.registry import Method

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
KEYS = (
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "exceptions",
)
# Keys of mergekit that are not served, with what to do instead.
UNSUPPORTED = {
    "slices": "layers cannot be stacked or cut here; list whole models under 'models'",
    "modules": "list whole models under 'models'; all modules of a checkpoint are merged",
    "tokenizer": "vocabularies cannot be rebuilt; models must share one, the base's is copied",
    "chat_template": "the base model's files are copied as they are; edit the template afterwards",
}
ACTIONS = ("copy", "drop", "present")


@dataclass(frozen=True)
class ModelEntry:
    path: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExceptionRule:
    """What to do with tensors whose name contains `filter` instead of merging them.

    copy: take the tensor of model `source`. drop: leave it out. present: merge it among the
    models that have it.
    """

    filter: str
    action: str
    source: str | None = None


@dataclass(frozen=True)
class MergeConfig:
    """A merge as the user wrote it. `text` is the source, kept for the output folder."""

    method: Method
    models: tuple[ModelEntry, ...]
    base: str | None
    parameters: Mapping[str, Any]
    dtype: torch.dtype | None
    out_dtype: torch.dtype | None
    exceptions: tuple[ExceptionRule, ...]
    home: str  # the model whose files go along: the base, or the first
    text: str

    @property
    def paths(self) -> tuple[str, ...]:
        """Every checkpoint that is read: the base first, then the models."""
        return (*([self.base] if self.base else []), *(m.path for m in self.models))

    @property
    def base_apart(self) -> bool:
        """Whether the base is subtracted, rather than one of the models."""
        return self.base is not None and self.method.base == "required"


# ---- reading ---------------------------------------------------------------------------------


def load_config(source: str | Path | Mapping[str, Any]) -> MergeConfig:
    """The configuration in a YAML file or a mapping; ConfigError names the key that is wrong."""
    if isinstance(source, Mapping):
        data = _plain(source)
        try:
            return _parse(data, yaml.safe_dump(data, sort_keys=False))
        except yaml.YAMLError as error:
            raise ConfigError(f"config: {' '.join(map(str, error.args))}") from None
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"config: no such file; got {path}")
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"config: {path} is no valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(data, Mapping):
        raise ConfigError(f"config: {path} holds no mapping; got {type(data).__name__}")
    return _parse(data, text)


def _plain(value: Any) -> Any:
    """Paths as text, other mappings and tuples as what YAML knows."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _parse(data: Mapping[str, Any], text: str) -> MergeConfig:
    for key in data:
        if key in UNSUPPORTED:
            raise ConfigError(f"config: key '{key}' is not supported: {UNSUPPORTED[key]}")
        if key not in KEYS:
            raise ConfigError(f"config: unknown key '{key}'; expected one of {', '.join(KEYS)}")
    if "merge_method" not in data:
        raise ConfigError("config: key 'merge_method' is missing")
    method = method_named(str(data["merge_method"]))
    base = _path(data["base_model"], "base_model") if data.get("base_model") else None
    entries = [_entry(e, i) for i, e in enumerate(_list(data.get("models"), "models"))]
    models = _settle_base(method, entries, base)
    method.check_count(len(models), base is not None and method.base == "required")

    parameters = _mapping(data.get("parameters"), "parameters")
    for owner in (parameters, *(m.parameters for m in models)):
        for name in owner:
            method.parameter(name)
    if data.get("tokenizer_source") not in (None, "base"):
        raise ConfigError(
            "config: key 'tokenizer_source' is only supported as 'base': vocabularies cannot be "
            f"rebuilt; got {data['tokenizer_source']!r}"
        )
    known = [m.path for m in entries] + ([base] if base else [])
    return MergeConfig(
        method=method,
        models=tuple(models),
        base=base if method.base == "required" else None,
        parameters=parameters,
        dtype=_dtype(data, "dtype"),
        out_dtype=_dtype(data, "out_dtype"),
        exceptions=tuple(
            _exception(e, known) for e in _list(data.get("exceptions", []), "exceptions")
        ),
        home=base or models[0].path,
        text=text,
    )


def _settle_base(method: Method, entries: list[ModelEntry], base: str | None) -> list[ModelEntry]:
    """The models without the base where it is subtracted; with it, in its place, elsewhere."""
    paths = [e.path for e in entries]
    if base is not None and paths.count(base) > 1:
        raise ConfigError(f"config: the base model is listed more than once; got {base}")
    if base is None:
        return entries
    others = [e for e in entries if e.path != base]
    if method.base == "required":
        return others
    own = [e for e in entries if e.path == base] or [ModelEntry(base)]
    if method.base == "first":
        return own + others
    return entries if base in paths else entries + own  # as mergekit: an implicit base comes last


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: '{key}' is no mapping; got {value!r}")
    return value


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"config: '{key}' is no list; got {value!r}")
    return value


def _path(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"config: '{key}' is no path; got {value!r}; expected a file or folder")
    if "+" in value and not Path(value).exists():
        raise ConfigError(
            f"config: '{key}' names a LoRA adapter on a model; got {value!r}; "
            "merge the adapter into its base first"
        )
    return value


def _entry(value: Any, i: int) -> ModelEntry:
    key = f"models[{i}]"
    entry = _mapping(value, key)
    for k in entry:
        if k not in ("model", "parameters"):
            raise ConfigError(f"config: unknown key '{k}' in {key}; expected model, parameters")
    if "model" not in entry:
        raise ConfigError(f"config: key 'model' is missing in {key}")
    parameters = _mapping(entry.get("parameters"), f"{key}.parameters")
    return ModelEntry(_path(entry["model"], f"{key}.model"), parameters)


def _dtype(data: Mapping[str, Any], key: str) -> torch.dtype | None:
    name = data.get(key)
    if name is None or (key == "out_dtype" and name == "auto"):
        return None
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(f"config: '{key}' is unknown; got {name!r}; expected {', '.join(DTYPES)}")
    return DTYPES[name]


def _exception(value: Any, known: list[str]) -> ExceptionRule:
    entry = _mapping(value, "exceptions")
    for k in entry:
        if k not in ("filter", "action", "from"):
            raise ConfigError(
                f"config: unknown key '{k}' in exceptions; expected filter, action, from"
            )
    action, source = entry.get("action"), entry.get("from")
    if not isinstance(entry.get("filter"), str) or action not in ACTIONS:
        raise ConfigError(
            f"config: an exception needs a filter and an action of {', '.join(ACTIONS)}; "
            f"got {dict(entry)!r}"
        )
    if (action == "copy") != (source is not None) or (source is not None and source not in known):
        raise ConfigError(
            f"config: exception {entry['filter']!r}: 'from' names the model to copy from, "
            f"with action copy only; got {source!r}; expected one of {', '.join(known)}"
        )
    return ExceptionRule(entry["filter"], str(action), source)


# ---- parameters of one tensor ----------------------------------------------------------------

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
