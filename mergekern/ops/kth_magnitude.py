"""kth_magnitude: the exact threshold of a trim, without a sort."""

from __future__ import annotations

import operator

from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ..keep import Threshold
from ._cost import Cost


def kth_magnitude(
    x: Tensor, k: int, *, base: Tensor | None = None, backend: str = "auto"
) -> Threshold:
    """The k-th largest |x|, or |x - base|, with the counts that keep exactly k elements.

    Shapes: any, any strides; `base` as x. 1 <= k <= x.numel().
    Result: exact. Differences are rounded to float32 (float64 for float64), as `merge_deltas`
    takes them. `above` counts larger magnitudes, `equal` those equal to `value`; kept are the
    larger ones and, among the equal, those at a flat index below `cut` (lowest first). Every NaN
    ranks above infinity and equals every other NaN.

    Cost: one read of x (and base), plus one more where the sample misleads; never a sort of x.
    16-bit x without base: a histogram of its 32768 bit patterns. Otherwise a sample brackets the
    rank and one pass counts above, at and inside the bracket (torch backend: 16-bit digits).
    Raises: ArgumentError if k is out of range or base differs in shape, dtype or device.
    Source: the trim of TIES (Yadav et al., 2306.01708); mergekit `sparsify.magnitude`.

    >>> import torch
    >>> kth_magnitude(torch.tensor([1.0, -3.0, 2.0, 2.0]), 2)
    Threshold(value=2.0, above=1, equal=2, cut=3)
    """
    op = "kth_magnitude"
    x = check.tensor(op, x, "x")
    if base is not None:
        base = check.tensor(op, base, "base")
        check.same(op, "base", base, "x", x)
    if not hasattr(k, "__index__") or isinstance(k, bool) or not 1 <= k <= x.numel():
        raise ArgumentError.of(op, "k is out of range", k, f"1 to {x.numel()}")
    chosen = dispatch.select(backend, op, x.device, x.dtype)
    return Threshold(*dispatch.load(chosen, op)(x, base, operator.index(k)))


def cost(numel: int, itemsize: int, *, base: bool = False) -> Cost:
    """One read."""
    return Cost(numel * itemsize * (2 if base else 1), numel)
