"""Task vectors: task arithmetic, TIES (threshold passes and all) and DARE."""

from __future__ import annotations

import torch

import mergekern as mk
from mergekern.keep import Bernoulli
from mergekern.ops._cost import Cost
from mergekern.ops.merge_deltas import cost

import exact
from inputs import CHECKED, models
from peers import SORT_ELEMENTS, mergekit, peft_ties, torch_ties

N, DENSITY = 3, 0.2


def _two_reads(numel: int, itemsize: int) -> Cost:
    """A threshold needs every value before the first can be kept: inputs are read twice."""
    once = cost(N, numel, itemsize)
    return once._replace(bytes=once.bytes + (N + 1) * numel * itemsize)


def bench_task_arithmetic(row, dtype: torch.dtype, nbytes: int) -> None:
    base, xs = models(N, nbytes, dtype)
    out = torch.zeros_like(base)

    def call() -> torch.Tensor:
        return mk.merge_deltas(base, xs, [0.3] * N, out=out)

    first = exact.task_arithmetic(base[:CHECKED], [x[:CHECKED] for x in xs], 0.3)
    row(
        call,
        cost=cost(N, base.numel(), dtype.itemsize),
        error=first.error(call()[:CHECKED], N),
        torch=lambda: base + sum(0.3 * (x - base) for x in xs),
        peers=mergekit("task_arithmetic", xs, base, weight=0.3),
    )


def bench_ties(row, dtype: torch.dtype, nbytes: int) -> None:
    base, xs = models(N, nbytes, dtype)
    out = torch.zeros_like(base)
    k = int(DENSITY * base.numel())

    def call() -> torch.Tensor:
        keep = [mk.kth_magnitude(x, k, base=base) for x in xs]
        return mk.merge_deltas(base, xs, [1.0] * N, keep=keep, elect="sum", normalize=True, out=out)

    error = _ties_error(call(), base, xs, k)
    row(
        call,
        cost=_two_reads(base.numel(), dtype.itemsize),
        error=error,
        peers={
            **mergekit("ties", xs, base, elements=SORT_ELEMENTS, weight=1.0, density=DENSITY),
            **peft_ties(base, xs, DENSITY),
            **torch_ties(base, xs, DENSITY),
        },
    )


def _ties_error(got: torch.Tensor, base: torch.Tensor, xs: list[torch.Tensor], k: int) -> float:
    """Against float64 on the first elements, thresholds by torch.topk of the whole tensor."""
    kept = []
    for x in xs:
        d = x.float() - base.float()
        threshold = d.abs().topk(k).values[-1]
        first = d[:CHECKED].double()
        # The lowest indices win ties; at most k in all are equal, so the first ones are kept.
        kept.append(torch.where(first.abs() >= threshold, first, 0))
    return exact.elected(base[:CHECKED], torch.stack(kept)).error(got[:CHECKED], N)


def bench_dare_ties(row, dtype: torch.dtype, nbytes: int) -> None:
    base, xs = models(N, nbytes, dtype)
    out = torch.zeros_like(base)
    keep = [Bernoulli(0.3, 0, "bench", i) for i in range(N)]

    def call() -> torch.Tensor:
        return mk.merge_deltas(
            base, xs, [1.0] * N, keep=keep, rescale="density", elect="sum", out=out
        )

    call()
    part = slice(0, CHECKED)
    again = mk.merge_deltas(
        base[part],
        [x[part] for x in xs],
        [1.0] * N,
        keep=keep,
        rescale="density",
        elect="sum",
        backend="torch",
    )
    row(
        call,
        cost=cost(N, base.numel(), dtype.itemsize),
        error=0.0 if torch.equal(again, out[part]) else float("inf"),
        peers=mergekit("dare_ties", xs, base, weight=1.0, density=0.3),
    )
