"""zip_weights by csrc/zip_weights.cpp."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import runtime


class _Plan(NamedTuple):
    """One result for the kernel; `held` is what the addresses in `arguments` point to."""

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
            out.zero_()
    sizes = [(p.height, p.width) for p in plans]
    tasks = runtime.tasks(sizes, runtime.CHUNK, runtime._cpu.ZIP_ROWS)

    def run(i: int) -> None:
        scratch = torch.empty(max(plans[k].scratch for k, _, _ in tasks[i]), dtype=torch.uint8)
        for k, begin, end in tasks[i]:
            address = scratch.data_ptr() if plans[k].scratch else 0
            runtime._cpu.zip_weights(**plans[k].arguments, scratch=address, begin=begin, end=end)

    runtime.parallel(run, len(tasks))


class _Prepared:
    """Labels as the kernel takes them; a model's tensors share most of them."""

    def __init__(self) -> None:
        self._members: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._targets: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def members(self, labels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """(where each group starts, the members of all groups)"""
        key = (id(labels), groups)
        if key not in self._members:
            starts = torch.empty(groups + 1, dtype=torch.int64)
            members = torch.empty(len(labels), dtype=torch.int64)
            runtime._cpu.group_members(
                labels=labels.data_ptr(),
                n=len(labels),
                groups=groups,
                starts=starts.data_ptr(),
                members=members.data_ptr(),
            )
            self._members[key] = labels, starts, members
        return self._members[key][1:]

    def targets(self, labels: Tensor, inner: int) -> Tensor:
        """The labels of columns of one element, from those of columns of `inner`."""
        key = (id(labels), inner)
        if key not in self._targets:
            spread = labels
            if inner > 1:
                spread = (labels[:, None] * inner + torch.arange(inner)).view(-1)
            self._targets[key] = labels, spread
        return self._targets[key][1]


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
    height, inner = len(out), out.shape[2]
    width, together = out.shape[1] * inner, runtime._cpu.ZIP_ROWS
    divisors = divisors if by_row else divisors.repeat_interleave(inner)
    held, inputs = [divisors], []
    for i, x in enumerate(xs):
        if not x.numel():
            continue
        x = x if x[:1].is_contiguous() else x.contiguous()
        starts = members = targets = None
        if rows is not None:
            starts, members = prepared.members(rows[i], height)
        if cols is not None:
            targets = prepared.targets(cols[i], inner)
        pointers = [x, starts, members, targets]
        held += [t for t in pointers if t is not None]
        data, first, second, third = (0 if t is None else t.data_ptr() for t in pointers)
        inputs.append(
            runtime._cpu.ZipInput(
                data=data,
                width=x.shape[1] * inner,
                row_stride=x.stride(0),
                starts=first,
                members=second,
                targets=third,
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
    scratch = 0 if cols is None else -(-width // together) * together * 32
    return _Plan(arguments, height, width, scratch, held)
