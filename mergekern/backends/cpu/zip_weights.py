"""zip_weights by csrc/zip_weights.cpp."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import runtime


class _Plan(NamedTuple):
    """One result for the kernel; `held` and what is prepared is what its addresses point to."""

    arguments: dict[str, object]
    height: int
    width: int
    scratch: int  # bytes
    held: list[Tensor]


def zip_weights(
    outs: list[Tensor],
    xs: list[list[Tensor]],
    rows: list[list[Tensor] | None],
    cols: list[list[Tensor] | None],
    factors: list[list[float]],
    divisors: list[Tensor],
    by_row: list[bool],
) -> None:
    """All results in one run of the pool: a task is a part of a large one or some small ones."""
    stream = sum(out.nbytes for out in outs) >= runtime.STREAM
    prepared = _Prepared()
    plans = []
    for out, x, r, c, f, d, by in zip(outs, xs, rows, cols, factors, divisors, by_row, strict=True):
        if any(t.numel() for t in x):
            plans.append(_plan(out, x, r, c, f, d, by, prepared, stream))
        else:
            out.fill_(-0.0)
    sizes = [(p.height, p.width) for p in plans]
    tasks = runtime.tasks(sizes, runtime.CHUNK, runtime._cpu.ZIP_ROWS)

    def run(i: int) -> None:
        scratch = torch.empty(max(plans[k].scratch for k, _, _ in tasks[i]), dtype=torch.uint8)
        for k, begin, end in tasks[i]:
            address = scratch.data_ptr() if plans[k].scratch else 0
            runtime._cpu.zip_weights(**plans[k].arguments, scratch=address, begin=begin, end=end)

    runtime.parallel(run, len(tasks))


class _Groups(NamedTuple):
    """Where the members of each group start, and the members of all groups."""

    starts: Tensor
    members: Tensor
    largest: int  # members of a group


class _Prepared:
    """Labels as the kernel takes them; a model's tensors share most of them."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], tuple[Tensor, _Groups]] = {}
        self._targets: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._positions: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def groups(self, labels: Tensor, count: int) -> _Groups:
        key = (id(labels), count)
        if key not in self._groups:
            starts = torch.empty(count + 1, dtype=torch.int64)
            members = torch.empty(len(labels), dtype=torch.int64)
            largest = runtime._cpu.group_members(
                labels=labels.data_ptr(),
                n=len(labels),
                groups=count,
                starts=starts.data_ptr(),
                members=members.data_ptr(),
            )
            self._groups[key] = labels, _Groups(starts, members, largest)
        return self._groups[key][1]

    def targets(self, labels: Tensor, inner: int) -> Tensor:
        """The labels of columns of one element, from those of columns of `inner`."""
        key = (id(labels), inner)
        if key not in self._targets:
            self._targets[key] = labels, _spread(labels, inner)
        return self._targets[key][1]

    def positions(self, labels: Tensor, inner: int) -> Tensor | None:
        """Where each column of the result comes from; None where all stay.

        labels have each group once.
        """
        key = (id(labels), inner)
        if key not in self._positions:
            members = self.groups(labels, len(labels)).members
            stay = torch.equal(members, torch.arange(len(members)))
            made = None if stay else _spread(members, inner).to(torch.int32)
            self._positions[key] = labels, made
        return self._positions[key][1]


def _spread(columns: Tensor, inner: int) -> Tensor:
    if inner == 1:
        return columns
    return (columns[:, None] * inner + torch.arange(inner)).view(-1)


def _trade_places(
    cols: list[Tensor],
    columns: int,
    width: int,
    groups: list[_Groups] | None,
    prepared: _Prepared,
) -> bool:
    """Whether each model has every column of the result once, and at most one row in a group."""
    if width >= 2**31 or (groups is not None and any(g.largest > 1 for g in groups)):
        return False
    return all(len(c) == columns and prepared.groups(c, columns).largest <= 1 for c in cols)


def _plan(
    out: Tensor,
    xs: list[Tensor],
    rows: list[Tensor] | None,
    cols: list[Tensor] | None,
    factors: list[float],
    divisors: Tensor,
    by_row: bool,
    prepared: _Prepared,
    stream: bool,
) -> _Plan:
    height, columns, inner = out.shape
    width, together = columns * inner, runtime._cpu.ZIP_ROWS
    divisors = divisors if by_row else divisors.repeat_interleave(inner)
    groups = None if rows is None else [prepared.groups(r, height) for r in rows]
    trade = cols is not None and _trade_places(cols, columns, width, groups, prepared)
    held, inputs, moved = [divisors], [], 0
    for i, x in enumerate(xs):
        if not x.numel():
            continue
        if not x.is_contiguous() and not x[:1].is_contiguous():
            x = x.contiguous()
        held.append(x)
        targets = positions = None
        if cols is not None and trade:
            positions = prepared.positions(cols[i], inner)
            moved += positions is not None
        elif cols is not None:
            targets = prepared.targets(cols[i], inner)
        inputs.append(
            runtime._cpu.ZipInput(
                data=x.data_ptr(),
                width=x.shape[1] * inner,
                row_stride=x.stride(0),
                starts=0 if groups is None else groups[i].starts.data_ptr(),
                members=0 if groups is None else groups[i].members.data_ptr(),
                targets=0 if targets is None else targets.data_ptr(),
                positions=0 if positions is None else positions.data_ptr(),
                factor=factors[i],
            )
        )
    arguments = {
        "out": runtime.view(out, stream=stream),
        "width": width,
        "xs": inputs,
        "row_divisors": divisors.data_ptr() if by_row else 0,
        "column_divisors": 0 if by_row else divisors.data_ptr(),
    }
    if cols is None or trade:
        scratch = moved * (width * 16 + runtime._cpu.ZIP_PIECES)
    else:
        scratch = -(-width // together) * together * 32
    return _Plan(arguments, height, width, scratch, held)
