"""Task vectors and what rules keep of them, in Triton kernels; importing this imports triton.

Programs take blocks of eight elements a row, [n, 8]: eight share a Philox block, a byte of a stored
mask and, of 16-bit tensors, a wide load.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import digits
from ...check import accumulator
from ...keep import Band, Bernoulli, Keep, Mask, Threshold
from .. import tables
from .common import DTYPES, narrow, pointer, widen
from .keys import BLOCK, LAUNCH, key_of
from .masks import draws, draws_in

# What kinds of rules there are, as bits of KEEP; on its left, as the interpreter has plain numbers.
TRIMMED, BANDED = tl.constexpr(1), tl.constexpr(2)  # by magnitude, from below and from above
DRAWN, UNALIGNED = tl.constexpr(4), tl.constexpr(8)  # with streams that begin within a row
STORED = tl.constexpr(16)


@triton.jit
def block_of_rows(BLOCK: tl.constexpr):
    """Indices of elements within a block: [BLOCK / 8, 8]."""
    return tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def rounded(x, TO: tl.constexpr, STEPWISE: tl.constexpr):
    """x, rounded to TO where every step is."""
    if STEPWISE:
        x = widen(narrow(x, TO))
    return x


@triton.jit
def above(key, rule, start, local):
    """Keys above that of a Threshold, and those that equal it before its cut."""
    cut = tl.minimum(tl.maximum(tl.load(rule + 1) - start, 0), 1 << 30).to(tl.int32)
    edge = tl.load(rule).to(key.dtype)
    return key > edge - (local < cut).to(key.dtype)


@triton.jit
def delta_and_kept(
    rule,  # int64 [10]: where x begins, then the numbers of its rule
    origin,  # elements of the base
    start,  # of the block; a multiple of 8
    local,  # as `block_of_rows` gives them
    numel,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    KEEP: tl.constexpr,
    STEPWISE: tl.constexpr,
):
    """x - base, and which elements of it are kept. A rule of one kind is neutral as another."""
    mask = start + local < numel
    d = widen(tl.load(pointer(rule, 0, IN, WIDE) + start + local, mask=mask, other=0.0))
    if BASE:
        d = rounded(d - origin, IN, STEPWISE)
    kept = tl.full(local.shape, 1, tl.int1)
    if TRIMMED & KEEP:
        kept = kept & above(key_of(d), rule + 1, start, local)
    if BANDED & KEEP:
        kept = kept & ~above(key_of(d), rule + 3, start, local)
    if DRAWN & KEEP:
        key = tl.load(rule + 5) | tl.load(rule + 6) << 32
        first = tl.load(rule + 8) + start
        if UNALIGNED & KEEP:
            draw = draws(key, first + local)
        else:
            rows = first // 8 + tl.arange(0, local.shape[0])
            draw = draws_in(key, rows[:, None], tl.arange(0, 8)[None, :])
        kept = kept & (draw < tl.load(rule + 7).to(tl.int32))
    if STORED & KEEP:
        rows = start // 8 + tl.arange(0, local.shape[0])
        address = tl.load(rule + 9)
        there = rows * 8 < tl.where(address != 0, numel, 0)
        octet = tl.load(address.to(tl.pointer_type(tl.uint8)) + rows, mask=there, other=0xFF)
        bits = octet.to(tl.int32)[:, None] >> (7 - tl.arange(0, 8))[None, :]
        kept = kept & ((bits & 1) != 0)
    return d, kept


def _numbers(x: Tensor, keep: Keep, acc: torch.dtype) -> list[int]:
    """Where x begins; key and cut that keep, key and cut that drop; key, limit and first element
    of draws; where stored bits begin."""
    numel, below, nan = x.numel(), -1, digits.NAN_KEY[acc]
    interval, drawn, bits = [below, 0, nan, 0], [0, 0, 65536, 0], 0
    if isinstance(keep, Threshold | Band):
        edges = [keep] if isinstance(keep, Threshold) else [keep.least, keep.most]
        pairs = [(digits.value_key(t.value, acc), min(t.cut, numel)) for t in edges]
        interval[: 2 * len(pairs)] = [number for pair in pairs for number in pair]
    elif isinstance(keep, Bernoulli):
        drawn = [*keep.key, keep.limit, keep.first]
    elif isinstance(keep, Mask):
        bits = keep.bits.data_ptr()
    return [x.data_ptr(), *interval, *drawn, bits]


def _kinds(keep: Keep) -> list[tl.constexpr]:
    if isinstance(keep, Threshold):
        return [TRIMMED]
    if isinstance(keep, Band):
        return [TRIMMED, BANDED]
    if isinstance(keep, Bernoulli) and keep.limit < 65536:
        return [DRAWN, UNALIGNED] if keep.first % 8 else [DRAWN]
    return [STORED] if isinstance(keep, Mask) else []


class Deltas(NamedTuple):
    """Task vectors with their rules, as kernels take them."""

    xs: list[Tensor]  # flat
    base: Tensor | None
    rules: Tensor  # int64 [n, 10]
    constants: dict[str, Any]

    @classmethod
    def of(
        cls, base: Tensor | None, xs: list[Tensor], keep: list[Keep], *, stepwise: bool
    ) -> Deltas:
        acc = accumulator(xs[0].dtype)
        xs = [x.reshape(-1).contiguous() for x in xs]
        base = None if base is None else base.reshape(-1).contiguous()
        numbers = [n for x, k in zip(xs, keep, strict=True) for n in _numbers(x, k, acc)]
        constants = {
            "IN": DTYPES[xs[0].dtype],
            "WIDE": tables.aligned(xs),
            "BASE": base is not None,
            "STEPWISE": stepwise,
            "KEEP": sum({bit.value for k in keep for bit in _kinds(k)}),
            "BLOCK": BLOCK,
            **LAUNCH,
        }
        return cls(xs, base, tables.upload(numbers, torch.int64, xs[0].device), constants)

    @property
    def numel(self) -> int:
        return self.xs[0].numel()

    @property
    def device(self) -> torch.device:
        return self.xs[0].device

    def launch(self, kernel: Any, elements: int, **arguments: Any) -> None:
        """A program for every block of `elements`, on the current stream of the device; Triton's
        interpreter is numpy, which warns."""
        base = self.xs[0] if self.base is None else self.base
        with torch.cuda.device_of(base), np.errstate(all="ignore"):
            kernel[(triton.cdiv(elements, BLOCK),)](
                base=base,
                rules=self.rules,
                numel=self.numel,
                **arguments,
                **self.constants,
            )
