"""permute by csrc/permute.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from . import runtime


def _axes(out: Tensor, x: Tensor, index: dict[int, Tensor]) -> list[tuple[int, int, Tensor | None]]:
    """(size, stride, index times stride) of the result's axes; plain neighbours are merged."""
    axes: list[tuple[int, int, Tensor | None]] = []
    for d, size in enumerate(out.shape):
        stride = x.stride(d)
        if d in index:
            axes.append((size, stride, index[d] * stride))
        elif size != 1:
            if axes and axes[-1][2] is None and axes[-1][1] == size * stride:
                size *= axes.pop()[0]
            axes.append((size, stride, None))
    if len(axes) < 2:  # rows are counted over all axes but the last
        axes.insert(0, (1, 0, None))
    if len(axes) < 2:
        axes.append((1, 1, None))
    return axes


def permute(out: Tensor, x: Tensor, index: dict[int, Tensor]) -> None:
    if not out.numel():
        return
    axes = _axes(out, x, index)
    width, stride, offsets = axes[-1]
    row_size = x.shape[max(index)] if index else 0
    positions = None
    if offsets is not None and stride == 1 and row_size < 2**31:
        positions = offsets.to(torch.int32)
    addresses = [(n, s, 0 if o is None else o.data_ptr()) for n, s, o in axes]

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty(0 if positions is None else row_size * 16, dtype=torch.uint8)
        runtime._cpu.permute(
            out=out.data_ptr(),
            x=x.data_ptr(),
            itemsize=x.element_size(),
            axes=addresses,
            stream=out.nbytes >= runtime.STREAM,
            positions=0 if positions is None else positions.data_ptr(),
            row_size=row_size,
            scratch=scratch.data_ptr(),
            begin=begin,
            end=end,
        )

    rows = max(
        8, runtime.CHUNK // width // 8 * 8
    )  # whole groups of the rows that are gathered together
    runtime.chunks(kernel, out.numel() // width, rows)
