"""zip_match: pairs of models, and the layers of a whole model side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.ops.zip_match import cost

import zipit
from measure import Call

pytestmark = pytest.mark.alignment

THEIRS = 512  # features of a model up to which ZipIt's own code is waited for


def correlation(size: int, models: int = 2, seed: int = 0) -> Tensor:
    """Of features that have noisy counterparts in the other models, in another order."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(size, 64, generator=g)
    rows = [shared[torch.randperm(size, generator=g)] for _ in range(models)]
    rows = [f + 0.7 * torch.randn(f.shape, generator=g) for f in rows]
    f = torch.nn.functional.normalize(torch.cat(rows), dim=1)
    x = f @ f.T
    return torch.minimum(x, x.T)


def zipit_peer(x: Tensor, size: int) -> dict[str, tuple[Call, float]]:
    """Their code with all threads and with one, as which small matrices are faster."""
    if not zipit.AT_HAND or size > THEIRS:
        return {}
    match = zipit.match_tensors_zipit()

    def alone() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        zipit.labels(match, x, 2, 0.3, 0.125)
        torch.set_num_threads(threads)

    return {
        "zipit": (lambda: zipit.labels(match, x, 2, 0.3, 0.125), 1.0),
        "zipit_1": (alone, 1.0),
    }


def same(labels: Tensor, x: Tensor, size: int) -> bool:
    """As ZipIt where it is at hand and quick, else as the torch backend where that is."""
    if zipit_peer(x, size):
        theirs = zipit.labels(zipit.match_tensors_zipit(), x, 2, 0.3, 0.125)
        return torch.equal(labels, theirs)
    if size <= 2 * THEIRS:
        return torch.equal(labels, mk.zip_match(x, [size, size], backend="torch"))
    return torch.equal(labels.unique(), torch.arange(size))


@pytest.mark.parametrize("size", [128, 512, 4096])
def bench_zip_match(row, timed: bool, size: int) -> None:
    size = size if timed else size // 32
    x = correlation(size)
    labels = mk.zip_match(x, [size, size])
    row(
        lambda: mk.zip_match(x, [size, size]),
        cost=cost(2 * size, size, x.itemsize),
        error=0.0 if same(labels, x, size) else float("inf"),
        result=4 * x.numel(),  # the copy it works on
        peers=zipit_peer(x, size) if timed else None,
    )


def bench_zip_match_layers(row, timed: bool) -> None:
    """The hidden features of 12 blocks, of pairs of a ViT-B's width by default."""
    size = 768 if timed else 16
    xs = [correlation(size, seed=i) for i in range(12)]
    sizes = [[size, size]] * len(xs)
    labels = mk.zip_match(xs, sizes)
    one = cost(2 * size, size, xs[0].itemsize)
    alone = [mk.zip_match(x, [size, size]) for x in xs]
    row(
        lambda: mk.zip_match(xs, sizes),
        cost=one._replace(bytes=12 * one.bytes, flops=12 * one.flops),
        error=0.0 if all(map(torch.equal, labels, alone)) else float("inf"),
    )
