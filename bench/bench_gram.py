"""gram, and the methods that it is the first of two passes of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.methods import geometry
from mergekern.ops import gram, weighted_sum
from mergekern.ops._cost import Cost

from inputs import CHECKED, half_unit, models, relative_error
from peers import mergekit


def exact_dots(xs: list[Tensor], base: Tensor | None) -> Tensor:
    """In float64, chunk by chunk."""
    dots = torch.zeros(len(xs), len(xs), dtype=torch.float64)
    for parts in zip(*(x.split(1 << 20) for x in ([*xs] if base is None else [*xs, base]))):
        rows = torch.stack([p.double() for p in parts])
        rows = rows if base is None else rows[:-1] - rows[-1]
        dots += rows @ rows.T
    return dots


@pytest.mark.parametrize("based", [False, True], ids=["alone", "base"])
@pytest.mark.parametrize("n", [2, 3])
def bench_gram(row, dtype: torch.dtype, nbytes: int, n: int, based: bool) -> None:
    base, xs = models(n, nbytes, dtype)
    origin = base if based else None
    got, exact = mk.gram(xs, base=origin), exact_dots(xs, origin)
    norms = exact.diagonal().sqrt()
    bound = 2 * xs[0].numel() * 2.0**-53 * norms[:, None] * norms[None, :]

    def plain() -> list[Tensor]:
        rows = [x.float() for x in xs] if origin is None else [x - origin for x in xs]
        return [torch.dot(x, y) for x in rows for y in rows]

    row(
        lambda: mk.gram(xs, base=origin),
        cost=gram.cost(n, xs[0].numel(), dtype.itemsize, base=based),
        error=float(((got - exact).abs() / bound).max()),
        torch=plain,
    )


@pytest.mark.parametrize("dim", [-1, 0])
def bench_gram_along(row, dtype: torch.dtype, nbytes: int, dim: int) -> None:
    """Vectors along the last and the first axis."""
    xs = [x.view(-1, 1024) for x in models(2, nbytes, dtype)[1]]
    got = mk.gram(xs, dim=dim)
    some = [x.movedim(dim, -1)[:64].double() for x in xs]
    exact = (some[0] * some[1]).sum(-1)
    bound = (some[0] * some[1]).abs().sum(-1) * xs[0].shape[dim] * 2.0**-52
    row(
        lambda: mk.gram(xs, dim=dim),
        cost=gram.cost(2, xs[0].numel(), dtype.itemsize),
        error=relative_error(got[:64, 0, 1], exact, bound),
        torch=lambda: [(x * y).sum(dim) for x, y in ((xs[0], xs[0]), (xs[0], xs[1]), (xs[1],) * 2)],
    )


METHODS: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("slerp", 2, False, {"t": 0.3}),
    ("nuslerp", 2, False, {"weight": [1.0, 1.0]}),
    ("multislerp", 3, False, {"weight": [1.0, 1.0, 1.0]}),
    ("karcher", 3, False, {}),
    ("model_stock", 3, True, {}),
]
COEFFICIENTS = {
    "slerp": lambda dots: geometry.slerp_coefficients(dots, 0.3),
    "nuslerp": lambda dots: geometry.nuslerp_coefficients(dots, 0.5),
    "multislerp": lambda dots: geometry.multislerp_coefficients(dots, [1 / 3] * 3, 1e-8),
    "karcher": lambda dots: geometry.karcher_coefficients(dots, 10, 1e-5, 0.0),
    "model_stock": geometry.model_stock_coefficients,
}


@pytest.mark.parametrize(("method", "n", "based", "given"), METHODS, ids=[m[0] for m in METHODS])
def bench_geometry(
    row, dtype: torch.dtype, nbytes: int, method: str, n: int, based: bool, given: dict[str, Any]
) -> None:
    """Whole methods against two passes: N (+ base) tensors read twice, one written."""
    base, xs = models(n, nbytes, dtype)
    origin = base if based else None

    def call() -> Tensor:
        return mk.merge_tensors(xs, method, base=origin, **given)

    weights = COEFFICIENTS[method](exact_dots(xs, origin)).tolist()
    tensors = xs if origin is None else [*xs, origin]
    weights += [] if origin is None else [1 - sum(weights)]
    terms = torch.stack([w * x[:CHECKED].double() for w, x in zip(weights, tensors)])
    unit = 2.0**-24 if dtype.itemsize == 2 else 1e-12  # of coefficients, from dot products
    bound = (n + 2) * unit * terms.abs().sum(0) + half_unit(terms.sum(0), dtype)
    numel, size = xs[0].numel(), dtype.itemsize
    first = gram.cost(n, numel, size, base=based)
    second = weighted_sum.cost(n + based, numel, size)
    reference = base if based else xs[0] if method == "slerp" else None
    row(
        call,
        cost=Cost(first.bytes + second.bytes, first.flops + second.flops),
        error=relative_error(call()[:CHECKED], terms.sum(0), bound),
        peers=mergekit(method, xs[1:] if method == "slerp" else xs, reference, **given),
    )
