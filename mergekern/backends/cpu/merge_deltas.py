"""merge_deltas by csrc/merge_deltas.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ...check import accumulator
from ...keep import Bernoulli, Keep, Threshold
from .. import digits
from . import runtime

_cpu = runtime._cpu
_ELECT = {None: _cpu.Elect.none, "sum": _cpu.Elect.sum, "count": _cpu.Elect.count}


def _rule(keep: Keep, acc: torch.dtype) -> object:
    if isinstance(keep, Threshold):
        return runtime._cpu.KeepRule.magnitude(
            threshold=digits.value_key(keep.value, acc), cut=keep.cut
        )
    if isinstance(keep, Bernoulli):
        k0, k1 = keep.key
        return runtime._cpu.KeepRule.random(k0=k0, k1=k1, limit=keep.limit)
    return runtime._cpu.KeepRule()


def merge_deltas(
    out: Tensor,
    base: Tensor | None,
    xs: list[Tensor],
    weights: list[float],
    factors: list[float],
    keep: list[Keep],
    elect: str | None,
    normalize: bool,
    total: float,
    scale: float,
) -> None:
    acc = accumulator(xs[0].dtype)
    target, origin = runtime.view(out, output=True), runtime.optional_view(base)
    views = [runtime.view(x) for x in xs]
    rules = [_rule(k, acc) for k in keep]

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty(len(xs) * runtime._cpu.MERGE_BLOCK, dtype=acc)
        runtime._cpu.merge_deltas(
            out=target,
            base=origin,
            xs=views,
            weights=weights,
            factors=factors,
            keep=rules,
            elect=_ELECT[elect],
            normalize=normalize,
            total=total,
            scale=scale,
            scratch=scratch.data_ptr(),
            begin=begin,
            end=end,
        )

    runtime.chunks(kernel, out.numel())


def l1_norms(base: Tensor | None, xs: list[Tensor], keep: list[Keep]) -> list[tuple[float, float]]:
    origin = runtime.optional_view(base)
    norms = []
    for x, k in zip(xs, keep, strict=True):
        view, rule = runtime.view(x), _rule(k, accumulator(x.dtype))
        sums = torch.zeros(-(-x.numel() // runtime.CHUNK), 2, dtype=torch.float64)

        def kernel(
            begin: int, end: int, view: object = view, rule: object = rule, sums: Tensor = sums
        ) -> None:
            row = sums[begin // runtime.CHUNK].data_ptr()
            runtime._cpu.l1_norms(x=view, base=origin, keep=rule, sums=row, begin=begin, end=end)

        runtime.chunks(kernel, x.numel())
        everything, kept = sums.sum(0).tolist()
        norms.append((everything, kept))
    return norms
