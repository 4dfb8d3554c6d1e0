"""weighted_rows: averages whose weights differ from row to row, or from column to column."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ._cost import Cost


def weighted_rows(
    xs: Sequence[Tensor],
    weights: Tensor,
    *,
    axis: int = 0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out[r, :] = sum_i weights[r, i] x_i[r, :], or with axis=-1 the same of columns out[:, c].

    Shapes: `xs` all of one shape, any strides; `weights` [K, len(xs)]. axis=0: x is taken as K
    rows, [K, numel / K], where K is the product of some leading dimensions (of a convolution
    [O, I, 3, 3]: 1, O, O I, ...). axis=-1: as K columns, [numel / K, K], K the product of some
    trailing ones. `out` may be one of the inputs.
    Dtypes: as in `weighted_sum`; `weights` are float64 or float32, on any device.

    Result: the bits of `weighted_sum` with those weights on each row; NaN and infinite weights are
    taken, and propagate like those of the inputs.

    Cost: reads every input and the weights and writes the result once; 2n flops an element. Extra
    memory: one float64 copy of the weights.
    Raises: ArgumentError for unequal inputs, another shape or dtype of weights, a K that no
    dimensions give, another axis; BackendError for a backend that cannot serve.
    Source: row-wise NuSLERP (mergekit `nuslerp`); filter-wise Model Stock (2403.19522).

    >>> import torch
    >>> x, y = torch.ones(2, 3), torch.zeros(2, 3)
    >>> weighted_rows([x, y], torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    tensor([[0.2500, 0.2500, 0.2500],
            [0.5000, 0.5000, 0.5000]])
    """
    op = "weighted_rows"
    xs = check.tensors(op, xs)
    first = xs[0]
    check.choice(op, "axis", axis, (0, -1))
    weights = check.tensor(op, weights, "weights")
    if weights.dtype not in (torch.float64, torch.float32):
        name = check.name_of(weights.dtype)
        raise ArgumentError.of(op, "weights have another dtype", name, "float64 or float32")
    if weights.ndim != 2 or weights.shape[1] != len(xs):
        wanted = f"[K, {len(xs)}]"
        raise ArgumentError.of(op, "weights have another shape", list(weights.shape), wanted)
    k = weights.shape[0]
    dims = first.shape if axis == 0 else reversed(first.shape)
    counts = list(itertools.accumulate(dims, int.__mul__, initial=1))
    if k not in counts:
        which = "leading" if axis == 0 else "trailing"
        wanted = f"a product of {which} dimensions of {list(first.shape)}: {counts}"
        raise ArgumentError.of(op, "weights do not fit the rows", f"K = {k}", wanted)
    dtype = check.result_dtype(op, out_dtype, out, first)
    out = check.output(op, out, first, dtype=dtype, inputs=[*xs, weights])
    chosen = dispatch.select(backend, op, first.device, first.dtype)
    inner = 1 if axis == -1 and k > 1 else max(1, first.numel() // max(1, k))
    table = weights.to(first.device, torch.float64).T.contiguous()
    dispatch.load(chosen, op)(out, xs, table, inner)
    return out


def cost(n: int, numel: int, itemsize: int, out_itemsize: int | None = None, k: int = 1) -> Cost:
    """Least traffic of n inputs of `numel` elements in k rows, each with its weights."""
    return Cost(numel * (n * itemsize + (out_itemsize or itemsize)) + 8 * k * n, 2 * n * numel)
