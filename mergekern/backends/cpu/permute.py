"""permute by csrc/permute.cpp."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import runtime

_RUN = 256  # bytes up to which elements that stay together are moved one by one


class _Axis(NamedTuple):
    """size steps, each of `stride` elements or, with an index, to where `offsets` say."""

    size: int
    stride: int
    offsets: Tensor | None
    source: int  # steps that x has there


class _Plan(NamedTuple):
    """One tensor for the kernel; `held` is what `args` points to."""

    args: object
    rows: int
    width: int
    scratch: int  # bytes
    held: list[Tensor]


def permute(outs: list[Tensor], xs: list[Tensor], indices: list[dict[int, Tensor]]) -> None:
    """All tensors in one run of the pool: a task is a part of a large one or some small ones."""
    stream = sum(out.nbytes for out in outs) >= runtime.STREAM
    offsets = _Offsets()
    plans = [
        _plan(out, x, _axes(out, x, index, offsets), offsets, stream)
        for out, x, index in zip(outs, xs, indices, strict=True)
        if out.numel()
    ]
    # Whole groups of the rows that are gathered together.
    tasks = runtime.tasks([(p.rows, p.width) for p in plans], runtime.CHUNK, 8)

    def run(i: int) -> None:
        scratch = torch.empty(max(plans[k].scratch for k, _, _ in tasks[i]), dtype=torch.uint8)
        for k, begin, end in tasks[i]:
            runtime._cpu.permute(
                args=plans[k].args, scratch=scratch.data_ptr(), begin=begin, end=end
            )

    runtime.parallel(run, len(tasks))


class _Offsets:
    """Indices times strides; a model's tensors share most of them."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int, int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def of(self, index: Tensor, stride: int, run: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """The place of every element of the `run` ones that lie at each position."""
        key = (id(index), stride, run, dtype)
        if key not in self._made:
            made = index * stride
            if run > 1:
                made = (made[:, None] + torch.arange(run)).view(-1)
            self._made[key] = index, made.to(dtype)
        return self._made[key][1]


def _axes(out: Tensor, x: Tensor, index: dict[int, Tensor], offsets: _Offsets) -> list[_Axis]:
    """The axes of the result; plain neighbours are merged, and short runs with what moves them."""
    axes: list[_Axis] = []
    for d, size in enumerate(out.shape):
        stride = x.stride(d)
        if d in index:
            axes.append(_Axis(size, stride, offsets.of(index[d], stride, 1), x.shape[d]))
        elif size != 1:
            if axes and axes[-1].offsets is None and axes[-1].stride == size * stride:
                size *= axes.pop().size
            axes.append(_Axis(size, stride, None, size))
    if len(axes) > 1 and index:
        moved, run = axes[-2:]
        whole = run.offsets is None and run.stride == 1 and moved.stride == run.size
        if moved.offsets is not None and whole and run.size * x.element_size() <= _RUN:
            spread = offsets.of(index[max(index)], run.size, run.size)
            axes[-2:] = [_Axis(moved.size * run.size, 1, spread, moved.source * run.size)]
    while len(axes) < 2:  # rows are counted over all axes but the last
        axes.insert(0, _Axis(1, 0, None, 1))
    return axes


def _plan(out: Tensor, x: Tensor, axes: list[_Axis], offsets: _Offsets, stream: bool) -> _Plan:
    last = axes[-1]
    held = [axis.offsets for axis in axes if axis.offsets is not None]
    positions = None
    if last.offsets is not None and last.stride == 1 and last.source < 2**31:
        positions = offsets.of(last.offsets, 1, 1, torch.int32)
        held.append(positions)
    args = runtime._cpu.Permute(
        out=out.data_ptr(),
        x=x.data_ptr(),
        itemsize=x.element_size(),
        axes=[(a.size, a.stride, 0 if a.offsets is None else a.offsets.data_ptr()) for a in axes],
        stream=stream,
        positions=0 if positions is None else positions.data_ptr(),
        row_size=last.source,
    )
    scratch = 0 if positions is None else last.source * 16
    return _Plan(args, out.numel() // last.size, last.size, scratch, held)
