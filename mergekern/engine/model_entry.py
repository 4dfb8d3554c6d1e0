"""An entry of `models` in a configuration, and the kinds of values that its keys have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .keys import AS_STORED, Naming
from .yaml_text import shown

# prefix and renames are ours, not mergekit's.
ENTRY_KEYS = ("model", "parameters", "prefix", "renames")


@dataclass(frozen=True)
class ModelEntry:
    path: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    naming: Naming = AS_STORED


def mapping(value: Any, key: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: '{key}' is no mapping; got {shown(value)}")
    return value


def sequence(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"config: '{key}' is no list; got {shown(value)}")
    return value


def model_path(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"config: '{key}' is no path; got {shown(value)}; expected a file or folder"
        )
    if "+" in value and not os.path.exists(value):
        raise ConfigError(
            f"config: '{key}' names a LoRA adapter on a model; got {shown(value)}; "
            "merge the adapter into its base first"
        )
    return value


def same_path(path: str, other: str | None) -> bool:
    """Whether two spellings ("a", "./a/") name one file or folder."""
    return other is not None and os.path.realpath(path) == os.path.realpath(other)


def model_entry(value: Any, i: int, base: str | None) -> ModelEntry:
    """A model of the list; the base goes by its spelling in base_model."""
    key = f"models[{i}]"
    entry = mapping(value, key)
    for k in entry:
        if k not in ENTRY_KEYS:
            raise ConfigError(
                f"config: unknown key '{k}' in {key}; expected {', '.join(ENTRY_KEYS)}"
            )
    if "model" not in entry:
        raise ConfigError(f"config: key 'model' is missing in {key}")
    parameters = mapping(entry.get("parameters"), f"{key}.parameters")
    path = model_path(entry["model"], f"{key}.model")
    path = base if base is not None and same_path(path, base) else path
    return ModelEntry(path, parameters, _naming(entry, key))


def _naming(entry: Mapping[str, Any], key: str) -> Naming:
    prefix = entry.get("prefix", {"from": "", "to": ""})
    fits = isinstance(prefix, Mapping) and set(prefix) == {"from", "to"}
    if not fits or not all(isinstance(text, str) for text in prefix.values()):
        raise ConfigError(
            f"config: '{key}.prefix' is no prefix; got {shown(prefix)}; "
            'expected such as {from: "module.", to: ""}'
        )
    renames = entry.get("renames", [])
    if not isinstance(renames, list) or not all(map(_is_rename, renames)):
        raise ConfigError(
            f"config: '{key}.renames' is no list of renames; got {shown(renames)}; "
            'expected such as [["LayerNorm.gamma", "LayerNorm.weight"]]'
        )
    return Naming((prefix["from"], prefix["to"]), tuple((old, new) for old, new in renames))


def _is_rename(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(text, str) and text for text in value)
    )
