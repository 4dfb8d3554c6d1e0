"""What an adapter changes in a base: for each tensor of it a product to add, or another tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..check import FLOATS, name_of
from ..errors import ArgumentError
from ..methods.compat import Signature
from .adapter import Adapter, Factors
from .orientation import Orientation

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
    """scale * left @ right, added to a tensor seen as a matrix of its first axis: the base's, or
    `onto`, which the adapter saves in its place."""

    left: Tensor  # [rows, r]
    right: Tensor  # [r, columns]
    scale: float
    onto: Tensor | None = None


Change = Product | Tensor  # a tensor takes the place of the base's


def changes_of(adapter: Adapter, base: Mapping[str, Signature]) -> dict[str, Change]:
    """By the names of the base, a folder of a pipeline before them ("unet/...").

    PEFT: a module's tensor is NAME.weight, without wrappers ".base_layer"; in_proj_weight of an
    attention, whose output projection changes twice, as in PEFT's forward; transposed where the
    base's layers are (`Orientation`). A tensor that PEFT saves as NAME.base_layer.weight is what
    NAME's product is added to. diffusers: components are folders, or there is but
    one. kohya: names whose dots are underscores; two that come to one are refused.
    Raises: ArgumentError with all modules and tensors that the base lacks, has in another shape,
    quantised, or more than once.
    """
    finder = _FINDERS[adapter.layout](base, adapter.modules)
    orientation = Orientation(base, bool(adapter.config.get("fan_in_fan_out")))
    found: dict[str, Change] = {}
    problems = []
    for name, part, change in _parts(adapter):
        keys = finder(name, part)
        if len(keys) != 1:
            what = f"which of {' and '.join(keys)} it is" if keys else "no such tensor"
            problems.append(_quantised(name, base) or f"{name}.{part} ({what})")
            continue
        (key,) = keys
        if isinstance(change, Product) and part == "weight":
            f = adapter.modules[name]
            linear = len(f.shape) == 1 and not f.embedding
            turned = orientation.of(key, (len(f.b), *f.shape)) if linear else False
            if turned is None:
                problems.append(f"{key} (square, among layers of [out, in] and of [in, out])")
                continue
            change = change._replace(left=f.a.T, right=f.b.T) if turned else change
        signature = base[key]
        shape = signature.shape if isinstance(change, Tensor) else _matrix(signature.shape)
        if (quantised := _quantised(key.rpartition(".")[0], base)) or signature.dtype not in FLOATS:
            dtype = f"{key} (quantised: {name_of(signature.dtype)})"
            problems.append(quantised or dtype)
        elif _shape(change) != shape:
            problems.append(f"{key} of shape {list(shape)} (changed as {list(_shape(change))})")
        elif (earlier := found.get(key)) is None:
            found[key] = change
        elif (
            isinstance(earlier, Product)
            and isinstance(change, Tensor)
            and ".base_layer." in f"{name}."
        ):
            found[key] = earlier._replace(onto=change)
        else:
            problems.append(f"{key} (changed twice)")
    if problems:
        what = f"{len(problems)} of {len(problems) + len(found)} parts do not fit the base"
        raise ArgumentError.of(
            OP, what, ", ".join(problems), "the base it was trained on, not quantised"
        )
    return found


def _parts(adapter: Adapter) -> Iterator[tuple[str, str, Change]]:
    """(module, its tensor, change); whole tensors by their own names."""
    for module, f in adapter.modules.items():
        if adapter.layout == "peft" and module.endswith(_TWICE):
            f = replace(f, scale=2 * f.scale)
        yield module, "weight", _product(f)
        if f.bias is not None:
            yield module, "bias", Product(f.bias[:, None], torch.ones(1, 1), f.scale)
    for name, x in adapter.saved.items():
        module, _, part = name.rpartition(".")
        yield module, part, x


def _product(f: Factors) -> Product:
    return Product(f.a.T, f.b.T, f.scale) if f.embedding else Product(f.b, f.a, f.scale)


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


# ---- tied weights ----------------------------------------------------------------------------

_WITH_A_HEAD = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")


def require_untied(
    changes: Mapping[str, Change],
    copied: Collection[str],
    base: Mapping[str, Signature],
    settings: Mapping[str, Any],
) -> None:
    """Embeddings that are the output head too do not change in one of their places alone.

    PEFT's layers and its copies (modules_to_save: `copied`) do; what it saves of the base beside
    them is both. settings: config.json of transformers. A model is tied if that says so; if it says
    nothing, as where that is the default, and the checkpoint of a language model has no head of its
    own.
    Raises: ArgumentError that names the changed embeddings.
    """
    said = settings.get("tie_word_embeddings")
    known = settings.get("architectures") or []
    headed = any(str(name).endswith(_WITH_A_HEAD) for name in known)
    if said is False or not (headed or (said and not known)):
        return
    words = settings.get("vocab_size")
    tied = [
        key
        for key, change in sorted(changes.items())
        if (isinstance(change, Product) or key.rpartition(".")[0].endswith(tuple(copied)))
        and len(shape := base[key].shape) == 2
        and shape[0] == words
        and (said or sum(x.shape == shape for x in base.values()) == 1)
    ]
    if tied:
        raise ArgumentError.of(
            OP,
            "the adapter changes embeddings that are the output head too",
            ", ".join(tied),
            "a base whose head is stored apart, with tie_word_embeddings false, or an adapter of "
            "ensure_weight_tying",
        )


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
