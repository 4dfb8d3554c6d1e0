"""merge_deltas in Triton; importing this file imports triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...check import accumulator
from ...keep import Keep, Recipe
from .. import tables
from .common import divide, narrow, widen
from .deltas import Deltas, block_of_rows, delta_and_kept, rounded
from .keys import BLOCK, key_of


@triton.jit
def term(
    i,
    rules,
    factors,
    origin,
    start,
    local,
    numel,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    KEEP: tl.constexpr,
    STEPWISE: tl.constexpr,
    RESCALE: tl.constexpr,
):
    """u of model i: csrc/merge_deltas.h has the arithmetic."""
    d, kept = delta_and_kept(
        rules + 10 * i, origin, start, local, numel, IN, WIDE, BASE, KEEP, STEPWISE
    )
    u = tl.where(kept, d, d * 0.0 if STEPWISE else 0.0)
    if RESCALE != "none":
        factor = tl.load(factors + 5 * i + 1)
        u = rounded(divide(u, factor) if RESCALE == "over" else u * factor, IN, STEPWISE)
    return rounded(u * tl.load(factors + 5 * i), IN, STEPWISE)


@triton.jit
def takes_part(u, votes, ELECT: tl.constexpr, ZERO: tl.constexpr):
    if ELECT == "present":
        yes = u != 0
    else:
        opposed = ~(votes > 0) if ZERO == "negative" else ~(votes >= 0)
        yes = ~(tl.where(opposed, -u, u) <= 0)  # so a NaN does under either sign
        if ZERO == "none":
            yes = yes & (votes != 0)
    return yes


@triton.jit
def elected(
    s,
    votes,
    rules,
    factors,
    origin,
    start,
    local,
    numel,
    N: tl.constexpr,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    KEEP: tl.constexpr,
    STEPWISE: tl.constexpr,
    RESCALE: tl.constexpr,
    ELECT: tl.constexpr,
    ZERO: tl.constexpr,
    AFTER: tl.constexpr,
    MAX: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """m, q, and what stands where one model is alone; what is not used costs nothing."""
    m, q, alone = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s)
    for i in tl.range(0, N, loop_unroll_factor=UNROLL):
        u = term(
            i, rules, factors, origin, start, local, numel, IN, WIDE, BASE, KEEP, STEPWISE, RESCALE
        )
        agrees = takes_part(u, votes, ELECT, ZERO)
        v = u
        if AFTER:
            v = rounded(u * tl.load(factors + 5 * i + 2), IN, STEPWISE)
        if MAX:
            m = tl.where(agrees & (key_of(v) > key_of(m)), v, m)
        else:
            m += tl.where(agrees, v, 0.0)
        q += tl.where(agrees, tl.load(factors + 5 * i + 3), 0.0)
        alone += tl.where(agrees, u * tl.load(factors + 5 * i + 4), 0.0)
    if ELECT == "sum":
        m = tl.where(s != s, s, m)
    return rounded(m, IN, STEPWISE), rounded(q, IN, STEPWISE), alone


@triton.jit
def merge_deltas_kernel(
    out,  # contiguous, `numel` elements
    base,
    rules,  # int64 [N, 10], see `delta_and_kept`
    factors,  # [N, 5]: before, rescale, after, weight, alone; then total, least, instead, scale
    numel,
    N: tl.constexpr,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    KEEP: tl.constexpr,
    STEPWISE: tl.constexpr,
    RESCALE: tl.constexpr,  # "none", "times" or "over"
    ELECT: tl.constexpr,
    ZERO: tl.constexpr,
    AFTER: tl.constexpr,
    MAX: tl.constexpr,
    ALONE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, local = tl.program_id(0).to(tl.int64) * BLOCK, block_of_rows(BLOCK)
    mask = start + local < numel
    origin = widen(tl.load(base + start + local, mask=mask, other=0.0)) if BASE else 0.0
    s = tl.zeros([BLOCK // 8, 8], factors.dtype.element_ty)
    votes = s
    for i in tl.range(0, N, loop_unroll_factor=UNROLL):
        u = term(
            i, rules, factors, origin, start, local, numel, IN, WIDE, BASE, KEEP, STEPWISE, RESCALE
        )
        s += u
        if ELECT == "count":
            votes += tl.where(u > 0, 1.0, 0.0) - tl.where(u < 0, 1.0, 0.0)
    m = rounded(s, IN, STEPWISE)
    numbers = factors + 5 * N
    q = tl.load(numbers)
    if ELECT != "everyone":
        m, q, alone = elected(
            m, votes if ELECT == "count" else m, rules, factors, origin, start, local, numel,
            N, IN, WIDE, BASE, KEEP, STEPWISE, RESCALE, ELECT, ZERO, AFTER, MAX, UNROLL,
        )  # fmt: skip
    if NORMALIZE:
        small = tl.abs(q) <= tl.load(numbers + 1)
        m = rounded(divide(m, tl.where(small, tl.load(numbers + 2), q)), IN, STEPWISE)
    if ALONE:
        m = tl.where(q == 1, alone, m)
    if SCALE:
        m = rounded(m * tl.load(numbers + 3), IN, STEPWISE)
    tl.store(
        out + start + local, narrow(origin + m if BASE else m, out.dtype.element_ty), mask=mask
    )


def unrolled(n: int, itemsize: int) -> int:
    """How many of n models a loop takes at a time: all where registers hold their terms.

    The compiler then finds those of the first loop in the second. More models are read once more,
    mostly from the caches.
    """
    return n if n * itemsize <= 32 else 1


def merge_deltas(out: Tensor, base: Tensor | None, xs: list[Tensor], recipe: Recipe) -> None:
    if not out.numel():
        return
    deltas = Deltas.of(base, xs, recipe.keep, stepwise=recipe.stepwise)
    target = (
        out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    )
    ones, n, acc = [1.0] * len(xs), len(xs), accumulator(xs[0].dtype)
    rescales = recipe.stepwise and recipe.rescale != ones  # else `before` includes it
    columns = recipe.before, recipe.rescale, recipe.after, recipe.weights, recipe.alone or ones
    factors = [f for row in zip(*columns, strict=True) for f in row]
    factors += [recipe.total, recipe.least, recipe.instead, recipe.scale]
    deltas.launch(
        merge_deltas_kernel,
        out.numel(),
        out=target,
        factors=tables.upload(factors, acc, out.device),
        N=n,
        RESCALE=("over" if recipe.divide else "times") if rescales else "none",
        ELECT=recipe.elect,
        ZERO=recipe.zero,
        AFTER=recipe.after != ones,
        MAX=recipe.combine == "max",
        ALONE=bool(recipe.alone),
        NORMALIZE=recipe.normalize,
        SCALE=recipe.scale != 1,
        UNROLL=unrolled(n, acc.itemsize),
    )
    if target is not out:
        out.copy_(target)


@triton.jit(do_not_specialize=["n"])
def l1_norms_kernel(
    sums,  # float64 [programs, n, 2]: sum |d|, and that of what is kept
    base,
    rules,
    n,
    numel,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    KEEP: tl.constexpr,
    STEPWISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    start, local = program * BLOCK, block_of_rows(BLOCK)
    mask = start + local < numel
    origin = widen(tl.load(base + start + local, mask=mask, other=0.0)) if BASE else 0.0
    for i in tl.range(0, n):
        d, kept = delta_and_kept(
            rules + 10 * i, origin, start, local, numel, IN, WIDE, BASE, KEEP, STEPWISE
        )
        magnitude = tl.abs(d).to(tl.float64)
        sum_of = sums + (program * n + i) * 2
        tl.store(sum_of, tl.sum(magnitude))
        tl.store(sum_of + 1, tl.sum(tl.where(kept, magnitude, 0.0)))


def l1_norms(
    base: Tensor | None, xs: list[Tensor], keep: list[Keep], rounded: bool
) -> list[tuple[float, float]]:
    deltas = Deltas.of(base, xs, keep, stepwise=rounded)
    shape = triton.cdiv(deltas.numel, BLOCK), len(xs), 2
    sums = torch.empty(shape, dtype=torch.float64, device=deltas.device)
    if deltas.numel:
        deltas.launch(l1_norms_kernel, deltas.numel, sums=sums, n=len(xs))
    return [(everything, kept) for everything, kept in sums.sum(0).tolist()]


@triton.jit(do_not_specialize=["n", "first", "last"])
def count_kept_kernel(
    counts,  # int32 [programs, n + 1]: kept ones, then places of both signs
    base,
    rules,
    n,
    first,
    last,
    numel,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BASE: tl.constexpr,
    KEEP: tl.constexpr,
    STEPWISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    start, local = first // 8 * 8 + program * BLOCK, block_of_rows(BLOCK)
    mask = start + local < numel
    origin = widen(tl.load(base + start + local, mask=mask, other=0.0)) if BASE else 0.0
    inside = (start + local >= first) & (start + local < last)
    positive = tl.zeros([BLOCK // 8, 8], tl.int1)
    negative = positive
    for i in tl.range(0, n):
        d, kept = delta_and_kept(
            rules + 10 * i, origin, start, local, numel, IN, WIDE, BASE, KEEP, STEPWISE
        )
        kept = kept & inside
        positive = positive | (kept & (d > 0))
        negative = negative | (kept & (d < 0))
        tl.store(counts + program * (n + 1) + i, tl.sum(kept.to(tl.int32)))
    tl.store(counts + program * (n + 1) + n, tl.sum((positive & negative).to(tl.int32)))


def count_kept(
    base: Tensor | None,
    xs: list[Tensor],
    keep: list[Keep],
    rounded: bool,
    first: int,
    last: int,
) -> tuple[list[int], int]:
    deltas = Deltas.of(base, xs, keep, stepwise=rounded)
    elements = last - first // 8 * 8 if last > first else 0
    shape = triton.cdiv(elements, BLOCK), len(xs) + 1
    counts = torch.empty(shape, dtype=torch.int32, device=deltas.device)
    if elements:
        deltas.launch(count_kept_kernel, elements, counts=counts, n=len(xs), first=first, last=last)
    *kept, conflicts = counts.sum(0).tolist()
    return kept, conflicts
