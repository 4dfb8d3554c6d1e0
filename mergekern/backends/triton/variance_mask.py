"""variance_mask in Triton, with the selection of kth_magnitude; importing this imports triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import digits
from ...keep import Threshold
from .. import selection
from .common import pointer
from .keys import BLOCK, delta, keys_of
from .kth_magnitude import Source
from .masks import pack


@triton.jit(do_not_specialize=["n", "threshold", "cut"])
def variance_mask_kernel(
    bits,
    sums,  # float64 [programs, n]: sum of d_i^2 over kept elements
    addresses,
    base,
    n,
    threshold,
    cut,
    numel,
    ALL: tl.constexpr,  # keep everything; bits are not written
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    ROUNDED: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    kept = mask
    if not ALL:
        key = keys_of(addresses, base, n, 0, offsets, mask, IN, WIDE, BASE, ROUNDED, VARIANCE)
        kept = (key > threshold) | ((key == threshold) & (offsets < cut))
        pack(bits, program, kept, numel, BLOCK)
    for i in tl.range(0, n):
        d = delta(pointer(addresses, i, IN, WIDE), base, offsets, mask, BASE, ROUNDED)
        d = tl.where(kept, d.to(tl.float64), 0.0)
        tl.store(sums + program * n + i, tl.sum(d * d, 0))


def variance_threshold(xs: list[Tensor], base: Tensor | None, share: float) -> selection.Found:
    return selection.select_share(Source(xs, base, variance=True), share)


def digit_histogram(
    xs: list[Tensor], base: Tensor | None, prefix: int, shift: int, rounded: bool
) -> np.ndarray:
    return selection.histogram(Source(xs, base, variance=True), prefix, shift)


def place_of_tie(
    xs: list[Tensor], base: Tensor | None, value: float, rank: int, rounded: bool
) -> tuple[int, int]:
    return selection.place(Source(xs, base, variance=True), value, rank)


def variance_mask(
    bits: Tensor | None, xs: list[Tensor], base: Tensor | None, threshold: Threshold
) -> list[float]:
    source = Source(xs, base, variance=True)
    programs = triton.cdiv(source.numel, BLOCK)
    if not programs:
        return [0.0] * len(xs)
    sums = torch.empty(programs, len(xs), dtype=torch.float64, device=source.device)
    source.launch(
        variance_mask_kernel,
        programs,
        bits=sums if bits is None else bits,
        sums=sums,
        threshold=digits.value_key(threshold.value, source.acc),
        cut=threshold.cut,
        ALL=bits is None,
    )
    squares: list[float] = sums.sum(0).tolist()
    return squares
