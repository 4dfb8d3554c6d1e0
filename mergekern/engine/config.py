"""mergekit's YAML, read into plain data; every key is understood or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import ConfigError
from ..methods.merge import method_named
from ..methods.registry import Method
from .keys import AS_STORED, Naming
from .model_entry import ModelEntry, mapping, model_entry, model_path, same_path, sequence
from .yaml_text import plain, read_yaml, shown

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
    "only",
    "skip",
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
    """A merge as the user wrote it. `text` is the source, kept for the output folder.

    Tensors that do not fit `only` or that fit `skip` are those of `home`, as they are.
    """

    method: Method
    models: tuple[ModelEntry, ...]
    base: str | None
    parameters: Mapping[str, Any]
    dtype: torch.dtype | None
    out_dtype: torch.dtype | None
    exceptions: tuple[ExceptionRule, ...]
    only: tuple[str, ...]
    skip: tuple[str, ...]
    home: str  # the model whose files go along: the base, or the first
    base_naming: Naming
    text: str
    swept: Mapping[str, Any] = field(default_factory=dict)  # parameters that a sweep has set

    def with_parameters(self, chosen: Mapping[str, Any]) -> MergeConfig:
        """These values for all models, whatever was said of them."""

        def others(parameters: Mapping[str, Any]) -> dict[str, Any]:
            return {
                k: v for k, v in parameters.items() if self.method.parameter(k).name not in chosen
            }

        models = tuple(replace(m, parameters=others(m.parameters)) for m in self.models)
        parameters = {**others(self.parameters), **chosen}
        return replace(self, models=models, parameters=parameters, swept=dict(chosen))

    @property
    def paths(self) -> tuple[str, ...]:
        """Every checkpoint that is read: the base first, then the models."""
        return (*([self.base] if self.base else []), *(m.path for m in self.models))

    @property
    def namings(self) -> tuple[Naming, ...]:
        """How the tensors of each of `paths` are called in the merge."""
        return (*([self.base_naming] if self.base else []), *(m.naming for m in self.models))

    @property
    def base_apart(self) -> bool:
        """Whether the base is subtracted, rather than one of the models."""
        return self.base is not None and self.method.subtracts_base


# ---- reading ---------------------------------------------------------------------------------


def load_config(
    source: str | Path | Mapping[str, Any], *, only: Sequence[str] = (), skip: Sequence[str] = ()
) -> MergeConfig:
    """The configuration in a YAML file or a mapping; ConfigError names the key that is wrong.

    only, skip: as the keys of that name, which the configuration then must not have; its text is
    one that has them.
    """
    data, text = _read(source)
    options = {"only": list(only), "skip": list(skip)}
    options = {key: patterns for key, patterns in options.items() if patterns}
    for key in options:
        if key in data:
            raise ConfigError(f"config: key '{key}' is also given as an option; give one of them")
    if options:
        data = {**data, **options}
        text = yaml.safe_dump(data, sort_keys=False)
    return _parse(data, text)


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, Mapping):
        data = plain(source)
        try:
            return data, yaml.safe_dump(data, sort_keys=False)
        except yaml.YAMLError as error:
            raise ConfigError(f"config: {' '.join(map(str, error.args))}") from None
    data, text = read_yaml(Path(source))
    if not isinstance(data, Mapping):
        raise ConfigError(f"config: {source} holds no mapping; got {type(data).__name__}")
    return plain(data), text


def _parse(data: Mapping[str, Any], text: str) -> MergeConfig:
    for key in data:
        if key in UNSUPPORTED:
            raise ConfigError(f"config: key '{key}' is not supported: {UNSUPPORTED[key]}")
        if key not in KEYS:
            raise ConfigError(f"config: unknown key '{key}'; expected one of {', '.join(KEYS)}")
    if "merge_method" not in data:
        raise ConfigError("config: key 'merge_method' is missing")
    if not isinstance(data["merge_method"], str):
        raise ConfigError(f"config: 'merge_method' is no name; got {shown(data['merge_method'])}")
    method = method_named(data["merge_method"])
    if method.tensor_valued:
        names = ", ".join(method.tensor_valued)
        raise ConfigError(
            f"config: merge_method {method.name} needs a tensor per model ({names}), which a "
            f"configuration cannot give; use merge_state_dicts(..., '{method.name}', {names}=[...])"
        )
    base = model_path(data["base_model"], "base_model") if data.get("base_model") else None
    entries = [
        model_entry(e, i, base) for i, e in enumerate(sequence(data.get("models"), "models"))
    ]
    models = _settle_base(method, entries, base)
    method.check_count(len(models), base is not None and method.subtracts_base)

    parameters = mapping(data.get("parameters"), "parameters")
    for owner in (parameters, *(m.parameters for m in models)):
        for name in owner:
            method.parameter(name)
    if data.get("tokenizer_source") not in (None, "base"):
        raise ConfigError(
            "config: key 'tokenizer_source' is only supported as 'base': vocabularies cannot be "
            f"rebuilt; got {shown(data['tokenizer_source'])}"
        )
    known = [m.path for m in entries] + ([base] if base else [])
    return MergeConfig(
        method=method,
        models=tuple(models),
        base=base if method.subtracts_base else None,
        parameters=parameters,
        dtype=_dtype(data, "dtype"),
        out_dtype=_dtype(data, "out_dtype"),
        exceptions=tuple(
            _exception(e, known) for e in sequence(data.get("exceptions", []), "exceptions")
        ),
        only=_patterns(data, "only"),
        skip=_patterns(data, "skip"),
        home=base or models[0].path,
        base_naming=next((e.naming for e in entries if e.path == base), AS_STORED),
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
    if method.subtracts_base:
        for i, e in enumerate(entries):
            if e.path == base and e.parameters:
                raise ConfigError(
                    f"config: models[{i}] is the base, which {method.name} subtracts from the "
                    f"others; got parameters {', '.join(e.parameters)}; expected none"
                )
        return others
    own = [e for e in entries if e.path == base] or [ModelEntry(base)]
    if method.base == "first":
        return own + others
    return entries if base in paths else entries + own  # as mergekit: an implicit base comes last


def _patterns(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    patterns = sequence(data.get(key, []), key)
    if not all(isinstance(p, str) for p in patterns):
        raise ConfigError(
            f"config: '{key}' is no list of patterns; got {shown(patterns)}; "
            'expected such as ["vision_model.*"]'
        )
    return tuple(patterns)


def _dtype(data: Mapping[str, Any], key: str) -> torch.dtype | None:
    name = data.get(key)
    if name is None or (key == "out_dtype" and name == "auto"):
        return None
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(
            f"config: '{key}' is unknown; got {shown(name)}; expected {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def _exception(value: Any, known: list[str]) -> ExceptionRule:
    entry = mapping(value, "exceptions")
    for k in entry:
        if k not in ("filter", "action", "from"):
            raise ConfigError(
                f"config: unknown key '{k}' in exceptions; expected filter, action, from"
            )
    action, source = entry.get("action"), entry.get("from")
    if not isinstance(entry.get("filter"), str) or action not in ACTIONS:
        raise ConfigError(
            f"config: an exception needs a filter and an action of {', '.join(ACTIONS)}; "
            f"got {shown(dict(entry))}"
        )
    source = next((k for k in known if isinstance(source, str) and same_path(k, source)), source)
    if (action == "copy") != (source is not None) or (source is not None and source not in known):
        raise ConfigError(
            f"config: exception {entry['filter']!r}: 'from' names the model to copy from, "
            f"with action copy only; got {shown(source)}; expected one of {', '.join(known)}"
        )
    return ExceptionRule(entry["filter"], str(action), source)
