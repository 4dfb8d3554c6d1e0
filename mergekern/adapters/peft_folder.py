"""PEFT's adapter folders: adapter_config.json beside adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from . import tensors
from .adapter import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# The last parts of a tensor's name: of the two factors, of linear and of embedded modules.
_A, _B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")
_BIAS = "lora_B.bias"
# Settings of ranks and scales, which tensors and the config of a result say anew.
_RANKS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")
_UNKNOWN = {
    "use_dora": "DoRA scales each row of the sum, which is no low-rank change",
    "target_parameters": "factors of bare parameters are not read",
    "alora_invocation_tokens": "it changes some tokens only",
    "trainable_token_indices": "rows of embeddings are replaced beside the factors",
    "layer_replication": "names are those of layers that a base does not have once",
    "use_qalora": "first factors take means of inputs",
    "use_bdlora": "factors are block-diagonal",
    "kasa_config": "KaSA changes the base and has a factor between",
    "monteclora_config": "first factors are drawn at random",
    "arrow_config": "it chooses between other adapters by the input",
}
# Ways to begin that change the base too: what is learnt is not scale B A, but its change.
_MOVED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def read(folder: Path) -> Adapter:
    """An adapter that PEFT's `save_pretrained` wrote.

    The scale of a module is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, by patterns of
    its name where there are any.
    """
    config = _config(folder / CONFIG)
    halves: dict[str, dict[str, Tensor]] = {}
    embedded: set[str] = set()
    biases: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for name, x in tensors.read(folder / WEIGHTS).tensors.items():
        module, end = _module_of(name)
        if end is None:
            saved[module] = x
        elif end == _BIAS:
            biases[module] = x
        else:
            halves.setdefault(module, {})["lora_A" if end in _A else "lora_B"] = x
            embedded |= {module} if end in (_A[1], _B[1]) else set()
    pairs = tensors.paired(folder, halves, ("lora_A", "lora_B"))
    modules = {}
    for module, (a, b) in pairs.items():
        rank, scale = rank_and_scale(config, module)
        if rank is None or scale is None:
            got = f"r = {rank} and alpha / r = {scale}"
            raise CheckpointError(f"{folder / CONFIG}: no scale of {module}; got {got}")
        bias = biases.pop(module, None)
        modules[module] = tensors.factors(
            folder, module, a, b, scale, rank, embedding=module in embedded, bias=bias
        )
    if biases:
        raise CheckpointError(f"{folder}: biases without factors; got {tensors.listed(biases)}")
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
    require_known(str(path), config)
    found: dict[str, Any] = config
    return found


def require_known(owner: str, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a LoraConfig of adapters that are more than two factors."""
    for key, why in _UNKNOWN.items():
        if config.get(key):
            raise CheckpointError(f"{owner}: {key} is not supported ({why}); got {config[key]!r}")
    begun = config.get("init_lora_weights")
    if str(begun).lower().startswith(_MOVED_BASE):
        raise CheckpointError(
            f"{owner}: the first factors of this adapter are taken out of its base; got "
            f"init_lora_weights {begun!r}; expected what PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) makes of it"
        )


def rank_and_scale(
    config: Mapping[str, Any] | None, module: str
) -> tuple[int | None, float | None]:
    """What a LoraConfig says of a module; None where it says nothing."""
    config = config or {}
    rank = _of_pattern(config.get("rank_pattern") or {}, module, config.get("r"))
    alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    if not rank or alpha is None:
        return rank, None
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module_of(name: str) -> tuple[str, str | None]:
    """The module that a tensor belongs to, and which factor it is, if it is one."""
    for end in (*_A, *_B, _BIAS):
        if name.endswith("." + end):
            return name.removesuffix("." + end).removeprefix(PREFIX), end
    if "lora_" in name:
        ends = ", ".join((*_A, *_B, _BIAS))
        raise CheckpointError(
            f"{name}: unknown part of an adapter; expected names that end in {ends}"
        )
    return name.removeprefix(PREFIX), None


def _of_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """PEFT's: the first pattern that matches the module's name, or its end behind a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def write(adapter: Adapter, folder: Path) -> None:
    """A folder that PEFT's `from_pretrained` loads.

    Ranks and scales that differ between modules become patterns. Files are complete or not there.
    """
    content = {PREFIX + name: tensors.own(x) for name, x in adapter.saved.items()}
    for module, f in adapter.modules.items():
        ends = (_A[1], _B[1]) if f.embedding else (_A[0], _B[0])
        for end, x in zip(ends, tensors.stored(f), strict=True):
            content[f"{PREFIX}{module}.{end}"] = x
        if f.bias is not None:
            content[f"{PREFIX}{module}.{_BIAS}"] = tensors.own(f.bias)
    biased = any(f.bias is not None for f in adapter.modules.values())
    config = {**adapter.config, "peft_type": "LORA", **ranks(adapter), "lora_bias": biased}
    tensors.write(folder / WEIGHTS, content, {"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    tensors.replace(folder / CONFIG, lambda path: path.write_text(text))


def ranks(adapter: Adapter, cut: int = 0) -> dict[str, Any]:
    """The settings of PEFT that say ranks and scales; names without their first `cut` letters."""
    sizes = {name[cut:]: f.rank for name, f in adapter.modules.items()}
    alphas = {name[cut:]: _plain(f.alpha) for name, f in adapter.modules.items()}
    # The first that matches a name or its end counts, so that longer names come first.
    names = sorted(sizes, key=len, reverse=True)
    one = len({*zip(sizes.values(), alphas.values(), strict=True)}) == 1
    most = max(names, key=sizes.__getitem__)
    return {
        "r": sizes[most],
        "lora_alpha": alphas[most],
        "rank_pattern": {} if one else {re.escape(name): sizes[name] for name in names},
        "alpha_pattern": {} if one else {re.escape(name): alphas[name] for name in names},
        "use_rslora": False,
    }


def _plain(x: float) -> float:
    """Whole numbers without a fraction, as people write them."""
    return int(x) if x.is_integer() else x
