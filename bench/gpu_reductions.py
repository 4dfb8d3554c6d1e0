"""Rows of `python -m bench.gpu`: sums, task vectors, masks, Gram matrices, many small tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import mergekern as mk
from mergekern.keep import Bernoulli, MagPrune
from mergekern.ops import (
    coefficient_gradients,
    gram,
    kth_magnitude,
    merge_deltas,
    rank_mask,
    variance_mask,
    weighted_rows,
    weighted_sum,
)
from mergekern.ops._cost import Cost

from gpu_rows import WIDTH, Place, Row, same_bits


def weighted_sums(place: Place) -> Iterator[Row]:
    for dtype, n in [(torch.bfloat16, 2), (torch.bfloat16, 8), (torch.float32, 3)]:
        _, xs = place.models(n, dtype)
        weights = [0.3, 0.7, 0.1, 0.2, 0.5, 0.4, 0.6, 0.8][:n]
        out = torch.zeros_like(xs[0])

        def call(backend: str, xs: list = xs, weights: list = weights, out: Tensor = out) -> Tensor:
            return mk.weighted_sum(xs, weights, out=out, backend=backend)

        yield Row(
            "weighted_sum",
            f"{n} x {_name(dtype)}",
            call,
            weighted_sum.cost(n, out.numel(), dtype.itemsize),
            same_bits(call("torch").clone()),
            lambda xs=xs, weights=weights: sum(w * x for x, w in zip(xs, weights)),
            share=0.85,
        )

    _, xs = place.models(3, torch.bfloat16)
    xs = [x.view(-1, 64 if place.small else WIDTH) for x in xs]
    k = len(xs[0])
    by_row = torch.linspace(0.1, 0.9, 3 * k, dtype=torch.float64, device=place.device).view(k, 3)
    out = torch.zeros_like(xs[0])

    def rows(backend: str) -> Tensor:
        return mk.weighted_rows(xs, by_row, out=out, backend=backend)

    cost = weighted_rows.cost(3, out.numel(), 2, k=k)
    yield Row("weighted_rows", "3 x bfloat16", rows, cost, same_bits(rows("torch").clone()))


def task_vectors(place: Place) -> Iterator[Row]:
    n = 3
    base, xs = place.models(n, torch.bfloat16)
    once = merge_deltas.cost(n, base.numel(), 2)
    twice = once._replace(bytes=once.bytes + (n + 1) * base.nbytes)
    out = torch.zeros_like(base)
    draws = [Bernoulli(0.3, 1, "embed", i) for i in range(n)]
    recipes: dict[str, dict[str, Any]] = {
        "task arithmetic": {"weights": [0.3] * n},
        "dare": {"weights": [0.3] * n, "keep": draws, "rescale": [1 / 0.3] * n},
    }
    for name, recipe in recipes.items():

        def call(backend: str, recipe: dict[str, Any] = recipe) -> Tensor:
            return mk.merge_deltas(base, xs, **recipe, out=out, backend=backend)

        yield Row("merge_deltas", name, call, once, same_bits(call("torch").clone()), share=0.85)

    def ties(backend: str) -> Tensor:
        return mk.merge_tensors(xs, "ties", base=base, weight=1.0, density=0.2, backend=backend)

    yield Row(
        "merge_deltas",
        "ties, whole",
        ties,
        twice,
        same_bits(ties("torch").clone()),
        lambda: _ties_by_sorting(base, xs, 0.2),
        share=1 / 1.2,
        wanted=10,
    )

    def kth(backend: str) -> Any:
        return mk.kth_magnitude(xs[0], base.numel() // 5, base=base, backend=backend)

    one = kth_magnitude.cost(base.numel(), 2, base=True)
    yield Row("kth_magnitude", "bfloat16, base", kth, one, same_bits(kth("torch")))


def masks(place: Place) -> Iterator[Row]:
    base, xs = place.models(3, torch.bfloat16)
    base, *xs = [x.view(-1, 64 if place.small else WIDTH) for x in (base, *xs)]

    def della(backend: str) -> Any:
        return mk.rank_mask(xs[0], MagPrune(0.5, 0.15, 1, "embed"), base=base, backend=backend)

    def sce(backend: str) -> Any:
        return mk.variance_mask(xs, 0.5, base=base, backend=backend)

    one = rank_mask.cost(base.numel(), 2, base=True)
    yield Row("rank_mask", "bfloat16, base", della, one, _same_mask(della("torch").mask))
    three = variance_mask.cost(3, base.numel(), 2)
    yield Row("variance_mask", "3 x bfloat16", sce, three, _same_mask(sce("torch").mask))


def _same_mask(expected: Any) -> Callable[[Any], float]:
    check = same_bits(expected.bits)
    return lambda got: check(got.mask.bits)


def _ties_by_sorting(base: Tensor, xs: list[Tensor], density: float) -> Tensor:
    """As mergekit merges on a GPU: an argsort of every task vector, rounding at each step."""
    k = int(density * base.numel())
    kept = []
    for x in xs:
        d = (x - base).view(-1)
        mask = torch.zeros_like(d)
        mask[torch.argsort(d.abs(), descending=True)[:k]] = 1
        kept.append(d * mask)
    stack = torch.stack(kept)
    sign = torch.where(stack.sum(0) >= 0, 1, -1)
    agree = stack.sign() == sign
    return base + ((stack * agree).sum(0) / agree.sum(0).clamp(min=1)).view_as(base)


def geometry(place: Place) -> Iterator[Row]:
    base, xs = place.models(3, torch.bfloat16)

    def products(backend: str) -> Tensor:
        return mk.gram([base, *xs], backend=backend)

    exact = products("torch")
    # Between two backends, twice the bound of the docstring.
    bound = 2 * (base.numel() + 2) * 2.0**-53 * exact.abs()
    yield Row(
        "gram",
        "4 x bfloat16",
        products,
        gram.cost(4, base.numel(), 2),
        lambda got: float(((got - exact).abs() / bound).max()),
        share=0.8,
    )
    yield _coefficients(*place.models(8, torch.bfloat16))
    two = Cost(2 * 2 * base.nbytes + base.nbytes, 0)
    three = Cost(2 * 3 * base.nbytes + base.nbytes, 0)
    jobs: list[tuple[str, list[Tensor], dict[str, Any], Cost]] = [
        ("slerp", xs[:1], {"base": base, "t": 0.3}, two),
        ("karcher", xs, {}, three),
    ]
    for method, given, parameters, cost in jobs:

        def merge(
            backend: str, method: str = method, given: list = given, parameters: dict = parameters
        ) -> Tensor:
            return mk.merge_tensors(given, method, backend=backend, **parameters)

        expected = merge("torch").float()

        def check(got: Tensor, expected: Tensor = expected) -> float:
            """Coefficients differ in the last places: a unit of the stored type at most."""
            unit = torch.finfo(torch.bfloat16).eps
            return float(((got.float() - expected).abs() / (unit * expected.abs() + 1e-30)).max())

        yield Row("gram", method, merge, cost, check, share=0.8)


def _coefficients(base: Tensor, xs: list[Tensor]) -> Row:
    grad = base.float()

    def gradients(backend: str) -> Tensor:
        return mk.coefficient_gradients(grad, xs, base=base, backend=backend)

    exact = gradients("torch")
    sizes = [torch.dot(grad.double().abs(), (x.double() - base.double()).abs_()) for x in xs]
    bound = 2 * (base.numel() + 2) * 2.0**-53 * torch.stack(sizes)
    return Row(
        "coefficient_gradients",
        "8 x bfloat16, base, float32 gradient",
        gradients,
        coefficient_gradients.cost(8, base.numel(), 2, grad_itemsize=4),
        lambda got: float(((got - exact).abs() / bound).max()),
        lambda: [torch.dot(grad, (x - base).float()) for x in xs],
        share=0.8,
    )


def small_tensors(place: Place) -> Iterator[Row]:
    """600 tensors of a few thousand elements, three models and a base."""
    g = torch.Generator().manual_seed(0)
    count = 20 if place.small else 600
    base, *models = (
        {
            f"layers.{i}.weight": torch.randn(64, 48, generator=g).bfloat16().to(place.device)
            for i in range(count)
        }
        for _ in range(4)
    )
    numel = count * 64 * 48
    for method in ("linear", "task_arithmetic"):
        with_base = method == "task_arithmetic"

        def merge(backend: str, method: str = method, with_base: bool = with_base) -> Any:
            return mk.merge_state_dicts(
                models, method, base=base if with_base else None, weight=0.3, backend=backend
            )

        def plain(with_base: bool = with_base) -> dict[str, Tensor]:
            if with_base:
                return {k: b + sum(0.3 * (m[k] - b) for m in models) for k, b in base.items()}
            return {k: sum(0.3 * m[k] for m in models) / 0.9 for k in base}

        op = "merge_deltas" if with_base else "weighted_sum"
        cost = merge_deltas.cost(3, numel, 2) if with_base else weighted_sum.cost(3, numel, 2)
        expected = same_bits(merge("torch"))
        name = f"{count} small tensors, {method}"
        yield Row(op, name, merge, cost, expected, plain, wanted=20, launches=3)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


GROUPS = (weighted_sums, task_vectors, masks, geometry, small_tensors)
