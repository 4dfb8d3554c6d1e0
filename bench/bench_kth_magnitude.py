"""kth_magnitude: one exact threshold of |x - base|."""

from __future__ import annotations

import torch

import mergekern as mk
from mergekern.ops.kth_magnitude import cost

from inputs import models


def bench_kth_magnitude(row, dtype: torch.dtype, nbytes: int) -> None:
    base, (x,) = models(1, nbytes, dtype)
    k = x.numel() // 5
    small = slice(0, 1 << 22)
    share = min(1.0, (1 << 22) / x.numel())
    found = mk.kth_magnitude(x, k, base=base)
    magnitudes = (x.float() - base.float()).abs()
    above = int((magnitudes > found.value).sum())
    equal = int((magnitudes == found.value).sum())
    exact = (above, equal) == (found.above, found.equal) and above < k <= above + equal
    del magnitudes
    row(
        lambda: mk.kth_magnitude(x, k, base=base),
        cost=cost(x.numel(), dtype.itemsize, base=True),
        error=0.0 if exact else float("inf"),
        peers={
            "torch": (
                lambda: (x[small] - base[small]).abs().sort(descending=True).values[k // 32],
                share,
            )
        },
    )
