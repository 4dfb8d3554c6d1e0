"""zip_weights by csrc/cuda/zip_weights.cu.

The members of groups are listed once for labels that several tensors share, on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...check import sum_accumulator
from .. import tables
from ..moves import Groups
from .runtime import DTYPES, _cuda, bits, place

_SHARED = 48 << 10  # bytes of shared memory that every GPU has
_SHORT = 256  # columns below which rows are too short for a block of threads each


class _Plan(NamedTuple):
    out: Tensor  # [height, columns, inner]
    divisors: Tensor
    by_row: bool
    inputs: list[list[int]]
    widest: int  # elements of a row of an input
    held: list[Tensor]  # what addresses of `inputs` point to


def zip_weights(
    outs: list[Tensor],
    xs: list[list[Tensor]],
    rows: list[list[Tensor] | None],
    cols: list[list[Tensor] | None],
    factors: list[list[float]],
    divisors: list[Tensor],
    by_row: list[bool],
) -> None:
    """One launch for all results of one dtype and kind of access."""
    if not outs:
        return
    launches: dict[tuple[torch.dtype, str], list[_Plan]] = {}
    groups = Groups(outs[0].device)
    for out, x, r, c, f, d, by in zip(outs, xs, rows, cols, factors, divisors, by_row, strict=True):
        if not out.numel():
            continue
        kind, plan = _plan(out, x, r, c, f, d, by, groups)
        launches.setdefault((out.dtype, kind), []).append(plan)
    for (dtype, kind), plans in launches.items():
        _launch(plans, dtype, kind)


def _plan(
    out: Tensor,
    xs: list[Tensor],
    rows: list[Tensor] | None,
    cols: list[Tensor] | None,
    factors: list[float],
    divisors: Tensor,
    by_row: bool,
    groups: Groups,
) -> tuple[str, _Plan]:
    height, columns, inner = out.shape
    xs = [x if x[:1].is_contiguous() else x.contiguous() for x in xs]
    widest = max(x.shape[1] * inner for x in xs)
    whole = 16 // out.element_size()
    if cols is None:
        strides = (columns * inner, *(x.stride(0) for x in xs))
        wide = tables.aligned([out, *xs]) and all(s % whole == 0 for s in strides)
        kind = "packs" if wide else "stay"
    else:
        short = columns * inner < _SHORT
        fits = widest * sum_accumulator(out.dtype).itemsize <= _SHARED
        kind = "staged" if fits and not short else "gather"
    held, inputs = [*xs], []
    for i, x in enumerate(xs):
        if not x.numel():
            continue
        of_rows = () if rows is None else groups.of(rows[i], height)
        of_columns: tuple[Tensor, ...] = ()
        if cols is not None:
            numbers = torch.int32 if kind == "staged" else torch.int64
            of_columns = groups.of(cols[i], columns, numbers)
        held += [*of_rows, *of_columns]
        inputs.append([x.data_ptr(), x.shape[1] * inner, x.stride(0)])
        for listed in (of_rows, of_columns):
            inputs[-1] += [t.data_ptr() for t in listed] or [0, 0]
        inputs[-1].append(bits(factors[i]))
    return kind, _Plan(out, divisors, by_row, inputs, widest, held)


def _launch(plans: list[_Plan], dtype: torch.dtype, kind: str) -> None:
    device = plans[0].out.device
    inputs = tables.upload([v for p in plans for x in p.inputs for v in x], torch.int64, device)
    address = inputs.data_ptr()
    table: list[int] = []
    counts: list[int] = []
    for p in plans:
        height, columns, inner = p.out.shape
        width = columns * inner
        table += [p.out.data_ptr(), address, len(p.inputs), p.divisors.data_ptr(), int(p.by_row)]
        table += [p.out.numel(), width, bits(1 / width), inner, bits(1 / inner), sum(counts)]
        address += 8 * sum(map(len, p.inputs))
        tile = _cuda.ZIP_TILE * (16 // dtype.itemsize if kind == "packs" else 1)
        counts.append(height if kind == "staged" else -(-p.out.numel() // tile))
    zips = tables.upload(table, torch.int64, device)
    owners = tables.owners(counts, device)
    _cuda.zip_weights(
        zips=zips.data_ptr(),
        owners=owners.data_ptr(),
        tiles=sum(counts),
        shared=max(p.widest for p in plans) * sum_accumulator(dtype).itemsize,
        dtype=DTYPES[dtype],
        zipping=getattr(_cuda.Zipping, kind),
        **place(device),
    )
