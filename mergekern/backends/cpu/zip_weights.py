"""zip_weights by csrc/zip_weights.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from . import runtime


def zip_weights(
    out: Tensor,
    xs: list[Tensor],
    rows: list[Tensor] | None,
    cols: list[Tensor] | None,
    factors: list[float],
    divisors: Tensor,
    by_row: bool,
) -> None:
    if not out.numel():
        return
    height, inner = len(out), out.shape[2]
    width = out.shape[1] * inner
    dense = [x if x[:1].is_contiguous() else x.contiguous() for x in xs]
    members = None if rows is None else [_members(labels, height) for labels in rows]
    targets = None if cols is None else [_spread(labels, inner) for labels in cols]
    if not by_row:
        divisors = divisors.repeat_interleave(inner)
    inputs = [
        runtime._cpu.ZipInput(
            data=x.data_ptr(),
            width=x.shape[1] * inner,
            row_stride=x.stride(0),
            starts=0 if members is None else members[i][0].data_ptr(),
            members=0 if members is None else members[i][1].data_ptr(),
            targets=0 if targets is None else targets[i].data_ptr(),
            factor=factors[i],
        )
        for i, x in enumerate(dense)
        if x.numel()
    ]
    if not inputs:
        out.zero_()
        return
    target, address = runtime.view(out, output=True), divisors.data_ptr()
    together = runtime._cpu.ZIP_ROWS
    lanes = 0 if targets is None else -(-width // together) * together * 32

    def kernel(begin: int, end: int) -> None:
        scratch = torch.empty(lanes, dtype=torch.uint8)
        runtime._cpu.zip_weights(
            out=target,
            width=width,
            xs=inputs,
            row_divisors=address if by_row else 0,
            column_divisors=0 if by_row else address,
            scratch=scratch.data_ptr(),
            begin=begin,
            end=end,
        )

    step = max(1, runtime.CHUNK // 4 // width // together) * together
    runtime.chunks(kernel, height, step)


def _members(labels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(where each group starts, the members of all groups)"""
    starts = torch.empty(groups + 1, dtype=torch.int64)
    members = torch.empty(len(labels), dtype=torch.int64)
    runtime._cpu.group_members(
        labels=labels.data_ptr(),
        n=len(labels),
        groups=groups,
        starts=starts.data_ptr(),
        members=members.data_ptr(),
    )
    return starts, members


def _spread(labels: Tensor, inner: int) -> Tensor:
    """The labels of columns of one element, from those of columns of `inner`."""
    if inner == 1:
        return labels
    return (labels[:, None] * inner + torch.arange(inner)).view(-1)
