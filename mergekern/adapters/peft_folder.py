"""PEFT's adapter folders: adapter_config.json beside adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..check import FLOATS, name_of
from ..errors import CheckpointError
from .adapter import Adapter, Factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# The last parts of a tensor's name: of the two factors, of linear and of embedded modules.
_A, _B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")
# Settings of ranks and scales, which tensors and the config of a result say anew.
_RANKS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_UNKNOWN = {
    "use_dora": "DoRA scales each row of the sum, which is no low-rank change",
    "lora_bias": "biases of the second factor are not read",
    "target_parameters": "factors of bare parameters are not read",
    "alora_invocation_tokens": "it changes some tokens only",
}


def load_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """An adapter that PEFT's `save_pretrained` wrote.

    The scale of a module is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, by patterns of
    its name where there are any. Dtypes stay; nothing is computed.
    Raises: CheckpointError for files that are missing or unreadable, factors without their partner
    or of other ranks than the config says, dtypes that are not floating (quantised weights), NaN
    and infinities, and kinds of adapters that are more than two factors (DoRA).
    Source: PEFT 0.21, `LoraConfig`, `save_pretrained`.
    """
    folder = Path(folder)
    config = _config(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / WEIGHTS}: no readable adapter ({reason})") from None
    halves: dict[str, dict[str, tuple[str, Tensor]]] = {}
    saved: dict[str, Tensor] = {}
    for name, x in tensors.items():
        _require_plain(folder, name, x)
        module, end = _module_of(name)
        if end is None:
            saved[name.removeprefix(_PREFIX)] = x
        else:
            halves.setdefault(module, {})["a" if end in _A else "b"] = end, x
    modules = {}
    for module, pair in sorted(halves.items()):
        if len(pair) < 2:
            missing = "lora_B" if "a" in pair else "lora_A"
            raise CheckpointError(f"{folder}: {module} has no {missing}; got one factor of two")
        modules[module] = _factors(folder, module, pair, config)
    rest = {k: v for k, v in config.items() if k not in _RANKS}
    return Adapter(modules, dict(sorted(saved.items())), rest)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable adapter ({error})") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise CheckpointError(f"{path}: no LoRA adapter; got peft_type {kind!r}; expected 'LORA'")
    for key, why in _UNKNOWN.items():
        if config.get(key):
            raise CheckpointError(f"{path}: {key} is not supported ({why}); got {config[key]!r}")
    found: dict[str, Any] = config
    return found


def _require_plain(folder: Path, name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise CheckpointError(
            f"{folder}: {name} is not floating, dequantise it first; got {name_of(x.dtype)}"
        )
    if not bool(x.isfinite().all()):
        raise CheckpointError(f"{folder}: {name} holds NaN or infinities")


def _module_of(name: str) -> tuple[str, str | None]:
    """The module that a tensor belongs to, and which factor it is, if it is one."""
    for end in (*_A, *_B):
        if name.endswith("." + end):
            return name.removesuffix("." + end).removeprefix(_PREFIX), end
    if "lora_" in name:
        raise CheckpointError(
            f"{name}: unknown part of an adapter; expected names that end in {', '.join(_A + _B)}"
        )
    return name, None


def _of_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """PEFT's: the first pattern that matches the module's name, or its end behind a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _factors(
    folder: Path, module: str, pair: Mapping[str, tuple[str, Tensor]], config: Mapping[str, Any]
) -> Factors:
    (end, a), (_, b) = pair["a"], pair["b"]
    rank = _of_pattern(config.get("rank_pattern") or {}, module, config.get("r"))
    alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    if a.ndim < 2 or b.ndim < 2 or not len(a) == b.shape[1] == rank or b[0, 0].numel() != 1:
        raise CheckpointError(
            f"{folder}: {module} has factors that do not fit; got {list(a.shape)} and "
            f"{list(b.shape)}; expected [r, in] and [out, r] for r = {rank}"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(a.flatten(1), b.flatten(1), scale, tuple(a.shape[1:]), end == _A[1])


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """A folder that PEFT's `from_pretrained` loads; every scale is in its second factor.

    Ranks that differ between modules become a rank_pattern. Files are complete or not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + name: _own(x) for name, x in adapter.saved.items()}
    dtype = adapter.dtype()
    for module, f in adapter.modules.items():
        ends = (_A[1], _B[1]) if f.embedding else (_A[0], _B[0])
        b = f.b if f.scale == 1 else (f.scale * f.b.double()).to(dtype)
        kernel = [1] * (len(f.shape) - 1)
        tensors[f"{_PREFIX}{module}.{ends[0]}"] = _own(f.a.reshape(f.rank, *f.shape))
        tensors[f"{_PREFIX}{module}.{ends[1]}"] = _own(b.reshape(*b.shape, *kernel))
    ranks = {module: f.rank for module, f in adapter.modules.items()}
    most = max(ranks.values())
    pattern = {}
    if min(ranks.values()) < most:
        # The first that matches a name or its end counts, so that longer names come first.
        names = sorted(ranks, key=len, reverse=True)
        pattern = {re.escape(name): ranks[name] for name in names}
    config = {
        **adapter.config,
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
    }
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
    text = json.dumps(config, indent=2) + "\n"
    _replace(folder / CONFIG, lambda path: path.write_text(text))


def _own(x: Tensor) -> Tensor:
    """In memory of its own, as safetensors wants it."""
    return x.clone(memory_format=torch.contiguous_format)


def _replace(path: Path, write: Any) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)
