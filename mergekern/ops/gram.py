"""gram: all dot products of a few long tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ._cost import Cost


def gram(
    xs: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    dim: int | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out[i, j] = <x_i - base, x_j - base>, of whole tensors or of each vector along `dim`.

    Shapes: all of one shape, any strides. The result is float64, exactly symmetric in its last two
    axes: [N, N] for dim=None, where tensors count as flat vectors; else [..., N, N], where ... are
    the axes other than `dim`. A scalar is one vector of one element along dim 0 or -1.
    Result: deltas, products and sums in float64 (cuda: a product joins its sum in one rounding),
    deterministic for each backend.
    |error| <= (L + 2) 2**-53 <|x_i - base|, |x_j - base|> for vectors of L elements, between
    backends twice that. The backend `cpu` adds up whole tensors in blocks, which makes its bound
    (min(L, 2**18) / 512 + L / 2**18 + 66) 2**-53, and its bits depend on the two tensors alone: not
    on layout, threads, instruction set or the other tensors. Vectors along `dim` give these bits
    too, but where neighbouring vectors lie side by side in memory: those are added up in order.
    NaN and infinities propagate. The products of no elements are 0.
    Cost: one read of every input (of vectors with other strides a copy, chunk by chunk);
    N (N + 1) flops an element.
    Raises: ArgumentError for unequal inputs, or a `dim` they do not have.
    Source: cosines of SLERP (mergekit `slerp`) and Model Stock (2403.19522).

    >>> import torch
    >>> a, b = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.ones(2, 2)
    >>> gram([a, b])
    tensor([[29.,  9.],
            [ 9.,  4.]], dtype=torch.float64)
    >>> gram([a, b], dim=-1)[1]
    tensor([[4., 2.],
            [2., 2.]], dtype=torch.float64)
    """
    op = "gram"
    xs = check.tensors(op, xs)
    if base is not None:
        base = check.tensor(op, base, "base")
        check.same(op, "base", base, "xs[0]", xs[0])
    n = len(xs)
    tensors = xs if base is None else [*xs, base]
    others = () if dim is None else _others(xs[0], dim)
    out = check.output(
        op,
        out,
        xs[0],
        shape=(*others, n, n),
        dtype=torch.float64,
        inputs=tensors,
        in_place=False,
    )
    chosen = dispatch.select(backend, op, xs[0].device, xs[0].dtype)
    if dim is None:
        dispatch.load(chosen, op)(out, xs, base)
        return out
    kernel = dispatch.load(chosen, op, "gram_rows")
    whole = out if out.is_contiguous() else torch.empty_like(out)
    vectors = [x.reshape(1) if not x.ndim else x.movedim(dim, -1) for x in tensors]
    _fill(kernel, whole, vectors, n)
    return out if whole is out else out.copy_(whole)


_COPIED = 1 << 20  # elements up to which vectors of any strides are copied


def _fill(kernel: Callable[..., None], out: Tensor, tensors: list[Tensor], n: int) -> None:
    """Vectors along the last axis of n tensors, and of the base if there is one more."""
    first = tensors[0]
    if first.numel() > _COPIED and not all(map(_is_matrix, tensors)):
        for i in range(len(first)):
            _fill(kernel, out[i], [x[i] for x in tensors], n)
        return
    matrices = [x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in tensors]
    kernel(out.view(-1, n, n), matrices[:n], matrices[n] if len(matrices) > n else None)


def _is_matrix(x: Tensor) -> bool:
    """Whether all axes but the last are one axis in memory."""
    steps = [(x.shape[d], x.stride(d)) for d in range(x.ndim - 1) if x.shape[d] > 1]
    return all(a == size * b for (_, a), (size, b) in itertools.pairwise(steps))


def _others(x: Tensor, dim: int) -> tuple[int, ...]:
    """The axes beside `dim`."""
    axes = max(1, x.ndim)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -axes <= dim < axes:
        raise ArgumentError.of("gram", "dim is out of range", repr(dim), f"{-axes} to {axes - 1}")
    return tuple(size for d, size in enumerate(x.shape) if d != dim % axes)


def cost(n: int, numel: int, itemsize: int, *, base: bool = False) -> Cost:
    """One read of every input."""
    return Cost(numel * itemsize * (n + base), numel * n * (n + 1))
