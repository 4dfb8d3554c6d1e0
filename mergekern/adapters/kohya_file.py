"""kohya's LoRA files: lora_unet_..._to_q.lora_down.weight, .lora_up.weight and .alpha.

Names of modules have underscores for the dots of the base, which only the base can tell apart from
others (`adapters.targets`): here they stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError, CheckpointError
from . import tensors
from .adapter import Adapter, Factors
from .tensors import Content

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
# Parts of a name by which other kinds of adapters are known, and why they are none of these.
_OTHERS = {
    "lora_mid": "a Tucker factor between the two",
    "hada_": "LoHa: a product of elements",
    "lokr_": "LoKr: a Kronecker product",
    "dora_scale": "DoRA: it scales each row of the sum, which is no low-rank change",
}
_BASE = "ss_base_model_version"
# Digests of the tensors, of no use for others.
_HASHES = ("sshs_model_hash", "sshs_legacy_hash")


def read(path: Path, content: Content) -> Adapter:
    """scale = alpha / r; a module without alpha has the scale 1.

    The file's metadata is `config["metadata"]`.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    unknown = {}
    for name, x in content.tensors.items():
        end = next((e for e in (DOWN, UP, ALPHA) if name.endswith("." + e)), None)
        if end is None:
            unknown[name] = kind_of(name)
        else:
            halves.setdefault(name.removesuffix("." + end), {})[end] = x
    if unknown:
        why = ", ".join(sorted({w for w in unknown.values() if w})) or "none of the two factors"
        raise CheckpointError(
            f"{path}: {len(unknown)} tensors that no LoRA of two factors has ({why}); got "
            f"{tensors.listed(unknown)}; expected names that end in {DOWN}, {UP}, {ALPHA}"
        )
    modules = {}
    for module, (down, up) in tensors.paired(path, halves, (DOWN, UP)).items():
        scale = scale_of(path, module, halves[module].get(ALPHA), down)
        modules[module] = tensors.factors(path, module, down, up, scale)
    config: dict[str, object] = {"metadata": content.metadata}
    if _BASE in content.metadata:
        config["base_model_name_or_path"] = content.metadata[_BASE]
    return Adapter(modules, config=config, layout="kohya")


def kind_of(name: str) -> str:
    """The kind of adapter that a part of this name belongs to, if it is another one."""
    return next((why for part, why in _OTHERS.items() if part in name), "")


def scale_of(path: Path, module: str, alpha: Tensor | None, down: Tensor) -> float:
    """alpha / r in float64; 1 where there is no alpha."""
    if alpha is None or not down.ndim or not len(down):
        return 1.0
    if alpha.numel() != 1:
        raise CheckpointError(
            f"{path}: {module} has an alpha that is no number; got {list(alpha.shape)}"
        )
    return float(alpha) / len(down)


def write(adapter: Adapter, path: Path) -> None:
    """Every module gets an alpha, in the dtype of its factors if that holds it, else in a wider
    one. ss_network_dim and ss_network_alpha of the metadata stay while a module has them."""
    if adapter.saved:
        raise ArgumentError.of(
            "save_adapter",
            "kohya's files hold no whole tensors",
            tensors.listed(adapter.saved),
            "layout='peft'",
        )
    content = {}
    for module, f in adapter.modules.items():
        require_no_bias("kohya", module, f)
        content[f"{module}.{DOWN}"], content[f"{module}.{UP}"] = tensors.stored(f)
        content[f"{module}.{ALPHA}"] = _alpha(f)
    tensors.write(path, content, _metadata(adapter) or {"format": "pt"})


def require_no_bias(layout: str, module: str, f: Factors) -> None:
    if f.bias is not None or f.embedding:
        got = f"{'a bias' if f.bias is not None else 'an embedding'} in {module}"
        raise ArgumentError.of(
            "save_adapter", f"{layout} files hold factors of layers only", got, "layout='peft'"
        )


def _alpha(f: Factors) -> Tensor:
    for dtype in (f.a.dtype, torch.float32):
        x = torch.tensor(f.alpha, dtype=dtype)
        if float(x) == f.alpha:
            return x
    return torch.tensor(f.alpha, dtype=torch.float64)


def _metadata(adapter: Adapter) -> dict[str, str]:
    metadata: dict[str, str] = dict(adapter.config.get("metadata") or {})
    ranks = {str(f.rank) for f in adapter.modules.values()}
    alphas = {f.alpha for f in adapter.modules.values()}
    if "ss_network_dim" in metadata and metadata["ss_network_dim"] not in ranks:
        metadata["ss_network_dim"] = ranks.pop() if len(ranks) == 1 else "Dynamic"
    if "ss_network_alpha" in metadata and not _among(metadata["ss_network_alpha"], alphas):
        metadata["ss_network_alpha"] = str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
    return metadata


def _among(text: str, numbers: set[float]) -> bool:
    try:
        return float(text) in numbers
    except ValueError:
        return False


def lasting(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of it still holds when tensors have changed."""
    return {key: value for key, value in metadata.items() if key not in _HASHES}
