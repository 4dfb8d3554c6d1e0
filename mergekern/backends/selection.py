"""Exact selection on a GPU: a sample, one pass that counts, a selection among what it kept.

A chunk of elements keeps its keys inside the bracket in room of its own, in order: nothing depends
on how a GPU schedules its work, and the ties of each chunk are known. Nothing comes to the host
before the answer. The patterns of 16-bit tensors take this way as well: a histogram of them would
need an atomic per element, which is slower than a read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import digits
from ..check import accumulator
from ..keep import NOTHING
from . import tables

_SMALL = 1 << 18  # up to here all keys are sorted: launches, not the work, take the time
_RUNS = 1 << 13  # at most
RUN = 16  # neighbours that are sampled together: a cache line or less

Found = tuple[float, int, int, int]  # value, above, equal, one past the index of the last kept tie


class Layout(NamedTuple):
    """How elements are dealt out."""

    steps: int  # tiles of one chunk
    chunks: int
    room: int  # keys that a chunk can keep

    @classmethod
    def of(cls, numel: int, tile: int, least: int, most: int, chunks: int) -> Layout:
        """Chunks of `least` to `most` tiles, about so many where there are elements enough.

        A bracket holds 4 % of the elements where they are few and 1.4 % where they are many, so an
        eighth leaves room for chunks that are unlike the others.
        """
        tiles = -(-numel // tile)
        wanted = 1 << (-(-tiles // chunks) - 1).bit_length()
        steps = min(most, max(least, wanted))
        return cls(steps, -(-tiles // steps), steps * tile // 8)


class Brackets(NamedTuple):
    """Vectors against two keys each, and what the pass over them finds."""

    of: Tensor  # int64 [brackets]: the vector
    edges: Tensor  # [brackets, 2]: low, high
    counts: Tensor  # int32 [brackets, chunks, 4]: above, at high, inside, at low
    kept: Tensor | None  # [brackets, chunks, room]: keys inside

    def from_index(self, first: int) -> Brackets:
        kept = None if self.kept is None else self.kept[first:]
        return Brackets(self.of[first:], self.edges[first:], self.counts[first:], kept)


class Descent(NamedTuple):
    """A selection among kept keys, byte by byte of their distance from the low end."""

    state: Tensor  # int64 [rounds + 1, brackets, 2]: bytes so far, rank among what they leave
    histograms: Tensor  # int64 [rounds, brackets, 256]
    totals: Tensor  # int64 [brackets, 4]: counts of all chunks
    wanted: Tensor  # int64 [brackets]: ranks


class Source(ABC):
    """What is ranked, |x - base| of each x or the variance of all as one vector, and the kernels
    that do; they enqueue on the current stream."""

    def __init__(self, xs: list[Tensor], base: Tensor | None, *, variance: bool) -> None:
        self.xs = [x.reshape(-1).contiguous() for x in xs]
        self.base = None if base is None else base.reshape(-1).contiguous()
        self.variance = variance
        self.numel, self.device = xs[0].numel(), xs[0].device
        self.vectors = 1 if variance else len(xs)
        self.acc = accumulator(xs[0].dtype)
        self.key_dtype = torch.int64 if self.acc == torch.float64 else torch.int32

    @abstractmethod
    def only(self, i: int) -> Source:
        """One of the vectors."""

    @abstractmethod
    def layout(self) -> Layout: ...

    @abstractmethod
    def keys(self, out: Tensor) -> None:
        """All keys: out [vectors, numel]."""

    @abstractmethod
    def sample(self, out: Tensor, runs: int) -> None:
        """Keys of one run in each of so many strata: out [vectors, runs * RUN]."""

    @abstractmethod
    def count(self, brackets: Brackets) -> None:
        """Fills counts, and what is kept."""

    @abstractmethod
    def descend(self, brackets: Brackets, descent: Descent, found: Tensor, ties: Tensor) -> None:
        """found [brackets, 6]: key, count above, count equal, a place to fill, the rank, whether
        the bracket held it; ties [brackets, chunks]: how often each chunk holds the key."""

    @abstractmethod
    def find(self, of: Tensor, wanted: Tensor, chunk: Tensor, before: Tensor, out: Tensor) -> None:
        """The index of the rank-th element of a key, or -1: wanted [brackets, 2] has both, chunk
        where it lies, before [brackets, chunks] such elements up to the end of each chunk."""

    @abstractmethod
    def histogram(self, prefix: int, shift: int, over: int) -> Tensor:
        """Counts of the 16-bit digit at `shift` of the first vector's keys that are `prefix` from
        bit `over` on: [any, 65536]."""


def kth_magnitudes(source: Source, ranks: list[list[int]]) -> list[list[Found]]:
    """Per vector and rank: value, count above, count equal, one past the index of the last kept
    tie."""
    of = [i for i, ks in enumerate(ranks) for _ in ks]
    ks = [k for of_x in ranks for k in of_x]
    wanted = tables.upload(ks, torch.int64, source.device)
    if source.numel <= _SMALL:
        rows = tables.upload(of, torch.int64, source.device)
        found = _sorted(all_keys(source)[rows], wanted)
    else:
        sample = _sample(source)
        n = sample.shape[1]
        places = [i * n + p for i, k in zip(of, ks) for p in _bracket(n, k / source.numel)]
        edges = sample.view(-1)[tables.upload(places, torch.int64, source.device)].view(-1, 2)
        found = _select(source, _count(source, of, edges), wanted)
    answers = iter(_answers(source, of, found))
    return [[next(answers) for _ in ks] for ks in ranks]


def select_share(source: Source, share: float) -> Found:
    """The same for k = int(share * number of keys that are not 0); keeps nothing where k is 0."""
    if not source.numel:
        return NOTHING
    if source.numel <= _SMALL:
        keys = all_keys(source)
        wanted = (keys.count_nonzero(1).double() * share).long()
        found = _sorted(keys, wanted)
    else:
        sample = _sample(source)
        n = sample.shape[1]
        # Known on the host before the pass, unlike the k of all keys that it leads to.
        nonzero = int(sample.count_nonzero()) / n
        edges = sample[0, list(_bracket(n, share * nonzero, spread=2))].view(1, 2)
        brackets = _count(source, [0, 0], torch.cat([torch.zeros_like(edges), edges]))
        nonzeros = source.numel - brackets.counts[:1, :, 1].sum(1)
        wanted = (nonzeros.double() * share).long()
        found = _select(source, brackets.from_index(1), wanted)
    return _answers(source, [0], found)[0]


def histogram(source: Source, prefix: int, shift: int) -> np.ndarray:
    """Counts of the 16-bit digit at `shift` of the keys that equal `prefix` above it."""
    over = min(shift + 16, 8 * source.key_dtype.itemsize - 1)  # no key has bits above
    found: np.ndarray = source.histogram(prefix, shift, over).sum(0).cpu().numpy()
    return found


def place(source: Source, value: float, rank: int) -> tuple[int, int]:
    """How many magnitudes equal `value`, and the index of the rank-th (from 1) of them or -1."""
    key = digits.value_key(value, source.acc)
    edges = tables.upload([key, key], source.key_dtype, source.device).view(1, 2)
    brackets = _count(source, [0], edges, keep=False)
    ties = brackets.counts[:, :, 1].cumsum(1)
    wanted = tables.upload([key, rank], torch.int64, source.device).view(1, 2)
    index = _find(source, brackets.of, wanted, ties)
    there, where = torch.cat([ties[0, -1:], index]).tolist()
    return there, where


# ---- small tensors ---------------------------------------------------------------------------


def all_keys(source: Source) -> Tensor:
    """A row per vector."""
    shape = source.vectors, source.numel
    keys = torch.empty(shape, dtype=source.key_dtype, device=source.device)
    source.keys(keys)
    return keys


def _sorted(keys: Tensor, wanted: Tensor) -> Tensor:
    """As `descend` has it in `found`."""
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
    shape = source.vectors, runs * RUN
    sample = torch.empty(shape, dtype=source.key_dtype, device=source.device)
    source.sample(sample, runs)
    return sample.sort(dim=1).values


def _bracket(n: int, share: float, spread: float = 1) -> tuple[int, int]:
    """Places in a sorted sample of n that enclose the rank of that share, with near certainty.

    Five standard deviations of the rank to each side if the sample were independent.
    """
    quantile = 1 - min(share, 1.0)
    margin = spread * 5 * (n * quantile * (1 - quantile)) ** 0.5 + 8
    return max(0, int(quantile * n - margin)), min(n - 1, int(quantile * n + margin))


def _count(source: Source, of: list[int], edges: Tensor, *, keep: bool = True) -> Brackets:
    _, chunks, room = source.layout()
    n, device = len(of), source.device
    counts = torch.empty(n, chunks, 4, dtype=torch.int32, device=device)
    shape = n, chunks, room
    kept = torch.empty(shape, dtype=source.key_dtype, device=device) if keep else None
    vectors = tables.upload(of, torch.int64, device)
    brackets = Brackets(vectors, edges.contiguous(), counts, kept)
    source.count(brackets)
    return brackets


def _select(source: Source, brackets: Brackets, wanted: Tensor) -> Tensor:
    n, device = len(wanted), source.device
    chunks, room = source.layout()[1:]
    rounds = source.key_dtype.itemsize
    totals = brackets.counts.sum(1)  # int64
    state = torch.zeros(rounds + 1, n, 2, dtype=torch.int64, device=device)
    state[0, :, 1] = wanted - totals[:, 0] - totals[:, 1]
    histograms = torch.zeros(rounds, n, 256, dtype=torch.int64, device=device)
    found = torch.empty(n, 6, dtype=torch.int64, device=device)
    ties = torch.empty(n, chunks, dtype=torch.int32, device=device)
    source.descend(brackets, Descent(state, histograms, totals, wanted), found, ties)
    before = ties.cumsum(1)
    of_ties = torch.cat([found[:, :1], wanted[:, None] - found[:, 1:2]], 1)
    found[:, 3] = _find(source, brackets.of, of_ties, before) + 1
    found[:, 5] &= ~(brackets.counts[:, :, 2] > room).any(1)
    return found


def _find(source: Source, of: Tensor, wanted: Tensor, before: Tensor) -> Tensor:
    index = torch.empty(len(of), dtype=torch.int64, device=source.device)
    chunk = torch.searchsorted(before, wanted[:, 1:].contiguous())
    source.find(of, wanted, chunk, before, index)
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
