"""Eight-bit floats of files: read exactly, as float32; a result is never rounded to them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..check import FLOATS, FLOATS8
from ..methods.compat import Signature

# The tensor that a quantised one must be multiplied by, after its name or in place of its last part
# (DeepSeek and transformers, compressed-tensors and vLLM, torchao; ComfyUI).
_SCALES = ("_scale_inv", "_scale")
_SCALE_PARTS = ("scale_weight", "weight_scale", "weight_scale_inv", "scale")


def floating(dtype: torch.dtype) -> bool:
    return dtype in FLOATS or dtype in FLOATS8


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type that a tensor takes part in a merge with; it holds all values of `dtype`."""
    return torch.float32 if dtype in FLOATS8 else dtype


def unmergeable(
    key: str, models: Mapping[str, Mapping[str, Signature]], result: torch.dtype | None
) -> str | None:
    """What is wrong with a tensor of all models, if it is one of eight bits in some of them.

    result: what the configuration says of it.
    """
    narrow = {label: s for label, s in models.items() if key in s and s[key].dtype in FLOATS8}
    for label, signatures in narrow.items():
        owner = key.rpartition(".")[0]
        names = [key + end for end in _SCALES] + [f"{owner}.{part}" for part in _SCALE_PARTS]
        if scale := next((n for n in names if n in signatures and n != key), None):
            return f"quantised in {label}, to be multiplied by {scale}; dequantise the model first"
    if narrow and result is None:
        return (
            f"eight-bit floats in {', '.join(narrow)}; results are not rounded to these, so say "
            "what it shall be: dtype or out_dtype"
        )
    return None
