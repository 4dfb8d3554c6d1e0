"""WUDI on one matrix: a step, which does not depend on the number of tasks, and set-up with it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from mergekern.methods import REGISTRY, Inputs
from mergekern.methods.wudi import PERIOD, descend, quadratic
from mergekern.ops._cost import Cost

import peers

SHAPES = [pytest.param(s, id=f"{s[0]}x{s[1]}") for s in ((768, 768), (3072, 768), (768, 3072))]


def task_vectors(timed: bool, shape: tuple[int, int], n: int) -> list[Tensor]:
    out, into = shape if timed else (shape[0] // 32, shape[1] // 32)
    g = torch.Generator().manual_seed(0)
    return [1e-3 * torch.randn(out, into, generator=g) for _ in range(n)]


def inputs_of(taus: list[Tensor]) -> Inputs:
    return Inputs(taus, torch.zeros_like(taus[0]), "w", 0, torch.float32, "auto")


def cost(taus: list[Tensor], steps: int, setup: bool) -> Cost:
    """A product a step, one of twice the price every PERIOD, and to begin with four for a task.

    Bytes: a step reads and writes the gradient, D and two moments, and reads R.
    """
    out, into = taus[0].shape
    products = steps + 2 * -(-steps // PERIOD) + (4 * len(taus) if setup else 0)
    return Cost(steps * 9 * out * into * 4, products * 2 * out * into * into)


def over_promise(got: Tensor, taus: list[Tensor], steps: int) -> float:
    """The distance to Adam on W G - C in float64, over 1e-6 of it."""
    wide = [t.double() for t in taus]
    grams = [t.T @ t / t.square().sum() for t in wide]
    gram, right = sum(grams), sum(t @ g for t, g in zip(wide, grams))
    w = sum(wide).requires_grad_()
    adam = torch.optim.Adam([w], lr=1e-5)
    for _ in range(steps):
        w.grad = 2 * (w.detach() @ gram - right)
        adam.step()
    exact = w.detach()
    return float((got.double() - exact).norm() / exact.norm()) / 1e-6


@pytest.fixture(autouse=True)
def _silence() -> None:
    logging.getLogger("fusion_bench").setLevel(logging.WARNING)  # it tells when it has begun


@pytest.mark.parametrize("n", [2, 4, 8, 16])
@pytest.mark.parametrize("shape", SHAPES[:2])
def bench_wudi_steps(row, timed: bool, shape: tuple[int, int], n: int) -> None:
    """20 steps, after the set-up."""
    taus = task_vectors(timed, shape, n)
    q = quadratic("wudi", inputs_of(taus))
    fresh = [x.clone() for x in q]
    descend(q, PERIOD, 1e-5, torch.float32)
    error = over_promise(q.total, taus, PERIOD)

    def call() -> None:
        for x, at in zip(q, fresh, strict=True):
            x.copy_(at)
        descend(q, PERIOD, 1e-5, torch.float32)

    row(call, cost=cost(taus, PERIOD, False), error=error)


@pytest.mark.parametrize("shape", SHAPES)
def bench_wudi(row, timed: bool, shape: tuple[int, int]) -> None:
    """Eight tasks, the set-up and 20 of the 300 steps."""
    taus = task_vectors(timed, shape, 8)
    method, inputs = REGISTRY["wudi"], inputs_of(taus)
    given = method.arguments({"steps": PERIOD}, 8)
    error = over_promise(method.merge(inputs, **given), taus, PERIOD)
    row(
        lambda: method.merge(inputs, **given),
        cost=cost(taus, PERIOD, True),
        error=error,
        result=4 * taus[0].numel() + method.scratch(given, taus[0].shape),
        peers=peers.fusion_bench_wudi(taus, 1, 1 / PERIOD),
    )
