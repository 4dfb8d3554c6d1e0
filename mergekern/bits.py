"""Booleans as bits, in the layout of numpy.packbits: the first element is the highest bit."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """The bytes of a flat boolean mask, the last one filled with zeros."""
    short = -mask.numel() % 8
    eight = torch.nn.functional.pad(mask, (0, short)).view(-1, 8)
    powers = 2.0 ** torch.arange(7, -1, -1, device=mask.device)
    return (eight.to(torch.float32) @ powers).to(torch.uint8)  # exact: whole numbers below 256


def unpack(bits: Tensor, first: int, n: int) -> Tensor:
    """The booleans of elements [first, first + n)."""
    part = bits[first // 8 : (first + n + 7) // 8]
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=part.device)
    flat = ((part[:, None] >> shifts) & 1).view(-1).bool()
    return flat[first % 8 :][:n]
