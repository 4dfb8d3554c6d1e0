"""Rows of features, [..., features], as ops take them: checked, selected, named in errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError

_BLOCK = 256  # of the first axis that is looked at in one go
_NAMED = 5  # rows that an error names


def matrix(op: str, x: Any, name: str) -> Tensor:
    x = check.tensor(op, x, name)
    if x.ndim < 2 or not x.shape[-1]:
        what = "rows" if x.ndim < 2 else "features"
        raise ArgumentError.of(op, f"{name} has no {what}", tuple(x.shape), "[..., features]")
    return x


def selected(op: str, mask: Any, x: Tensor) -> Tensor:
    """Numbers of the rows of x that count."""
    mask = check.tensor(op, mask, "mask", floating=False)
    if mask.dtype != torch.bool:
        raise ArgumentError.of(op, "mask is not bool", check.name_of(mask.dtype), "bool")
    if mask.device != x.device:
        raise ArgumentError.of(op, "mask is on another device", mask.device, x.device)
    shapes = [tuple(x.shape[:-1]), (x.shape[:-1].numel(),)]
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ArgumentError.of(op, "mask does not fit the rows", tuple(mask.shape), expected)
    return mask.reshape(-1).nonzero().reshape(-1)


def not_finite(op: str, xs: list[list[Tensor]], rows: Tensor | None) -> ArgumentError:
    """Names the first rows of the first side that has NaN or infinities in one of its tensors."""
    bad = [_numbers(side, rows) for side in xs]
    i = 0 if len(bad[0]) else 1
    named = ", ".join(map(str, bad[i][:_NAMED].tolist()))
    more = f" and {len(bad[i]) - _NAMED} more" if len(bad[i]) > _NAMED else ""
    what = f"{'xy'[i]} has rows with NaN or infinity"
    return ArgumentError.of(op, what, f"rows {named}{more}", "finite values, or nan='zero'")


def _numbers(side: list[Tensor], rows: Tensor | None) -> Tensor:
    bad = torch.stack([_bad(x) for x in side]).any(0)
    return bad.nonzero().reshape(-1) if rows is None else rows[bad[rows]]


def _bad(x: Tensor) -> Tensor:
    parts = torch.split(x, _BLOCK)
    return torch.cat([~part.isfinite().all(-1).reshape(-1) for part in parts])
