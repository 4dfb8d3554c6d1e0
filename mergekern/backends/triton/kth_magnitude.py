"""kth_magnitude in Triton: a sample, one pass that counts, a selection among what it kept.

A chunk of elements, the work of one program of the pass, keeps its keys inside the bracket in room
of its own, in order: nothing depends on how programs are scheduled, and the ties of each chunk
are known. Nothing comes to the host before the answer. The patterns of 16-bit tensors take this
way as well: a histogram of them would need an atomic per element, which is slower than a read.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from ... import digits
from ...keep import NOTHING
from .. import tables
from .keys import BLOCK, Source, magnitude_keys
from .selecting import (
    RUN,
    count_kernel,
    digit_kernel,
    find_kernel,
    histogram_kernel,
    sample_kernel,
    tie_kernel,
)

_SMALL = 1 << 18  # up to here all keys are sorted: launches, not the work, take the time
_RUNS = 1 << 13  # at most
_LANES = 8  # histograms that programs take in turn, so that fewer of them add to one place

Found = tuple[float, int, int, int]  # value, above, equal, one past the index of the last kept tie


class Layout(NamedTuple):
    """How elements are dealt out to programs."""

    steps: int  # blocks of one chunk
    chunks: int
    room: int  # keys that a chunk can keep


def layout(numel: int) -> Layout:
    """Chunks of 8 to 32 blocks, about 2048 chunks where there are elements enough for them.

    A bracket holds 4 % of the elements where they are few and 1.4 % where they are many, so an
    eighth leaves room for chunks that are unlike the others.
    """
    blocks = triton.cdiv(numel, BLOCK)
    steps = min(32, max(8, triton.next_power_of_2(triton.cdiv(blocks, 2048))))
    return Layout(steps, triton.cdiv(blocks, steps), steps * BLOCK // 8)


def kth_magnitude(
    xs: list[Tensor], base: Tensor | None, ranks: list[list[int]], rounded: bool = False
) -> list[list[Found]]:
    """Per x and rank: value, count above, count equal, one past the index of the last kept tie."""
    source = Source.of(xs, base, rounded=rounded)
    of = [i for i, ks in enumerate(ranks) for _ in ks]
    ks = [k for of_x in ranks for k in of_x]
    wanted = tables.upload(ks, torch.int64, source.device)
    if source.numel <= _SMALL:
        rows = tables.upload(of, torch.int64, source.device)
        found = _sorted(magnitude_keys(source)[rows], wanted)
    else:
        sample = _sample(source)
        n = sample.shape[1]
        places = [i * n + p for i, k in zip(of, ks) for p in _bracket(n, k / source.numel)]
        edges = sample.view(-1)[tables.upload(places, torch.int64, source.device)].view(-1, 2)
        found = _select(source, of, edges, wanted, _count(source, of, edges))
    answers = iter(_answers(source, of, found))
    return [[next(answers) for _ in ks] for ks in ranks]


def select_share(source: Source, share: float) -> Found:
    """The same for k = int(share * number of keys that are not 0); keeps nothing where k is 0."""
    if not source.numel:
        return NOTHING
    if source.numel <= _SMALL:
        keys = magnitude_keys(source)
        wanted = (keys.count_nonzero(1).double() * share).long()
        found = _sorted(keys, wanted)
    else:
        sample = _sample(source)
        n = sample.shape[1]
        # Known on the host before the pass, unlike the k of all keys that it leads to.
        nonzero = int(sample.count_nonzero()) / n
        edges = sample[0, list(_bracket(n, share * nonzero, spread=2))].view(1, 2)
        edges = torch.cat([torch.zeros_like(edges), edges])
        counts, kept = _count(source, [0, 0], edges)
        nonzeros = source.numel - counts[:1, :, 1].sum(1)
        wanted = (nonzeros.double() * share).long()
        found = _select(source, [0], edges[1:], wanted, (counts[1:], kept[1:]))
    return _answers(source, [0], found)[0]


def digit_histogram(
    xs: list[Tensor], base: Tensor | None, prefix: int, shift: int, rounded: bool
) -> np.ndarray:
    """Counts of the 16-bit digit at `shift` of the keys that equal `prefix` above it."""
    return histogram(Source.of(xs[:1], base, rounded=rounded), prefix, shift)


def place_of_tie(
    xs: list[Tensor], base: Tensor | None, value: float, rank: int, rounded: bool
) -> tuple[int, int]:
    """How many magnitudes equal `value`, and the index of the rank-th (from 1) of them or -1."""
    return place(Source.of(xs[:1], base, rounded=rounded), value, rank)


def place(source: Source, value: float, rank: int) -> tuple[int, int]:
    """The same of any keys."""
    key = digits.value_key(value, source.acc)
    edges = tables.upload([key, key], source.key_dtype, source.device).view(1, 2)
    ties = _count(source, [0], edges, keep=False)[0][:, :, 1].cumsum(1)
    wanted = tables.upload([key, rank], torch.int64, source.device).view(1, 2)
    index = _find(source, [0], wanted[:, :1], wanted[:, 1:], ties)
    there, where = torch.cat([ties[0, -1:], index]).tolist()
    return there, where


# ---- small tensors ---------------------------------------------------------------------------

# A row of `found`: key, count above, count equal, cut, the rank, whether the bracket held it.


def _sorted(keys: Tensor, wanted: Tensor) -> Tensor:
    ranked, order = keys.sort(dim=1, descending=True, stable=True)
    last = (wanted - 1).clamp(min=0)[:, None]
    key = ranked.gather(1, last)
    above, equal = (keys > key).sum(1), (keys == key).sum(1)
    cut = order.gather(1, last)[:, 0] + 1
    return torch.stack([key[:, 0].long(), above, equal, cut, wanted, torch.ones_like(cut)], 1)


# ---- a sample, and one pass that counts ------------------------------------------------------


def _sample(source: Source) -> Tensor:
    """Sorted keys of short runs from all over each vector."""
    runs = min(_RUNS, max(1 << 10, source.numel >> 11))
    shape = source.vectors, runs * RUN.value
    sample = torch.empty(shape, dtype=source.key_dtype, device=source.device)
    programs = source.vectors * triton.cdiv(runs * RUN.value, BLOCK)
    source.launch(sample_kernel, programs, sample=sample, vectors=source.vectors, runs=runs)
    return sample.sort(dim=1).values


def _bracket(n: int, share: float, spread: float = 1) -> tuple[int, int]:
    """Places in a sorted sample of n that enclose the rank of that share, with near certainty.

    Five standard deviations of the rank to each side if the sample were independent.
    """
    quantile = 1 - min(share, 1.0)
    margin = spread * 5 * (n * quantile * (1 - quantile)) ** 0.5 + 8
    return max(0, int(quantile * n - margin)), min(n - 1, int(quantile * n + margin))


def _count(
    source: Source, of: list[int], edges: Tensor, *, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """Per bracket and chunk: keys above, at its high end, inside, at its low end; keys inside."""
    steps, chunks, room = layout(source.numel)
    counts = torch.empty(len(of), chunks, 4, dtype=torch.int32, device=source.device)
    shape = (len(of), chunks, room) if keep else (0,)
    kept = torch.empty(shape, dtype=source.key_dtype, device=source.device)
    source.launch(
        count_kernel,
        len(of) * chunks,
        counts=counts,
        kept=kept,
        edges=edges.contiguous(),
        of=tables.upload(of, torch.int64, source.device),
        brackets=len(of),
        chunks=chunks,
        steps=steps,
        room=room,
    )
    return counts, kept


def _select(
    source: Source, of: list[int], edges: Tensor, wanted: Tensor, counted: tuple[Tensor, Tensor]
) -> Tensor:
    """Among the keys kept, byte by byte of their distance from the low end of the bracket."""
    counts, kept = counted
    _, chunks, room = layout(source.numel)
    n, device = len(of), source.device
    rounds = source.key_dtype.itemsize
    totals = counts.sum(1)  # int64
    # Where each selection stands before each round: bytes so far, rank among what they leave.
    state = torch.zeros(rounds + 1, n, 2, dtype=torch.int64, device=device)
    state[0, :, 1] = wanted - totals[:, 0] - totals[:, 1]
    histograms = torch.zeros(rounds, n, 256, dtype=torch.int64, device=device)
    shared = {
        "state": state,
        "histograms": histograms,
        "kept": kept,
        "counts": counts,
        "edges": edges,
        "brackets": n,
        "chunks": chunks,
        "room": room,
        "BLOCK": min(room, 1024),
    }
    found = torch.empty(n, 6, dtype=torch.int64, device=device)
    ties = torch.empty(n, chunks, dtype=torch.int32, device=device)
    with torch.cuda.device_of(kept), np.errstate(all="ignore"):
        for i in range(rounds):
            digit_kernel[(n * chunks,)](round=i, shift=8 * (rounds - 1 - i), FIRST=i == 0, **shared)
        tie_kernel[(n * chunks,)](
            found=found, ties=ties, totals=totals, wanted=wanted, round=rounds, **shared
        )
    before = ties.cumsum(1)
    index = _find(source, of, found[:, :1], wanted[:, None] - found[:, 1:2], before)
    lost = (counts[:, :, 2] > room).any(1)
    found[:, 3] = index + 1
    found[:, 5] &= ~lost
    return found


def _find(source: Source, of: list[int], key: Tensor, rank: Tensor, before: Tensor) -> Tensor:
    """The index of the rank-th (from 1) element of that key, or -1, given the ties up to and with
    each chunk."""
    steps, chunks, _ = layout(source.numel)
    index = torch.empty(len(of), dtype=torch.int64, device=source.device)
    source.launch(
        find_kernel,
        len(of),
        index=index,
        wanted=torch.cat([key, rank], 1),
        chunk=torch.searchsorted(before, rank),
        before=before,
        of=tables.upload(of, torch.int64, source.device),
        chunks=chunks,
        steps=steps,
    )
    return index


# ---- the answer, and where the sample misleads -----------------------------------------------


def _answers(source: Source, of: list[int], found: Tensor) -> list[Found]:
    answers: list[Found] = []
    for i, (key, above, equal, cut, k, held) in zip(of, found.tolist(), strict=True):
        if not k:
            answers.append(NOTHING)
        elif held:
            cut = source.numel if equal == k - above else cut
            answers.append((digits.key_value(key, source.acc), above, equal, cut))
        else:
            answers.append(_by_digits(source.only(i), k))
    return answers


def _by_digits(source: Source, k: int) -> Found:
    bits = 8 * source.key_dtype.itemsize
    key, above, equal = digits.by_digits(
        lambda prefix, shift: histogram(source, prefix, shift), bits, k
    )
    value = digits.key_value(key, source.acc)
    if equal == k - above:
        return value, above, equal, source.numel
    return value, above, equal, place(source, value, k - above)[1] + 1


def histogram(source: Source, prefix: int, shift: int) -> np.ndarray:
    counts = torch.zeros(_LANES, 1 << 16, dtype=torch.int64, device=source.device)
    if source.numel:
        source.launch(
            histogram_kernel,
            triton.cdiv(source.numel, BLOCK),
            counts=counts,
            prefix=prefix,
            shift=shift,
            over=min(shift + 16, 8 * source.key_dtype.itemsize - 1),  # no key has bits above
            LANES=_LANES,
        )
    found: np.ndarray = counts.sum(0).cpu().numpy()
    return found
