"""zip_match by csrc/zip_match.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import check
from . import runtime


def zip_match(
    out: list[Tensor],
    correlations: list[Tensor],
    offsets: list[list[int]],
    widths: list[int],
    budgets: list[list[int]],
    alpha: float,
    zipit: bool,
) -> None:
    def match(i: int) -> None:
        x = runtime.matrix(correlations[i])
        nbytes = runtime._cpu.zip_match_scratch(correlation=x)
        scratch = check.output("zip_match", None, out[i], shape=[nbytes], dtype=torch.uint8)
        runtime._cpu.zip_match(
            correlation=x,
            offsets=offsets[i],
            width=widths[i],
            alpha=alpha,
            budgets=budgets[i],
            zipit=zipit,
            scratch=scratch.data_ptr(),
            labels=out[i].data_ptr(),
        )

    runtime.parallel(match, len(out))
