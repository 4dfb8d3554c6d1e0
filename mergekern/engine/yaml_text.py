"""YAML of anyone: read in bounded time and memory, or refused in one line."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

# Far above any merge; they bound what a file can cost.
_BYTES = 1 << 20
_NODES = 100_000  # with aliases written out
_DEPTH = 32
_TEXT = 4096
_INTEGER = 1 << 63

# What PyYAML raises; but for its own, where a value is none of its type (a 31st of June, !!bool x).
_INVALID = (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError, TypeError)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
_repr.maxlist = _repr.maxdict = _repr.maxtuple = _repr.maxset = 8


def shown(value: Any) -> str:
    """The value for an error: in one line, not of any length."""
    return _repr.repr(value)


def read_yaml(path: Path) -> tuple[Any, str]:
    """What a YAML file holds, and its text.

    Raises: ConfigError where it cannot be read, holds a key twice (YAML would keep the last), or
    is larger, deeper or more entangled by aliases than a configuration is.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"config: no such file; got {path}")
    try:
        with path.open("rb") as file:
            raw = file.read(_BYTES + 1)
        if len(raw) > _BYTES:
            raise ConfigError(f"config: {path} is too long; expected at most {_BYTES} bytes")
        text = raw.decode()
        return _load(text, path), text
    except OSError as error:
        raise ConfigError(f"config: {path} cannot be read ({error.strerror})") from None
    except RecursionError:
        raise ConfigError(f"config: {path} is nested too deeply") from None
    except ConfigError:
        raise
    except _INVALID as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config: {path} is no valid YAML: {reason:.300}") from None


def _load(text: str, path: Path) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _cost(node, {}, 0)
        _require_single_keys(node, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _cost(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Nodes below this one, aliases written out; known: of nodes by id, 0 of those above."""
    if depth > _DEPTH or known.get(id(node)) == 0:
        raise ConfigError(f"config: nested too deeply (line {node.start_mark.line + 1})")
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node, yaml.ScalarNode) and len(node.value) > _TEXT:
        line = node.start_mark.line + 1
        raise ConfigError(f"config: a text of more than {_TEXT} characters (line {line})")
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    total = 1 + sum(_cost(child, known, depth + 1) for child in children)
    if total > _NODES:
        line = node.start_mark.line + 1
        raise ConfigError(f"config: has more than {_NODES} entries by its aliases (line {line})")
    known[id(node)] = total
    return total


def _require_single_keys(node: yaml.Node, seen: set[int]) -> None:
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    keys = set()
    for child in node.value:
        for part in child if isinstance(node, yaml.MappingNode) else (child,):
            _require_single_keys(part, seen)
        key = child[0] if isinstance(node, yaml.MappingNode) else None
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                line = node.start_mark.line + 1
                raise ConfigError(f"config: key {shown(key.value)} is given twice (line {line})")
            keys.add(key.value)


def plain(value: Any, depth: int = 0) -> Any:
    """Paths as text, other mappings and tuples as what YAML knows; all of it fit to be printed."""
    if depth > _DEPTH:
        raise ConfigError(f"config: nested too deeply; expected at most {_DEPTH} levels")
    if isinstance(value, Mapping):
        return {_key(k): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, depth + 1) for v in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, int) and not -_INTEGER <= value < _INTEGER:
        raise ConfigError(f"config: an integer of more than 64 bits; got {value:#x}"[:120])
    if isinstance(value, str) and (len(value) > _TEXT or not value.isprintable()):
        raise ConfigError(
            f"config: a text that cannot be printed in a line; got {shown(value)}; "
            f"expected at most {_TEXT} characters, no line breaks"
        )
    return value


def _key(value: Any) -> Any:
    return value if isinstance(value, tuple) else plain(value)
