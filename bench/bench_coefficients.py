"""Gradients by the coefficients of a merge, and a step of a search for them (AdaMerging): eight
models of the blocks of a ViT-B, beside FusionBench's wrapper on the same models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mergekern as mk
from mergekern.ops import coefficient_gradients, merge_deltas
from mergekern.ops._cost import Cost

from inputs import models, relative_error
from measure import peak_extra
from peers import Peers, _installed

TASKS = 8
TOKENS = 197


@pytest.mark.parametrize("n", [2, TASKS])
def bench_coefficient_gradients(row, dtype: torch.dtype, nbytes: int, n: int) -> None:
    base, xs = models(n, nbytes // 4, dtype)
    grad = torch.randn(base.numel(), generator=torch.Generator().manual_seed(9))
    parts = [zip(*(x.split(1 << 20) for x in (grad, x, base))) for x in xs]
    terms = [[g.double() * (x.double() - b.double()) for g, x, b in part] for part in parts]
    exact = torch.stack([sum(t.sum() for t in of) for of in terms])
    size = torch.stack([sum(t.abs().sum() for t in of) for of in terms])
    del terms
    bound = 2 * (grad.numel() + 2) * 2.0**-53 * size
    row(
        lambda: mk.coefficient_gradients(grad, xs, base=base),
        cost=coefficient_gradients.cost(n, base.numel(), dtype.itemsize, grad_itemsize=4),
        error=relative_error(mk.coefficient_gradients(grad, xs, base=base), exact, bound),
        torch=lambda: [torch.dot(grad, (x - base).float()) for x in xs],
    )


# ---- a search ----------------------------------------------------------------------------------


class Search:
    """Both sides of a search over the same models: `ours` and, if it is installed, `theirs`."""

    def __init__(self, blocks: int, width: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [
                nn.TransformerEncoderLayer(
                    width, width // 32, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(blocks)
            ]
            self.model = nn.Sequential(*layers)
            self.x = torch.randn(4, TOKENS, width)
        self.names = [name for name, _ in self.model.named_parameters()]
        g = torch.Generator().manual_seed(1)
        self.states = [
            {
                name: p.detach() + 1e-3 * torch.randn(p.shape, generator=g)
                for name, p in self.model.named_parameters()
            }
            for _ in range(TASKS)
        ]
        self.grads = [torch.randn(p.shape, generator=g) for p in self.model.parameters()]
        self.ours = mk.MergedModel(self.model, self.states)

    @property
    def cost(self) -> Cost:
        """A merge and a gradient: two reads of base and of all models, one of dL/dW, one write."""
        numel = sum(p.numel() for p in self.model.parameters())
        first = merge_deltas.cost(TASKS, numel, 4)
        second = coefficient_gradients.cost(TASKS, numel, 4)
        return Cost(first.bytes + second.bytes, first.flops + second.flops)

    def fusion_bench(self) -> Any:
        from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel

        tuned = [copy.deepcopy(self.model) for _ in self.states]
        for model, state in zip(tuned, self.states):
            model.load_state_dict(state)
        values = self.ours.coefficients.detach().clone()
        return LayerWiseMergedModel(values, copy.deepcopy(self.model), tuned)

    def error(self) -> float:
        """Of the gradients for given dL/dW, the bound and a rounding to float32 allowed."""
        self.ours.coefficients.grad = None
        self.merge()
        found = self.ours.coefficients.grad
        assert found is not None
        worst = 0.0
        for column, name in enumerate(self.names):
            grad, zero = self.grads[column].double(), self.model.get_parameter(name).detach()
            deltas = [d[name].double() - zero.double() for d in self.states]
            exact = torch.stack([(grad * d).sum() for d in deltas])
            size = torch.stack([(grad * d).abs().sum() for d in deltas])
            bound = 2 * (grad.numel() + 2) * 2.0**-53 * size + 2.0**-24 * exact.abs()
            worst = max(worst, relative_error(found[:, column], exact, bound))
        return worst

    def merge(self) -> None:
        """The merge alone, and its gradient."""
        with torch.no_grad():
            self.ours.coefficients.mul_(0.999)  # merged anew
        weights = self.ours.weights()
        torch.autograd.backward([weights[name] for name in self.names], self.grads)

    def step(self) -> None:
        with torch.no_grad():
            self.ours.coefficients.mul_(0.999)
        self.ours(self.x).square().mean().backward()

    def their_merge(self, theirs: Any) -> None:
        merged = theirs.merge_weights()
        torch.autograd.backward([merged[name] for name in self.names], self.grads)

    def their_step(self, theirs: Any) -> None:
        theirs.merge_weights()
        theirs(self.x).square().mean().backward()


@pytest.mark.parametrize("what", ["merge", "step"])
def bench_coefficient_search(row, benchmark: Any, timed: bool, what: str) -> None:
    """The merge with its gradient, and with the network on four images: 28 M float32 parameters,
    a third of a ViT-B. What FusionBench takes beside its models stands in a column of its own."""
    search = Search(4, 768) if timed else Search(1, 32)
    peers: Peers = {}
    cost = search.cost
    if what == "step":
        numel = sum(p.numel() for p in search.model.parameters())
        cost = cost._replace(flops=cost.flops + 6 * numel * search.x[..., 0].numel())
    if _installed("fusion_bench"):
        theirs = search.fusion_bench()
        call = {"merge": search.their_merge, "step": search.their_step}[what]
        peers = {"fusion_bench": (lambda: call(theirs), 1.0)}
    row(getattr(search, what), cost=cost, error=search.error(), torch=None, peers=peers)
    if timed and peers:
        benchmark.extra_info["fusion_bench_mb"] = _extra(lambda: call(theirs)) / 1e6


def _extra(call: Callable[[], None]) -> int:
    call()  # what a first call keeps, such as gradients, is no part of it
    return peak_extra(call) or 0
