"""gram: all dot products of a few long tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import check, dispatch
from ._cost import Cost


def gram(
    xs: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out[i, j] = <x_i - base, x_j - base>, tensors taken as flat vectors.

    Shapes: all of one shape, any strides; the result is float64 [N, N], exactly symmetric.
    Result: deltas, products and sums in float64, deterministic for each backend.
    |error| <= (numel + 2) 2**-53 <|x_i - base|, |x_j - base|>, about numel / 16 in practice.
    NaN and infinities propagate.
    Cost: one read of every input; N (N + 1) flops an element.
    Raises: ArgumentError for unequal inputs.
    Source: cosines of SLERP (mergekit `slerp`) and Model Stock (2403.19522).

    >>> import torch
    >>> gram([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])])
    tensor([[25.,  3.],
            [ 3.,  1.]], dtype=torch.float64)
    """
    op = "gram"
    xs = check.tensors(op, xs)
    if base is not None:
        base = check.tensor(op, base, "base")
        check.same(op, "base", base, "xs[0]", xs[0])
    n = len(xs)
    out = check.output(
        op,
        out,
        xs[0],
        shape=(n, n),
        dtype=torch.float64,
        inputs=xs if base is None else [*xs, base],
        in_place=False,
    )
    chosen = dispatch.select(backend, op, xs[0].device, xs[0].dtype)
    dispatch.load(chosen, op)(out, xs, base)
    return out


def cost(n: int, numel: int, itemsize: int, *, base: bool = False) -> Cost:
    """One read of every input."""
    return Cost(numel * itemsize * (n + base), numel * n * (n + 1))
