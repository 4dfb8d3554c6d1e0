"""zip_weights in plain torch, with the bits of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...check import sum_accumulator
from . import chunks


def zip_weights(
    outs: list[Tensor],
    xs: list[list[Tensor]],
    rows: list[list[Tensor] | None],
    cols: list[list[Tensor] | None],
    factors: list[list[float]],
    divisors: list[Tensor],
    by_row: list[bool],
) -> None:
    for one in zip(outs, xs, rows, cols, factors, divisors, by_row, strict=True):
        _zip(*one)


def _zip(
    out: Tensor,
    xs: list[Tensor],
    rows: list[Tensor] | None,
    cols: list[Tensor] | None,
    factors: list[float],
    divisors: Tensor,
    by_row: bool,
) -> None:
    acc = sum_accumulator(out.dtype)
    height, width, inner = out.shape
    columns = None if cols is None else [[*_rounds(labels)] for labels in cols]
    step = max(1, chunks.CHUNK // max(1, width * inner))
    divisors = divisors.to(acc).view(-1, *[1] * (2 if by_row else 1))
    for begin in range(0, height, step):
        end = min(height, begin + step)
        total = _zeros(out, acc, end - begin, width, inner)
        for i, x in enumerate(xs):
            labels = None if rows is None else rows[i]
            part = _sum_rows(x, labels, begin, end, factors[i], acc)
            for to, of in [(slice(None), slice(None))] if columns is None else columns[i]:
                total[:, to] += part[:, of]
        total /= divisors[begin:end] if by_row else divisors
        chunks.store(out, begin, end, total)


def _sum_rows(
    x: Tensor, labels: Tensor | None, begin: int, end: int, factor: float, acc: torch.dtype
) -> Tensor:
    """The rows of x in each of the groups [begin, end), times `factor`, added up."""
    if labels is None:
        part = x[begin:end].to(acc)
        return part * chunks.scalar(factor, part)
    members = torch.nonzero((labels >= begin) & (labels < end)).view(-1)
    part = _zeros(x, acc, end - begin, *x.shape[1:])
    for to, of in _rounds(labels[members] - begin):
        part[to] += x[members[of]].to(acc) * chunks.scalar(factor, part)
    return part


def _zeros(like: Tensor, acc: torch.dtype, *shape: int) -> Tensor:
    """-0, which every number can be added to as it is."""
    return torch.full(shape, -0.0, dtype=acc, device=like.device)


def _rounds(labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(groups, their members): the first of every group, then the second where there is one, ...

    Additions of one round are all to different places, so their order is that of the rounds.
    """
    order = torch.argsort(labels, stable=True)
    grouped = labels[order]
    number = torch.arange(len(labels), device=labels.device)
    number -= torch.searchsorted(grouped, grouped)
    for k in range(int(number.max()) + 1 if len(labels) else 0):
        yield grouped[number == k], order[number == k]
