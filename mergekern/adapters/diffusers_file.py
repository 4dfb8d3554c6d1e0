"""diffusers' LoRA files: unet.down_blocks.0...to_q.lora_A.weight, and the older names.

A name begins with a component of the pipeline; the first files had the denoiser alone, without one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ArgumentError, CheckpointError
from . import peft_folder, tensors
from .adapter import Adapter
from .kohya_file import require_no_bias, scale_of
from .tensors import Content

NAME = "pytorch_lora_weights.safetensors"  # in a folder
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
HEADER = "lora_adapter_metadata"  # JSON, LoraConfig of each component: {"unet.r": 4, ...}
_A, _B, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
# What ends the names of factors in files of earlier versions, for what it is called today.
_OLDER = {
    ".lora.down.weight": _A,
    ".lora.up.weight": _B,
    ".lora_linear_layer.down.weight": _A,
    ".lora_linear_layer.up.weight": _B,
}
# The first version's attention processors; text encoders call their layers otherwise.
_PROCESSORS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
ENDS = (_A, _B, *_OLDER, *(f"_lora.{half}.weight" for half in ("down", "up")))


def read(path: Path, content: Content) -> Adapter:
    """The scale is lora_alpha / r by the settings in the header, or alpha / r by a tensor `.alpha`;
    1 where there is neither, with a warning if such modules of a component have several ranks.

    `config["metadata"]` is the rest of the header, `config["components"]` the settings there.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, x in content.tensors.items():
        today = _today(name)
        end = next((e for e in (_A, _B, _ALPHA) if today.endswith(e)), None)
        if end is None:
            unknown.append(name)
            continue
        of_module = halves.setdefault(today.removesuffix(end), {})
        if end in of_module:
            raise CheckpointError(f"{path}: two tensors come to one name; got {today} twice")
        of_module[end] = x
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} tensors that are no factor; got {tensors.listed(unknown)}; "
            f"expected names that end in {', '.join((_A, _B, _ALPHA))}"
        )
    metadata = dict(content.metadata)
    settings = _settings(path, metadata.pop(HEADER, None))
    modules = {}
    unscaled: dict[str, set[int]] = {}  # of components, ranks whose scale nothing says
    for module, (a, b) in tensors.paired(path, halves, (_A, _B)).items():
        alpha = halves[module].get(_ALPHA)
        component, _, inner = module.partition(".")
        rank, scale = peft_folder.rank_and_scale(settings.get(component), inner)
        if scale is None or rank is None:
            rank, scale = None, scale_of(path, module, alpha, a)
            if alpha is None and module + _A in content.tensors:  # older names: it is 1
                unscaled.setdefault(component, set()).add(len(a))
        elif alpha is not None and scale_of(path, module, alpha, a) != scale:
            raise CheckpointError(
                f"{path}: {module} has two scales; got alpha {float(alpha):g} beside {HEADER}, "
                f"which says {scale * rank:g}; expected one of them"
            )
        modules[module] = tensors.factors(path, module, a, b, scale, rank)
    for component, ranks_there in unscaled.items():
        if len(ranks_there) > 1:
            warnings.warn(
                f"{path}: nothing says the scales in {component} of ranks "
                f"{', '.join(map(str, sorted(ranks_there)))}; taken as 1; diffusers may take one "
                "alpha for all of them",
                stacklevel=4,
            )
    config = {"metadata": metadata, "components": settings}
    return Adapter(modules, config=config, layout="diffusers")


def _today(name: str) -> str:
    """What the version of today would call a tensor."""
    name = name.replace(".processor.", ".")
    for old, new in _OLDER.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    for layer, of_text in _PROCESSORS.items():
        for half, new in (("down", _A), ("up", _B)):
            end = f".{layer}_lora.{half}.weight"
            if name.endswith(end):
                layer = "to_out.0" if layer == "to_out" else layer
                own = of_text if name.startswith("text_encoder") else layer
                return f"{name.removesuffix(end)}.{own}{new}"
    return name


def _settings(path: Path, text: str | None) -> dict[str, dict[str, Any]]:
    """Of each component."""
    if text is None:
        return {}
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: {HEADER} is no JSON ({error})") from None
    if not isinstance(plain, Mapping):
        raise CheckpointError(f"{path}: {HEADER} is no mapping; got {type(plain).__name__}")
    found: dict[str, dict[str, Any]] = {}
    for key, value in plain.items():
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = value
    for component, settings in found.items():
        peft_folder.require_known(f"{path}: {component}", settings)
    return found


def write(adapter: Adapter, path: Path) -> None:
    """By the names of today; ranks and scales are in the header, where diffusers looks for them."""
    if path.is_dir():
        path = path / NAME
    own = {m: f for m, f in adapter.modules.items() if m.partition(".")[0] in COMPONENTS}
    if adapter.saved or len(own) < len(adapter.modules):
        odd = tensors.listed({*adapter.saved, *(adapter.modules.keys() - own.keys())})
        raise ArgumentError.of(
            "save_adapter",
            "diffusers' files hold factors of components only",
            odd,
            f"names that begin with one of {', '.join(COMPONENTS)}",
        )
    content = {}
    for module, f in own.items():
        require_no_bias("diffusers'", module, f)
        content[module + _A], content[module + _B] = tensors.stored(f)
    settings: dict[str, Any] = {}
    for component in COMPONENTS:
        start = f"{component}."
        part = {m: f for m, f in own.items() if m.startswith(start)}
        if part:
            given = dict(adapter.config.get("components") or {}).get(component, {})
            given = {"target_modules": [m.removeprefix(start) for m in part], **given}
            given |= peft_folder.ranks(Adapter(part), cut=len(start))
            settings |= {f"{component}.{key}": value for key, value in given.items()}
    metadata = {"format": "pt", **(adapter.config.get("metadata") or {})}
    metadata[HEADER] = json.dumps(settings, indent=2, sort_keys=True)
    tensors.write(path, content, metadata)
