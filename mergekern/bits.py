"""Booleans as bits, in the layout of numpy.packbits: the first element is the highest bit.

numpy does it on a CPU, many times faster than the same in torch; torch does it elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """The bytes of a flat boolean mask, the last one filled with zeros."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy()))
    return _pack_anywhere(mask)


def _pack_anywhere(mask: Tensor) -> Tensor:
    eight = torch.nn.functional.pad(mask, (0, -mask.numel() % 8)).view(-1, 8)
    powers = 2.0 ** torch.arange(7, -1, -1, device=mask.device)
    return (eight.to(torch.float32) @ powers).to(torch.uint8)  # exact: whole numbers below 256


def unpack(bits: Tensor, first: int, n: int) -> Tensor:
    """The booleans of elements [first, first + n)."""
    part = bits[first // 8 : (first + n + 7) // 8]
    if bits.device.type == "cpu":
        flat = torch.from_numpy(np.unpackbits(part.numpy())).view(torch.bool)
    else:
        flat = _unpack_anywhere(part)
    return flat[first % 8 :][:n]


def _unpack_anywhere(bits: Tensor) -> Tensor:
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).view(-1).bool()
