"""merge_deltas by csrc/merge_deltas.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import digits
from ...check import accumulator
from ...keep import Band, Bernoulli, Keep, Mask, Recipe, Threshold
from . import runtime

_cpu = runtime._cpu
_ELECT = {e.name: e for e in (_cpu.Elect.everyone, _cpu.Elect.present, _cpu.Elect.sum)}
_ELECT["count"] = _cpu.Elect.count
_ZERO = {z.name: z for z in (_cpu.Zero.positive, _cpu.Zero.negative, _cpu.Zero.none)}


def _rule(keep: Keep, acc: torch.dtype) -> object:
    if isinstance(keep, Threshold):
        low = digits.value_key(keep.value, acc)
        past = digits.NAN_KEY[acc] + 1
        return _cpu.KeepRule.interval(low=low, low_cut=keep.cut, high=past, high_cut=0)
    if isinstance(keep, Band):
        least, most = (digits.value_key(t.value, acc) for t in keep)
        return _cpu.KeepRule.interval(
            low=least, low_cut=keep.least.cut, high=most, high_cut=keep.most.cut
        )
    if isinstance(keep, Bernoulli):
        k0, k1 = keep.key
        return _cpu.KeepRule.random(k0=k0, k1=k1, limit=keep.limit, first=keep.first)
    if isinstance(keep, Mask):
        return _cpu.KeepRule.bits(bits=keep.bits.data_ptr())
    return _cpu.KeepRule()


def merge_deltas(out: Tensor, base: Tensor | None, xs: list[Tensor], recipe: Recipe) -> None:
    acc = accumulator(xs[0].dtype)
    target, origin = runtime.view(out, output=True), runtime.optional_view(base)
    views = [runtime.view(x) for x in xs]
    numbers = recipe._asdict() | {
        "keep": [_rule(k, acc) for k in recipe.keep],
        "elect": _ELECT[recipe.elect],
        "zero": _ZERO[recipe.zero],
        "max": recipe.combine == "max",
    }
    del numbers["combine"]
    compiled = _cpu.Recipe(**numbers)

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty(len(xs) * _cpu.MERGE_BLOCK, dtype=acc)
        _cpu.merge_deltas(
            out=target,
            base=origin,
            xs=views,
            recipe=compiled,
            scratch=scratch.data_ptr(),
            begin=begin,
            end=end,
        )

    runtime.chunks(kernel, out.numel())


def l1_norms(
    base: Tensor | None, xs: list[Tensor], keep: list[Keep], rounded: bool
) -> list[tuple[float, float]]:
    total, acc = xs[0].numel(), accumulator(xs[0].dtype)
    views, origin = [runtime.view(x) for x in xs], runtime.optional_view(base)
    rules = [_rule(k, acc) for k in keep]
    sums = torch.zeros(-(-total // runtime.CHUNK), len(xs), 2, dtype=torch.float64)

    def kernel(begin: int, end: int) -> None:
        _cpu.l1_norms(
            xs=views,
            base=origin,
            rounded=rounded,
            keep=rules,
            sums=sums[begin // runtime.CHUNK].data_ptr(),
            begin=begin,
            end=end,
        )

    runtime.chunks(kernel, total)
    return [(everything, kept) for everything, kept in sums.sum(0).tolist()]


def count_kept(
    base: Tensor | None,
    xs: list[Tensor],
    keep: list[Keep],
    rounded: bool,
    first: int,
    last: int,
) -> tuple[list[int], int]:
    acc = accumulator(xs[0].dtype)
    views, origin = [runtime.view(x) for x in xs], runtime.optional_view(base)
    rules = [_rule(k, acc) for k in keep]
    counts = torch.zeros(-(-(last - first) // runtime.CHUNK), len(xs) + 1, dtype=torch.int64)

    def kernel(begin: int, end: int) -> None:
        _cpu.count_kept(
            xs=views,
            base=origin,
            rounded=rounded,
            keep=rules,
            counts=counts[begin // runtime.CHUNK].data_ptr(),
            begin=first + begin,
            end=first + end,
        )

    runtime.chunks(kernel, last - first)
    *kept, conflicts = counts.sum(0).tolist()
    return kept, conflicts
