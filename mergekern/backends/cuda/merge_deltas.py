"""merge_deltas by csrc/cuda/merge_deltas.cu, its sums and counts by csrc/cuda/delta_sums.cu."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import digits
from ...check import accumulator
from ...keep import Band, Bernoulli, Keep, Mask, Recipe, Threshold
from .. import tables
from .runtime import DTYPES, _cuda, place

_ELECT = {
    "everyone": _cuda.Elect.everyone,
    "present": _cuda.Elect.present,
    "sum": _cuda.Elect.sum,
    "count": _cuda.Elect.count,
}
_ZERO = {
    "positive": _cuda.Zero.positive,
    "negative": _cuda.Zero.negative,
    "none": _cuda.Zero.none,
}
_ALL, _INTERVAL, _RANDOM, _BITS = range(4)  # mk::Keep


def _numbers(keep: Keep, acc: torch.dtype) -> list[int]:
    """A DeltaRule but for its model."""
    kind, interval, drawn, bits = _ALL, [0, 0, 0, 0], [0, 0, 0, 0], 0
    if isinstance(keep, Threshold):
        past = digits.NAN_KEY[acc] + 1
        kind, interval = _INTERVAL, [digits.value_key(keep.value, acc), keep.cut, past, 0]
    elif isinstance(keep, Band):
        edges = [(digits.value_key(t.value, acc), t.cut) for t in keep]
        kind, interval = _INTERVAL, [number for edge in edges for number in edge]
    elif isinstance(keep, Bernoulli):
        kind, drawn = _RANDOM, [*keep.key, keep.limit, keep.first]
    elif isinstance(keep, Mask):
        kind, bits = _BITS, keep.bits.data_ptr()
    return [kind, *interval, *drawn, bits]


class _Deltas(NamedTuple):
    """Task vectors with their rules, as kernels take them."""

    xs: list[Tensor]
    base: Tensor | None
    rules: Tensor  # int64 [n, 11]
    rounded: bool

    @classmethod
    def of(cls, base: Tensor | None, xs: list[Tensor], keep: list[Keep], rounded: bool) -> _Deltas:
        acc = accumulator(xs[0].dtype)
        xs = [x.contiguous() for x in xs]
        base = None if base is None else base.contiguous()
        rows = [[x.data_ptr(), *_numbers(k, acc)] for x, k in zip(xs, keep, strict=True)]
        rules = tables.upload([v for row in rows for v in row], torch.int64, xs[0].device)
        return cls(xs, base, rules, rounded)

    def arguments(self) -> dict[str, Any]:
        inputs = self.xs if self.base is None else [self.base, *self.xs]
        return {
            "base": 0 if self.base is None else self.base.data_ptr(),
            "rules": self.rules.data_ptr(),
            "dtype": DTYPES[self.xs[0].dtype],
            "n": len(self.xs),
            "numel": self.xs[0].numel(),
            "rounded": self.rounded,
            "wide": tables.aligned(inputs),
            **place(self.xs[0].device),
        }


def merge_deltas(out: Tensor, base: Tensor | None, xs: list[Tensor], recipe: Recipe) -> None:
    if not out.numel():
        return
    deltas = _Deltas.of(base, xs, recipe.keep, recipe.stepwise)
    device = out.device
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=device)
    alone = recipe.alone or [1.0] * len(xs)
    columns = recipe.before, recipe.rescale, recipe.after, recipe.weights, alone
    table = [f for row in zip(*columns, strict=True) for f in row]
    factors = tables.upload(table, accumulator(xs[0].dtype), device)
    _cuda.merge_deltas(
        out=target.data_ptr(),
        out_dtype=DTYPES[out.dtype],
        wide_out=tables.aligned([target]),
        factors=factors.data_ptr(),
        elect=_ELECT[recipe.elect],
        zero=_ZERO[recipe.zero],
        max=recipe.combine == "max",
        alone=bool(recipe.alone),
        normalize=recipe.normalize,
        divide=recipe.divide,
        total=recipe.total,
        least=recipe.least,
        instead=recipe.instead,
        scale=recipe.scale,
        **deltas.arguments(),
    )
    if target is not out:
        out.copy_(target)


def l1_norms(
    base: Tensor | None, xs: list[Tensor], keep: list[Keep], rounded: bool
) -> list[tuple[float, float]]:
    deltas = _Deltas.of(base, xs, keep, rounded)
    shape = -(-xs[0].numel() // _cuda.DELTA_TILE), len(xs), 2
    sums = torch.empty(shape, dtype=torch.float64, device=xs[0].device)
    _cuda.l1_norms(sums=sums.data_ptr(), **deltas.arguments())
    return [(everything, kept) for everything, kept in sums.sum(0).tolist()]


def count_kept(
    base: Tensor | None,
    xs: list[Tensor],
    keep: list[Keep],
    rounded: bool,
    first: int,
    last: int,
) -> tuple[list[int], int]:
    deltas = _Deltas.of(base, xs, keep, rounded)
    elements = last - first // 8 * 8 if last > first else 0
    shape = -(-elements // _cuda.DELTA_TILE), len(xs) + 1
    counts = torch.empty(shape, dtype=torch.int32, device=xs[0].device)
    _cuda.count_kept(counts=counts.data_ptr(), first=first, last=last, **deltas.arguments())
    *kept, conflicts = counts.sum(0).tolist()
    return kept, conflicts
