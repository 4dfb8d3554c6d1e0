"""Task vectors: task arithmetic, TIES (threshold passes and all) and DARE."""

from __future__ import annotations

import torch

import mergekern as mk
from mergekern.keep import Bernoulli
from mergekern.ops._cost import Cost
from mergekern.ops.merge_deltas import cost

from inputs import CHECKED, half_unit, models, relative_error
from peers import mergekit, peft_ties

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

    deltas = torch.stack([x[:CHECKED].double() - base[:CHECKED].double() for x in xs])
    exact = base[:CHECKED].double() + 0.3 * deltas.sum(0)
    steps = deltas.abs().sum(0) + exact.abs()
    bound = 2 * (N + 3) * 2.0**-24 * steps + half_unit(exact, dtype)
    row(
        call,
        cost=cost(N, base.numel(), dtype.itemsize),
        error=relative_error(call()[:CHECKED], exact, bound),
        torch=lambda: base + sum(0.3 * (x - base) for x in xs),
        peers=mergekit("task_arithmetic", xs, base, weight=0.3),
    )


def _torch_ties(base: torch.Tensor, xs: list[torch.Tensor]) -> torch.Tensor:
    """TIES as one writes it in torch: top-k by sort, stacked masks."""
    k = int(DENSITY * base.numel())
    kept = []
    for x in xs:
        d = x - base
        threshold = d.abs().sort().values[-k]
        kept.append(torch.where(d.abs() >= threshold, d, 0))
    stack = torch.stack(kept)
    agree = torch.sign(stack) == torch.where(stack.sum(0) >= 0, 1, -1)
    return base + (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def bench_ties(row, dtype: torch.dtype, nbytes: int) -> None:
    base, xs = models(N, nbytes, dtype)
    out = torch.zeros_like(base)
    k = int(DENSITY * base.numel())

    def call() -> torch.Tensor:
        keep = [mk.kth_magnitude(x, k, base=base) for x in xs]
        return mk.merge_deltas(base, xs, [1.0] * N, keep=keep, elect="sum", normalize=True, out=out)

    error = _ties_error(call(), base, xs, k, dtype)
    small = slice(0, 1 << 22)
    row(
        call,
        cost=_two_reads(base.numel(), dtype.itemsize),
        error=error,
        peers={
            **mergekit("ties", xs, base, weight=1.0, density=DENSITY),
            **peft_ties([x - base for x in xs], DENSITY),
            "torch": (
                lambda: _torch_ties(base[small], [x[small] for x in xs]),
                min(1.0, (1 << 22) / base.numel()),
            ),
        },
    )


def _ties_error(
    got: torch.Tensor, base: torch.Tensor, xs: list[torch.Tensor], k: int, dtype: torch.dtype
) -> float:
    """Against float64 on the first elements, thresholds by torch.topk of the whole tensor."""
    b = base[:CHECKED].double()
    kept = []
    for x in xs:
        d = x.float() - base.float()
        threshold = d.abs().topk(k).values[-1]
        first = d[:CHECKED].double()
        # The lowest indices win ties; at most k in all are equal, so the first ones are kept.
        kept.append(torch.where(first.abs() >= threshold, first, 0))
    s = torch.stack(kept)
    agree = torch.where(s.sum(0) >= 0, s > 0, s < 0)
    exact = b + torch.where(agree, s, 0).sum(0) / agree.sum(0).clamp(min=1)
    steps = s.abs().sum(0) + exact.abs()
    clear = s.sum(0).abs() > 1e-5 * s.abs().sum(0)  # elections that rounding cannot turn
    clear |= s.abs().sum(0) == 0
    bound = 2 * (N + 4) * 2.0**-24 * steps + half_unit(exact, dtype)
    return relative_error(got[:CHECKED][clear], exact[clear], bound[clear])


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
