"""coefficient_gradients: what a loss gains by more of each task vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ._cost import Cost


def coefficient_gradients(
    grad: Tensor,
    xs: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out[t] = <grad, x_t - base>: dL/dc_t of W = base + sum_t c_t (x_t - base), grad = dL/dW.

    Shapes: grad, base and the N xs all of one shape, any strides; the result is float64 [N].
    Dtypes: float32, float16, bfloat16, float64; xs and base of one, grad of any.
    Result: differences, products and sums in float64 (cuda: a product joins its sum in one
    rounding), deterministic for each backend.
    |error| <= (L + 2) 2**-53 <|grad|, |x_t - base|> for L elements, between backends twice that:
    at most two roundings of a term and L - 1 additions, in any order. The backend `cpu` has the
    bits and the bound of `gram`, (min(L, 2**18) / 512 + L / 2**18 + 66) 2**-53: they depend on
    grad, x_t and base alone, not on layout, threads, instruction set or the other xs.
    NaN and infinities propagate. The products of no elements are 0.
    Cost: one read of every input, nothing stored; 3 N flops an element with a base, else 2 N.
    Raises: ArgumentError for unequal inputs.
    Source: the layer-wise coefficients of AdaMerging (2310.02575), which autograd finds through N
    task vectors (FusionBench `LayerWiseMergedModel`).

    >>> import torch
    >>> base, a, b = torch.zeros(3), torch.tensor([1.0, -1.0, 4.0]), torch.tensor([3.0, 2.0, 0.0])
    >>> coefficient_gradients(torch.tensor([1.0, 2.0, 0.5]), [a, b], base=base)
    tensor([1., 7.], dtype=torch.float64)
    """
    op = "coefficient_gradients"
    xs = check.tensors(op, xs)
    first, n = xs[0], len(xs)
    if base is not None:
        base = check.tensor(op, base, "base")
        check.same(op, "base", base, "xs[0]", first)
    grad = check.tensor(op, grad, "grad")
    for what, got, expected in (
        ("shape", tuple(grad.shape), tuple(first.shape)),
        ("device", str(grad.device), str(first.device)),
    ):
        if got != expected:
            raise ArgumentError.of(op, f"grad differs from xs[0] in {what}", got, expected)
    inputs = [grad, *xs] if base is None else [grad, *xs, base]
    out = check.output(
        op, out, first, shape=(n,), dtype=torch.float64, inputs=inputs, in_place=False
    )
    chosen = dispatch.select(backend, op, first.device, first.dtype)
    dispatch.load(chosen, op)(out, grad, xs, base)
    return out


def cost(
    n: int, numel: int, itemsize: int, *, grad_itemsize: int | None = None, base: bool = True
) -> Cost:
    """One read of every input."""
    read = (n + base) * itemsize + (grad_itemsize or itemsize)
    return Cost(numel * read, numel * n * (2 + base))
