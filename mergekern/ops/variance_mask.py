"""variance_mask: which elements the models disagree on most, and what each model has there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import check, dispatch
from ..keep import NOTHING, Mask, Threshold
from ._cost import Cost
from .kth_magnitude import WholeModel

_OP = "variance_mask"


class VarianceMask(NamedTuple):
    """A mask (None: everything is kept), and per model the sum of its squares under it."""

    mask: Mask | None
    squares: list[float]


def variance_mask(
    xs: Sequence[Tensor],
    share: float | Threshold,
    *,
    base: Tensor | None = None,
    backend: str = "auto",
) -> VarianceMask:
    """Keep the share of elements whose variance of x_i - base over the models is largest.

    k = int(share * number of variances that are not 0) elements are kept, none where k is 0, the
    lowest index first among ties; share >= 1 keeps everything. A Threshold in the place of the
    share is that of a vector of which the xs are a part.
    squares: sum (x_i - base)^2 over the kept elements.

    Shapes: all of one shape, any strides.
    Result: exact selection among variances computed in float32 (float64 for float64) by the two
    passes of the definition, every step rounded: the same mask on every backend; NaN ranks first.
    Sums of squares in float64.

    Cost: two reads of everything (one if share >= 1), one bit written per element.
    Raises: ArgumentError for unequal inputs.
    Source: SCE of FuseChat (Wan et al., 2408.07990); mergekit `sce`.

    >>> import torch
    >>> a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0])
    >>> variance_mask([a, b], 0.5)
    VarianceMask(mask=Mask(bits=tensor([32], dtype=torch.uint8)), squares=[9.0, 81.0])
    """
    op = _OP
    xs = check.tensors(op, xs)
    if base is not None:
        base = check.tensor(op, base, "base")
        check.same(op, "base", base, "xs[0]", xs[0])
    chosen = dispatch.select(backend, op, xs[0].device, xs[0].dtype)
    bits, threshold = None, NOTHING
    if isinstance(share, Threshold):
        threshold = share
    elif (share := check.number(op, "share", share)) < 1:
        threshold = _threshold(chosen, xs, share, base)
    if isinstance(share, Threshold) or share < 1:
        size = (xs[0].numel() + 7) // 8
        bits = torch.zeros(size, dtype=torch.uint8, device=xs[0].device)
    squares = dispatch.load(chosen, op)(bits, xs, base, threshold)
    return VarianceMask(None if bits is None else Mask(bits), squares)


def variance_threshold(
    xs: list[Tensor], share: float, *, base: Tensor | None = None, backend: str = "auto"
) -> Threshold:
    """The threshold of `variance_mask`, of tensors that have been checked; share < 1."""
    return _threshold(dispatch.select(backend, _OP, xs[0].device, xs[0].dtype), xs, share, base)


def _threshold(chosen: str, xs: list[Tensor], share: float, base: Tensor | None) -> Threshold:
    find = dispatch.load(chosen, _OP, "variance_threshold")
    return Threshold(*find(xs, base, max(share, 0.0)))


class WholeVariance(WholeModel):
    """The thresholds of variances seen piece by piece; each rank is one of those that are not 0."""

    _op = _OP

    def __init__(self, share: float, backend: str = "auto") -> None:
        super().__init__([lambda total: int(total * max(share, 0.0))], backend, nonzero=True)


def cost(n: int, numel: int, itemsize: int, *, base: bool = True) -> Cost:
    """Two reads, one bit per element written."""
    return Cost(2 * numel * itemsize * (n + base) + numel // 8, numel * (4 * n + 2))
