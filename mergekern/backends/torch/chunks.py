"""What every op of the torch backend stands on: chunks that stay in cache.

No temporary is larger than a few chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import digits

CHUNK = 1 << 18


def flat(xs: list[Tensor]) -> list[Tensor]:
    """1-d views where all inputs are contiguous, else the tensors as they are."""
    return [x.view(-1) for x in xs] if all(x.is_contiguous() for x in xs) else xs


def rows(xs: list[Tensor]) -> Iterator[tuple[int, int, int]]:
    """(first row, last row + 1, flat index of the first element) of chunks along axis 0."""
    if not xs[0].numel():
        return
    width = xs[0][0].numel() if xs[0].ndim else 1
    step = max(1, CHUNK // width)
    for begin in range(0, xs[0].shape[0] if xs[0].ndim else 1, step):
        yield begin, begin + step, begin * width


def part(x: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows [begin, end) in C order as one flat tensor of `dtype`."""
    return (x[begin:end] if x.ndim else x).reshape(-1).to(dtype)


def store(out: Tensor, begin: int, end: int, values: Tensor) -> None:
    """Rounds `values` once into rows [begin, end) of `out`."""
    target = out[begin:end] if out.ndim else out
    if values.dtype == torch.float64 and out.element_size() == 2:
        values = _to_odd(values)
    target.copy_(values.view(target.shape))


def _to_odd(x: Tensor) -> Tensor:
    """float64 to float32, rounded to odd: rounding that to 16 bits rounds x only once."""
    y = x.to(torch.float32)
    back = y.to(torch.float64)
    bits = y.view(torch.int32)
    inexact = (back != x) & ~x.isnan()
    bits = torch.where(inexact & (back.abs() > x.abs()), bits - 1, bits)
    return torch.where(inexact, bits | 1, bits).view(torch.float32)


def scalar(value: float, like: Tensor) -> Tensor:
    """A number rounded to the accumulator, on the device.

    As a tensor, since torch turns division by a Python number into a product on GPUs and refuses
    numbers beyond float32.
    """
    return torch.tensor(value, dtype=torch.float64).to(like)


def magnitude_keys(d: Tensor) -> Tensor:
    """The bits of |d|, NaN as one key above infinity, as int64."""
    if d.dtype == torch.float64:
        return (d.view(torch.int64) & 0x7FFFFFFFFFFFFFFF).clamp_(max=digits.NAN_KEY[d.dtype])
    keys = (d.view(torch.int32) & 0x7FFFFFFF).clamp_(max=digits.NAN_KEY[d.dtype])
    return keys.to(torch.int64)
