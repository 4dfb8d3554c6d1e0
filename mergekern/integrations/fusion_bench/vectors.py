"""A model and its fine-tuned ones, tensor by tensor, as task vectors in pieces of bounded size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import bits
from ...check import accumulator
from ...keep import Keep, Threshold
from ...ops.kth_magnitude import WholeModel
from ...ops.merge_deltas import merge_deltas
from .._pieces import SIZE, Piece, pieces

LIMIT = 1 << 20  # elements of one piece: a few tasks of an op

Drop = list[Tensor] | None  # bits of masks of one model, one per piece; None keeps everything


class Entry(NamedTuple):
    """One tensor of the base and of each model, and what was dropped of them at random."""

    name: str
    base: Tensor
    xs: list[Tensor]
    drops: list[Drop]
    divisor: float = 1.0  # of task vectors that something was dropped of

    def plain(self, dtype: torch.dtype) -> bool:
        """Whether ops can take the tensors as they are."""
        return self.drops[0] is None and all(x.dtype == dtype for x in (self.base, *self.xs))

    def pieces(self) -> list[Piece]:
        return pieces([self.base, *self.xs], LIMIT)

    def parts(
        self, dtype: torch.dtype, only: int | None = None
    ) -> Iterator[tuple[Piece, list[Tensor], Tensor | None]]:
        """Piece, models (or the one), and their base; None where these are task vectors already."""
        chosen = range(len(self.xs)) if only is None else [only]
        for k, p in enumerate(self.pieces()):
            base = p.of(self.base).to(dtype)
            xs = [p.of(self.xs[i]).to(dtype) for i in chosen]
            if self.drops[0] is None:
                yield p, xs, base
                continue
            base = base.to(accumulator(dtype))
            yield p, [self._left(x - base, i, k) for i, x in zip(chosen, xs, strict=True)], None

    def _left(self, d: Tensor, model: int, k: int) -> Tensor:
        drop = self.drops[model]
        assert drop is not None  # draws are for all models or for none
        return d * bits.unpack(drop[k], 0, d.numel()).to(d) / self.divisor

    def merge(self, dtype: torch.dtype, **options: Any) -> Tensor:
        """base + the merged task vectors, of the dtype of the base (of `dtype` for integers)."""
        ones = [1.0] * len(self.xs)
        if self.plain(dtype):
            return merge_deltas(self.base, self.xs, ones, **options)
        kind = self.base.dtype if self.base.dtype.is_floating_point else dtype
        out = torch.empty(self.base.shape, dtype=kind, device=self.base.device)
        for p, xs, base in self.parts(dtype):
            if base is not None:
                merge_deltas(base, xs, ones, out=p.of(out), **options)
            else:
                m = merge_deltas(None, xs, ones, **options)
                p.of(out).copy_(p.of(self.base).to(m.dtype) + m)
        return out


def draw(entries: Sequence[Entry], model: int, sparsity: float) -> None:
    """Drop that share of the task vectors of one model, by torch's global generator.

    As `torch.rand_like(task vector) > sparsity` for each entry in turn. Draws follow the memory
    of a tensor, and of devices other than the CPU the size of the call: there it is one call.
    """
    for entry in entries:
        x = entry.xs[model]
        dtype = torch.promote_types(x.dtype, entry.base.dtype)
        parts = entry.pieces()
        if x.device.type == "cpu" and x.is_contiguous():
            kept = [torch.rand(p.size, dtype=dtype) > sparsity for p in parts]
            entry.drops[model] = [bits.pack(k.bool().cpu()) for k in kept]
        else:
            mask = torch.rand_like(x, dtype=dtype) > sparsity
            entry.drops[model] = [bits.pack(p.of(mask).bool().cpu()) for p in parts]


# ---- TIES over a whole model -----------------------------------------------------------------

Vectors = Callable[[], Iterator[tuple[Tensor, Tensor | None]]]


def global_threshold(vectors: Vectors, rank: int) -> Threshold:
    """The rank-th largest |x - base| of all elements of all pairs, as one vector; keeps every tie.

    `vectors` is called once per 16 bits of the keys, and yields the same pairs each time.
    """
    whole = WholeModel([lambda total: rank])
    while whole.unfinished:
        for x, base in vectors():
            whole.update([x], base)
        whole.end_pass()
    return whole.thresholds[0]


def trims(entries: Sequence[Entry], dtype: torch.dtype, share: float) -> list[Keep] | None:
    """Per model what FusionBench keeps: the int(share * numel) + 1 largest, and what equals them.

    None, which keeps all, where that is all of them.
    """
    total = sum(e.base.numel() for e in entries)
    rank = int(total * share) + 1
    if rank > total:
        return None

    def vectors(model: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        for e in entries:
            if e.plain(dtype):
                yield e.xs[model], e.base
                continue
            for _, (x,), base in e.parts(dtype, model):
                yield x, base

    return [
        global_threshold(functools.partial(vectors, i), rank) for i in range(len(entries[0].xs))
    ]


def majority(entries: Sequence[Entry], dtype: torch.dtype, keep: list[Keep] | None) -> int:
    """How many more sums of trimmed task vectors are above 0 than below.

    A rounded difference to b is a multiple of half an ulp of b, and so is a sum of them: times
    2**60 it outweighs b, and b + 2**60 s compares with b as s with 0.
    """
    acc = accumulator(dtype)
    difference = 0
    for e in entries:
        ones = [1.0] * len(e.xs)
        for _, xs, base in e.parts(dtype):
            moved = merge_deltas(base, xs, ones, keep=keep, scale=2.0**60, out_dtype=acc)
            origin = moved.new_zeros(()) if base is None else base
            for at in range(0, len(moved), SIZE):
                s = moved[at : at + SIZE]
                b = origin[at : at + SIZE].to(acc) if origin.ndim else origin
                difference += int((s > b).sum()) - int((s < b).sum())
    return difference
