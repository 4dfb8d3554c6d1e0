"""Rows of `python -m bench.gpu`: permutations, zipping, covariance, matching."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import mergekern as mk
from mergekern.ops import covariance as covariances
from mergekern.ops import permute, zip_match, zip_weights

from gpu_rows import WIDTH, Place, Row, same_bits


def rearranging(place: Place) -> Iterator[Row]:
    g = torch.Generator().manual_seed(0)
    width = WIDTH if not place.small else 64
    _, (a, b) = place.models(2, torch.bfloat16)
    a, b = a.view(-1, width), b.view(-1, width)
    order = {axis: torch.randperm(a.shape[axis], generator=g).to(place.device) for axis in (0, 1)}
    out = torch.zeros_like(a)
    for name, axes, share in [("rows", (0,), 0.85), ("columns", (1,), 0.7), ("both", (0, 1), 0.7)]:
        index = {axis: order[axis] for axis in axes}

        def move(backend: str, index: dict[int, Tensor] = index) -> Tensor:
            return mk.permute(a, index, out=out, backend=backend)

        def plain(index: dict[int, Tensor] = index) -> Tensor:
            y = a
            for axis, i in index.items():
                y = y.index_select(axis, i)
            return y

        cost = permute.cost(a.numel(), 2)
        yield Row("permute", name, move, cost, same_bits(plain()), plain, share=share)

    labels = {
        name: torch.cat([torch.arange(n), torch.argsort(order[axis]).cpu()])
        for axis, (name, n) in enumerate([("rows", a.shape[0]), ("cols", a.shape[1])])
    }

    def zipped(backend: str) -> Tensor:
        return mk.zip_weights([a, b], **labels, backend=backend)

    yield Row(
        "zip_weights",
        "both",
        zipped,
        zip_weights.cost(2, a.numel(), 2),
        same_bits(zipped("torch").clone()),
        lambda: _moved_mean(a, b, order),
        share=0.6,
    )


def _moved_mean(a: Tensor, b: Tensor, order: dict[int, Tensor]) -> Tensor:
    return (a + b.index_select(0, order[0]).index_select(1, order[1])) / 2


def correlations(place: Place) -> Iterator[Row]:
    n = 1 << 9 if place.small else 1 << 17
    for d, wanted in [(1024, 1.3), (2048, 1.3), (4096, 1.5), (8192, 1.5)]:
        width = d // 64 if place.small else d
        g = torch.Generator(place.device).manual_seed(0)
        shared = torch.randn(n, 1, generator=g, device=place.device)
        x = torch.randn(n, width, generator=g, device=place.device).mul_(0.8)
        x = x.add_(0.6 * shared).bfloat16()
        exact = _correlation(x)

        def update(backend: str, x: Tensor = x) -> mk.Covariance:
            moments = mk.Covariance(x.shape[1], device=x.device, backend=backend)
            moments.update(x)
            return moments

        def check(got: mk.Covariance, exact: Tensor = exact) -> float:
            """Of correlations, against float64: at most 1e-5."""
            return float((got.correlation().double() - exact).abs().max() / 1e-5)

        cost = covariances.cost(n, width, 2)
        product = lambda x=x: torch.mm(x.T, x)  # noqa: E731
        yield Row("covariance", f"{n} x {width}", update, cost, check, product, wanted=wanted)
        if d <= 2048:
            yield _matching(exact)


def _matching(correlation: Tensor) -> Row:
    """From where the correlation is to labels: the matrix is copied to the host once."""
    d = len(correlation)
    given = correlation.float()

    def match(backend: str) -> Tensor:
        return mk.zip_match(given, [d // 2, d // 2], backend=backend)

    cost = zip_match.cost(d, d // 2, 4)
    return Row("zip_match", f"a pair of {d // 2}", match, cost, same_bits(match("torch")))


def _correlation(x: Tensor) -> Tensor:
    mean = x.mean(0, dtype=torch.float64)
    products = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(1 << 13):
        centred = part.double() - mean
        products.addmm_(centred.T, centred)
    deviation = products.diagonal().sqrt()
    return products / torch.outer(deviation, deviation)


GROUPS = (rearranging, correlations)
