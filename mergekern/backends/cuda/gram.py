"""gram and gram_rows by csrc/cuda/gram.cu, in two stages: partial sums of chunks, then these.

Up to four vectors are read once for all their products. More are taken in sets of four, and every
two sets together: the blocks of one chunk run side by side, so that it comes from the L2 cache.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import tables
from .runtime import DTYPES, _cuda, place

_FEW = 4  # vectors of a set
_CHUNK = 128  # elements per thread of a chunk, at least
_CHUNKS = 1 << 14  # of a row at most: a block adds them up in little time
_WARP = 32
_TAKEN = 16  # bytes of a vector that a thread reads at a time
_SUMMED = _cuda.GRAM_SUMMED
_SUMS = {"two": 3, "four": 10, "cross": 16}


def gram(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    flat = [x.contiguous().view(1, -1) for x in xs]
    whole = out if out.is_contiguous() else torch.empty_like(out)
    gram_rows(whole[None], flat, None if base is None else base.contiguous().view(1, -1))
    if whole is not out:
        out.copy_(whole)


def gram_rows(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    """Into a contiguous `out`."""
    rows, width = xs[0].shape
    if not rows * width:
        out.zero_()
        return
    n, tensors, device = len(xs), xs if base is None else [*xs, base], out.device
    lanes = _lanes(tensors)
    chunk = max(_CHUNK * lanes, -(-width // _CHUNKS // 16) * 16)
    chunks = -(-width // chunk)
    entries = [number for x in tensors for number in (x.data_ptr(), *x.stride())]
    matrices = tables.upload(entries, torch.int64, device)
    sets = _sets(n)
    slots = sum(_SUMS[kind] * len(firsts) for kind, firsts in sets.items())
    partial = torch.empty(slots, chunks, rows, dtype=torch.float64, device=device)
    slot, pairs = 0, []
    for kind, firsts in sets.items():
        sides = tables.upload([i for side in zip(*firsts) for i in side], torch.int64, device)
        _cuda.gram_dots(
            partial=partial[slot:].data_ptr(),
            matrices=matrices.data_ptr(),
            firsts=sides.data_ptr(),
            dtype=DTYPES[xs[0].dtype],
            set=getattr(_cuda.GramSet, kind),
            based=base is not None,
            wide=_wide(tensors),
            sets=len(firsts),
            n=n,
            rows=rows,
            width=width,
            chunk=chunk,
            chunks=chunks,
            lanes=lanes,
            **place(device),
        )
        for first in firsts:
            formed = _pairs(kind, *first)
            pairs += [(*p, slot + s) for s, p in enumerate(formed) if max(p) < n]
            slot += len(formed)
    described = tables.upload([number for pair in pairs for number in pair], torch.int64, device)
    _cuda.gram_sums(
        out=out.data_ptr(),
        partial=partial.data_ptr(),
        pairs=described.data_ptr(),
        n=n,
        rows=rows,
        chunks=chunks,
        count=len(pairs),
        lanes=_SUMMED if chunks > _WARP * 16 else _power(chunks),
        **place(device),
    )


def _sets(n: int) -> dict[str, list[tuple[int, int]]]:
    """The first vectors of each set and of the set that it is taken with, by kind."""
    if n <= _FEW:
        return {"two" if n <= 2 else "four": [(0, 0)]}
    firsts = range(0, n, _FEW)
    return {
        "four": [(i, i) for i in firsts],
        "cross": list(itertools.combinations(firsts, 2)),
    }


def _pairs(kind: str, i: int, j: int) -> list[tuple[int, int]]:
    """The pairs whose products a set forms, in its order."""
    if kind == "cross":
        return list(itertools.product(range(i, i + _FEW), range(j, j + _FEW)))
    several = 2 if kind == "two" else _FEW
    return list(itertools.combinations_with_replacement(range(i, i + several), 2))


def _lanes(tensors: list[Tensor]) -> int:
    """Threads that share a row: one where rows lie side by side, so that neighbours read these."""
    rows, width = tensors[0].shape
    if rows > 1 and all(x.stride(0) == 1 and (width == 1 or x.stride(1) > 1) for x in tensors):
        return 1
    return _power(width * tensors[0].itemsize // _TAKEN)


def _power(count: int) -> int:
    """The power of two above half of it, up to a warp."""
    return min(_WARP, 1 << max(0, count - 1).bit_length())


def _wide(tensors: list[Tensor]) -> bool:
    """Whether rows are contiguous and begin at multiples of 16 bytes."""
    steps = (x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == 0 for x in tensors)
    return all(steps) and tables.aligned(tensors)
