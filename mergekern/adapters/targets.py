"""What an adapter changes in a base: for each tensor of it a product to add, or another tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..check import FLOATS, name_of
from ..errors import ArgumentError
from ..methods.compat import Signature
from .adapter import Adapter, Factors

OP = "fold_adapter"
# Where kohya's prefixes lead: folders of a pipeline, parts of an original checkpoint; of an adapter
# with one prefix, also a base that is nothing else.
_ROOTS = {
    "lora_unet_": ("unet/", "transformer/", "model.diffusion_model."),
    "lora_te_": ("text_encoder/", "cond_stage_model.transformer."),
    "lora_te1_": ("text_encoder/", "conditioner.embedders.0.transformer."),
    "lora_te2_": ("text_encoder_2/",),
    "lora_te3_": ("text_encoder_3/",),
}
# The output of torch's MultiheadAttention: PEFT (to 0.21) adds its task vector twice, in forward as
# in merge, so that an adapter was trained for that (peft#3774).
_TWICE = ".base_layer.out_proj"
# Tensors beside a weight, or in its place, that tell of quantisation.
_QUANTISED = {
    ".weight.absmax": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "with scales beside it",
    ".weight_scale_inv": "with scales beside it",
}


class Product(NamedTuple):
    """scale * left @ right, added to a tensor seen as a matrix of its first axis."""

    left: Tensor  # [rows, r]
    right: Tensor  # [r, columns]
    scale: float


Change = Product | Tensor  # a tensor takes the place of the base's


def changes_of(adapter: Adapter, base: Mapping[str, Signature]) -> dict[str, Change]:
    """By the names of the base, a folder of a pipeline before them ("unet/...").

    PEFT: a module's tensor is NAME.weight, without wrappers ".base_layer"; in_proj_weight of an
    attention, whose output projection changes twice, as in PEFT's forward; transposed with
    fan_in_fan_out. diffusers: components are folders, or there is but
    one. kohya: names whose dots are underscores; two that come to one are refused.
    Raises: ArgumentError with all modules and tensors that the base lacks, has in another shape,
    quantised, or more than once.
    """
    finder = _FINDERS[adapter.layout](base, adapter.modules)
    found: dict[str, Change] = {}
    problems = []
    for name, part, change in _parts(adapter):
        keys = finder(name, part)
        if len(keys) != 1:
            what = f"which of {' and '.join(keys)} it is" if keys else "no such tensor"
            problems.append(_quantised(name, base) or f"{name}.{part} ({what})")
            continue
        (key,) = keys
        signature = base[key]
        shape = signature.shape if isinstance(change, Tensor) else _matrix(signature.shape)
        if (quantised := _quantised(key.rpartition(".")[0], base)) or signature.dtype not in FLOATS:
            dtype = f"{key} (quantised: {name_of(signature.dtype)})"
            problems.append(quantised or dtype)
        elif _shape(change) != shape:
            problems.append(f"{key} of shape {list(shape)} (changed as {list(_shape(change))})")
        elif key in found:
            problems.append(f"{key} (changed twice)")
        else:
            found[key] = change
    if problems:
        what = f"{len(problems)} of {len(problems) + len(found)} parts do not fit the base"
        raise ArgumentError.of(
            OP, what, ", ".join(problems), "the base it was trained on, not quantised"
        )
    return found


def _parts(adapter: Adapter) -> Iterator[tuple[str, str, Change]]:
    """(module, its tensor, change); whole tensors by their own names."""
    turned = bool(adapter.config.get("fan_in_fan_out"))
    for module, f in adapter.modules.items():
        if adapter.layout == "peft" and module.endswith(_TWICE):
            f = replace(f, scale=2 * f.scale)
        yield module, "weight", _product(f, turned)
        if f.bias is not None:
            yield module, "bias", Product(f.bias[:, None], torch.ones(1, 1), f.scale)
    for name, x in adapter.saved.items():
        module, _, part = name.rpartition(".")
        yield module, part, x


def _product(f: Factors, turned: bool) -> Product:
    if f.embedding or (turned and len(f.shape) == 1):
        return Product(f.a.T, f.b.T, f.scale)
    return Product(f.b, f.a, f.scale)


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and all the rest; of a vector, a column."""
    rows, *rest = shape or (1,)
    return rows, torch.Size(rest).numel()


def _shape(change: Change) -> tuple[int, ...]:
    if isinstance(change, Tensor):
        return tuple(change.shape)
    return len(change.left), change.right.shape[1]


def _quantised(module: str, base: Mapping[str, Signature]) -> str | None:
    how = next((what for end, what in _QUANTISED.items() if module + end in base), None)
    return None if how is None else f"{module} (quantised: {how})"


# ---- names -----------------------------------------------------------------------------------

Finder = Callable[[str, str], list[str]]  # (module, tensor of it) -> keys of the base


def _peft(base: Collection[str], modules: Collection[str]) -> Finder:
    def find(module: str, part: str) -> list[str]:
        module = module.replace(".base_layer", "")
        whole = f"{module}.{part}" if module else part
        other = f"{module}.in_proj_{part}"
        return [key for key in (whole, other) if key in base][:1]

    return find


def _diffusers(base: Collection[str], modules: Collection[str]) -> Finder:
    """Of a pipeline's folder, or of one that holds the only component."""
    folders = any("/" in key for key in base)
    alone = len({module.partition(".")[0] for module in modules}) == 1

    def find(module: str, part: str) -> list[str]:
        component, _, rest = module.partition(".")
        tried = [f"unet/{module}.{part}"] if folders else [f"{module}.{part}"]
        if folders or alone:
            tried.append(f"{component}/{rest}.{part}" if folders else f"{rest}.{part}")
        return [key for key in tried if key in base]

    return find


def _kohya(base: Collection[str], modules: Collection[str]) -> Finder:
    prefixes = [p for p in _ROOTS if any(module.startswith(p) for module in modules)]
    flat: dict[str, list[str]] = {}
    for prefix in prefixes:
        roots = [*_ROOTS[prefix], ""] if len(prefixes) == 1 else _ROOTS[prefix]
        for root, key in itertools.product(roots, base):
            if key.startswith(root):
                name = prefix + key.removeprefix(root).replace(".", "_")
                flat.setdefault(name, []).append(key)

    def find(module: str, part: str) -> list[str]:
        return flat.get(f"{module}_{part}", [])

    return find


_FINDERS: dict[str, Callable[[Collection[str], Collection[str]], Finder]] = {
    "peft": _peft,
    "diffusers": _diffusers,
    "kohya": _kohya,
}
