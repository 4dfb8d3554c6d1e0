"""kth_magnitude by csrc/cuda/kth_magnitude.cu, the descent by csrc/cuda/kth_descent.cu."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import selection, tables
from ..selection import Brackets, Descent, Found, Layout
from .runtime import DTYPES, _cuda, place

assert selection.RUN == _cuda.SAMPLE_RUN


class Source(selection.Source):
    """The kernels; they take `xs` by a table on the device."""

    def __init__(
        self,
        xs: list[Tensor],
        base: Tensor | None,
        *,
        rounded: bool = False,
        variance: bool = False,
    ) -> None:
        super().__init__(xs, base, variance=variance)
        self.rounded = rounded
        inputs = self.xs if self.base is None else [self.base, *self.xs]
        self._addresses = tables.upload([x.data_ptr() for x in self.xs], torch.int64, self.device)
        self.table = _cuda.KeyTable(
            base=0 if self.base is None else self.base.data_ptr(),
            xs=self._addresses.data_ptr(),
            dtype=DTYPES[xs[0].dtype],
            n=len(xs),
            numel=self.numel,
            rounded=rounded,
            variance=variance,
            wide=tables.aligned(inputs),
        )
        self.place = place(self.device)

    def only(self, i: int) -> Source:
        return self if self.vectors == 1 else Source([self.xs[i]], self.base, rounded=self.rounded)

    def layout(self) -> Layout:
        """A warp takes a chunk of 4,096 to 65,536 elements; a GPU runs some 8,000 of them."""
        return Layout.of(self.numel, _cuda.KEY_TILE, 16, 256, 8192)

    def keys(self, out: Tensor) -> None:
        if self.numel:
            address = out.data_ptr()
            _cuda.magnitude_keys(source=self.table, vectors=self.vectors, out=address, **self.place)

    def sample(self, out: Tensor, runs: int) -> None:
        _cuda.sample_keys(
            source=self.table, vectors=self.vectors, runs=runs, out=out.data_ptr(), **self.place
        )

    def count(self, brackets: Brackets) -> None:
        _cuda.count_brackets(source=self.table, brackets=self._taken(brackets), **self.place)

    def descend(self, brackets: Brackets, descent: Descent, found: Tensor, ties: Tensor) -> None:
        rounds = self.key_dtype.itemsize
        taken = self._taken(brackets)
        bytewise = _cuda.Descent(
            state=descent.state.data_ptr(),
            histograms=descent.histograms.data_ptr(),
            wide=rounds == 8,
        )
        for i in range(rounds):
            _cuda.count_bytes(brackets=taken, descent=bytewise, round=i, **self.place)
        _cuda.count_ties(
            brackets=taken,
            descent=bytewise,
            totals=descent.totals.data_ptr(),
            wanted=descent.wanted.data_ptr(),
            found=found.data_ptr(),
            ties=ties.data_ptr(),
            **self.place,
        )

    def find(self, of: Tensor, wanted: Tensor, chunk: Tensor, before: Tensor, out: Tensor) -> None:
        _cuda.find_keys(
            source=self.table,
            brackets=self._of_vectors(of),
            wanted=wanted.data_ptr(),
            chunk=chunk.data_ptr(),
            before=before.data_ptr(),
            index=out.data_ptr(),
            **self.place,
        )

    def histogram(self, prefix: int, shift: int, over: int) -> Tensor:
        counts = torch.zeros(_cuda.HISTOGRAMS, 1 << 16, dtype=torch.int64, device=self.device)
        _cuda.digit_histogram(
            source=self.table,
            prefix=prefix,
            shift=shift,
            over=over,
            counts=counts.data_ptr(),
            **self.place,
        )
        return counts

    def _taken(self, brackets: Brackets) -> object:
        return self._of_vectors(
            brackets.of,
            edges=brackets.edges.data_ptr(),
            counts=brackets.counts.data_ptr(),
            kept=0 if brackets.kept is None else brackets.kept.data_ptr(),
        )

    def _of_vectors(self, of: Tensor, edges: int = 0, counts: int = 0, kept: int = 0) -> object:
        steps, chunks, room = self.layout()
        return _cuda.Brackets(
            of=of.data_ptr(),
            edges=edges,
            counts=counts,
            kept=kept,
            count=len(of),
            chunks=chunks,
            steps=steps,
            room=room,
        )


def kth_magnitude(
    xs: list[Tensor], base: Tensor | None, ranks: list[list[int]], rounded: bool = False
) -> list[list[Found]]:
    return selection.kth_magnitudes(Source(xs, base, rounded=rounded), ranks)


def digit_histogram(
    xs: list[Tensor], base: Tensor | None, prefix: int, shift: int, rounded: bool
) -> np.ndarray:
    return selection.histogram(Source(xs[:1], base, rounded=rounded), prefix, shift)


def place_of_tie(
    xs: list[Tensor], base: Tensor | None, value: float, rank: int, rounded: bool
) -> tuple[int, int]:
    return selection.place(Source(xs[:1], base, rounded=rounded), value, rank)
