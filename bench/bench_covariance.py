"""covariance against torch.mm of the full product, and its error against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.ops import covariance

pytestmark = pytest.mark.alignment

FEATURES = 128  # whose products are compared with float64
KINDS = [(kind, d) for kind in ("float32", "bfloat16", "float16") for d in (768, 1024, 3072)]


def activations(n: int, d: int, dtype: torch.dtype, seed: int = 0, ratio: float = 0.0) -> Tensor:
    """Rows whose features share a part, with mean / standard deviation = `ratio`."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 1, generator=g)
    return (torch.randn(n, d, generator=g).mul_(0.8) + 0.6 * shared + ratio).to(dtype)


def exact_covariance(x: Tensor, y: Tensor) -> Tensor:
    """In float64, about the mean of all rows."""
    means = [v.mean(0, dtype=torch.float64) for v in (x, y)]
    products = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for a, b in zip(x.split(1024), y.split(1024)):
        products.addmm_((a.double() - means[0]).T, b.double() - means[1])
    return products / len(x)


def over_bound(got: Tensor, x: Tensor, y: Tensor) -> float:
    """Largest error over the docstring's bound, of the first features of x with all of y."""
    got, x = got[:FEATURES], x[:, :FEATURES]
    n, unit = len(x), 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    spread = [v.double().std(0, correction=0) for v in (x, y)]
    largest = [v.abs().amax(0).double() for v in (x, y)]
    bound = 264 * unit * torch.outer(*spread)
    bound += (2 * n + 128) * 2.0**-53 * torch.outer(*largest)
    return float(((got - exact_covariance(x, y)).abs() / bound).max())


def size(timed: bool, d: int) -> tuple[int, int]:
    """Rows and features."""
    return (8192, d) if timed else (300, d // 32)


@pytest.mark.parametrize(("kind", "d"), [*KINDS, ("float64", 768)])
def bench_covariance(row, timed: bool, kind: str, d: int) -> None:
    """A batch into accumulators that are there.

    torch: torch.mm of the full product in the stored type, of 16-bit types cast to float32 first.
    """
    n, d = size(timed, d)
    dtype = getattr(torch, kind)
    x = activations(n, d, dtype)
    moments, single = mk.Covariance(d), mk.Covariance(d)
    moments.update(x)
    error = over_bound(moments.covariance(), x, x)
    peers = {}
    if dtype.itemsize == 2:
        wide, few = x.float(), x[: n // 16]
        peers = {
            "float32": (lambda: single.update(wide), 1.0),
            "mm_16_bit": (lambda: torch.mm(few.T, few), len(few) / n),
        }

    def full() -> Tensor:
        v = x.float() if dtype.itemsize == 2 else x
        return torch.mm(v.T, v)

    row(
        lambda: moments.update(x),
        cost=covariance.cost(n, d, dtype.itemsize),
        error=error,
        torch=full,
        peers=peers,
        result=0,
    )


@pytest.mark.parametrize("d", [768, 3072])
def bench_covariance_pair(row, timed: bool, dtype: torch.dtype, d: int) -> None:
    """The cross block of two models; torch: torch.mm of it, cast to float32."""
    n, d = size(timed, d)
    x, y = (activations(n, d, dtype, seed) for seed in (0, 1))
    moments = mk.Covariance(d, d)
    moments.update(x, y)
    error = over_bound(moments.covariance(), x, y)
    row(
        lambda: moments.update(x, y),
        cost=covariance.cost(n, d, dtype.itemsize, d),
        error=error,
        torch=lambda: torch.mm(x.float().T, y.float()),
        result=0,
    )


@pytest.mark.parametrize("ratio", [0, 100])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def bench_correlation(row, timed: bool, kind: str, ratio: int) -> None:
    """131072 rows of mean / standard deviation = ratio; error: over 1e-6."""
    n, d = (131_072, 256) if timed else (20_000, 24)
    x = activations(n, d, getattr(torch, kind), ratio=ratio)
    expected = exact_covariance(x, x)
    s = expected.diagonal().sqrt()
    expected /= torch.outer(s, s)
    moments = mk.Covariance(d)

    def call() -> Tensor:
        moments.update(x)
        return moments.correlation()

    error = float((call() - expected).abs().max()) / 1e-6
    row(
        call,
        cost=covariance.cost(n, d, x.itemsize),
        error=error,
        torch=lambda: torch.corrcoef(x.float().T),
    )


@pytest.mark.parametrize(("channels", "side"), [(64, 56), (256, 14), (512, 28), (2048, 7)])
def bench_covariance_maps(row, timed: bool, channels: int, side: int) -> None:
    """Maps of two models, as ResNet-50 makes them of 32 images, into accumulators that are there.

    torch: torch.mm of the full product of their channels, gathered as rows, as ZipIt forms it.
    """
    images, channels = (32, channels) if timed else (4, channels // 32)
    each = [
        activations(images * side**2, channels, torch.float32, seed)
        .view(images, side, side, channels)
        .movedim(-1, 1)
        .contiguous()
        for seed in (0, 1)
    ]
    xs = [x.movedim(1, -1) for x in each]
    rows = torch.cat(xs, -1).flatten(0, -2)
    moments = mk.Covariance(2 * channels)
    moments.update(xs)
    error = over_bound(moments.covariance(), rows, rows)

    def full() -> Tensor:
        features = torch.cat([x.transpose(0, 1).flatten(1) for x in each])
        return torch.mm(features, features.T)

    row(
        lambda: moments.update(xs),
        cost=covariance.cost(len(rows), 2 * channels, 4),
        error=error,
        torch=full,
        result=0,
    )
