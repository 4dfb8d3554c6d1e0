"""Recipes in plain torch, on any device: chunks that stay in cache, one rounding at the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError, BackendError

Part = Callable[[int], Tensor]  # the i-th tensor's elements of one chunk, flat
Step = Callable[[Part], Tensor]


def chunks_for(op: str, backend: str) -> ModuleType:
    """The chunks of the torch backend, the only one these recipes have; imported on first use."""
    wanted = dispatch.requested(backend)
    if wanted not in ("auto", "torch"):
        raise BackendError(f"{op}: {wanted}: has no kernel for {op}; use backend='auto' or 'torch'")
    from ..backends.torch import chunks

    return chunks


def elementwise(
    op: str,
    xs: Sequence[Any],
    step: Step,
    *,
    beside: Sequence[Tensor] = (),
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    acc: torch.dtype | None = None,
) -> Tensor:
    """step(part) of every chunk, rounded once to `out_dtype` (that of the xs).

    `part(i)` reads xs[i], or beyond them `beside` (same shape, any dtype), in the dtype of the
    arithmetic, `acc` or the accumulator of the xs: of many models it holds one at a time.
    """
    chunks = chunks_for(op, backend)
    tensors = check.tensors(op, xs)
    for i, x in enumerate(beside):
        if x.shape != tensors[0].shape or x.device != tensors[0].device:
            got, expected = (f"{list(t.shape)} on {t.device}" for t in (x, tensors[0]))
            raise ArgumentError.of(op, f"{op}[{i}] does not fit the models", got, expected)
    acc = check.accumulator(tensors[0].dtype) if acc is None else acc
    dtype = check.result_dtype(op, out_dtype, None, tensors[0])
    result = check.output(op, None, tensors[0], dtype=dtype)
    out, *flat = chunks.flat([result, *tensors, *beside])
    for begin, end, _ in chunks.rows(flat):

        def part(i: int, begin: int = begin, end: int = end) -> Tensor:
            values: Tensor = chunks.part(flat[i], begin, end, acc)
            return values

        chunks.store(out, begin, end, step(part))
    return result


def rounded(op: str, x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """x in `dtype`, rounded once (torch takes float64 to 16 bits by way of float32)."""
    return elementwise(op, [x], lambda part: part(0), out_dtype=dtype, backend=backend)


def number(value: float, like: Tensor) -> Tensor:
    """A number rounded to the dtype of `like`, on its device."""
    return torch.tensor(value, dtype=torch.float64).to(like)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def select(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """torch.where of two tensors of one dtype, by their bits.

    torch.where branches per element on a CPU: with a random condition it took six times as long.
    """
    kind = _INTEGERS[x.element_size()]
    a, b = x.view(kind), y.view(kind)
    return condition.to(kind).neg_().bitwise_and_(a ^ b).bitwise_xor_(b).view(x.dtype)
