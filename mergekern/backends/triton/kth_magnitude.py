"""kth_magnitude in Triton; importing this imports triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from .. import selection, tables
from ..selection import Brackets, Descent, Found, Layout
from .common import DTYPES
from .keys import BLOCK, LAUNCH, keys_kernel
from .selecting import (
    RUN,
    count_kernel,
    digit_kernel,
    find_kernel,
    histogram_kernel,
    sample_kernel,
    tie_kernel,
)

_LANES = 8  # histograms that programs take in turn, so that fewer of them add to one place

assert RUN.value == selection.RUN


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
        inputs = self.xs if self.base is None else [self.base, *self.xs]
        self.rounded = rounded
        self.addresses = tables.upload([x.data_ptr() for x in self.xs], torch.int64, self.device)
        self.constants = {
            "IN": DTYPES[xs[0].dtype],
            "WIDE": tables.aligned(inputs),
            "BASE": base is not None,
            "ROUNDED": rounded,
            "VARIANCE": variance,
            "BLOCK": BLOCK,
            **LAUNCH,
        }

    def only(self, i: int) -> Source:
        return self if self.vectors == 1 else Source([self.xs[i]], self.base, rounded=self.rounded)

    def layout(self) -> Layout:
        """A program takes a chunk of 16,384 to 65,536 elements."""
        return Layout.of(self.numel, BLOCK, 8, 32, 2048)

    def launch(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """A kernel that takes keys, on the current stream of the device; its interpreter is numpy,
        which warns."""
        base = self.xs[0] if self.base is None else self.base
        with torch.cuda.device_of(self.xs[0]), np.errstate(all="ignore"):
            kernel[(programs,)](
                addresses=self.addresses,
                base=base,
                n=len(self.xs),
                numel=self.numel,
                **arguments,
                **self.constants,
            )

    def keys(self, out: Tensor) -> None:
        programs = self.vectors * triton.cdiv(self.numel, BLOCK)
        self.launch(keys_kernel, programs, out=out, vectors=self.vectors)

    def sample(self, out: Tensor, runs: int) -> None:
        programs = self.vectors * triton.cdiv(out.shape[1], BLOCK)
        self.launch(sample_kernel, programs, sample=out, vectors=self.vectors, runs=runs)

    def count(self, brackets: Brackets) -> None:
        steps, chunks, room = self.layout()
        n = len(brackets.of)
        kept = brackets.kept is not None
        self.launch(
            count_kernel,
            n * chunks,
            counts=brackets.counts,
            kept=brackets.kept if kept else brackets.edges,  # of the same type
            edges=brackets.edges,
            of=brackets.of,
            brackets=n,
            chunks=chunks,
            steps=steps,
            room=room if kept else 0,
        )

    def descend(self, brackets: Brackets, descent: Descent, found: Tensor, ties: Tensor) -> None:
        _, chunks, room = self.layout()
        n, rounds = len(brackets.of), self.key_dtype.itemsize
        shared = {
            "state": descent.state,
            "histograms": descent.histograms,
            "kept": brackets.kept,
            "counts": brackets.counts,
            "edges": brackets.edges,
            "brackets": n,
            "chunks": chunks,
            "room": room,
            "BLOCK": min(room, 1024),
        }
        with torch.cuda.device_of(found), np.errstate(all="ignore"):
            for i in range(rounds):
                shift = 8 * (rounds - 1 - i)
                digit_kernel[(n * chunks,)](round=i, shift=shift, FIRST=i == 0, **shared)
            tie_kernel[(n * chunks,)](
                found=found,
                ties=ties,
                totals=descent.totals,
                wanted=descent.wanted,
                round=rounds,
                **shared,
            )

    def find(self, of: Tensor, wanted: Tensor, chunk: Tensor, before: Tensor, out: Tensor) -> None:
        steps, chunks, _ = self.layout()
        self.launch(
            find_kernel,
            len(of),
            index=out,
            wanted=wanted,
            chunk=chunk,
            before=before,
            of=of,
            chunks=chunks,
            steps=steps,
        )

    def histogram(self, prefix: int, shift: int, over: int) -> Tensor:
        counts = torch.zeros(_LANES, 1 << 16, dtype=torch.int64, device=self.device)
        if self.numel:
            self.launch(
                histogram_kernel,
                triton.cdiv(self.numel, BLOCK),
                counts=counts,
                prefix=prefix,
                shift=shift,
                over=over,
                LANES=_LANES,
            )
        return counts


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
