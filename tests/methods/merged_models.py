"""Networks and their fine-tuned copies, and what MergedModel's gradients are by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mergekern as mk
from mergekern import reference

States = list[dict[str, Tensor]]


class Net(nn.Module):
    """A buffer, a scalar, a tensor that forward does not use; a module and a weight shared."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.norm = nn.BatchNorm1d(9)
        self.last = nn.Linear(9, 6, bias=False)
        self.again = self.last
        self.tied = nn.Linear(9, 6)
        self.tied.weight = self.last.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
        y = self.again(torch.tanh(self.norm(self.first(x))))
        return self.last(y @ self.tied.weight) + times * self.scale * self.tied(self.first(x))


class Probe(nn.Module):
    """sum_k <parameter_k, direction_k>: linear, so that dL/dW does not depend on W."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Conv1d(3, 5, 7))
        g = torch.Generator().manual_seed(7)
        self.directions = [torch.randn(p.shape, generator=g) for p in self.net.parameters()]

    def forward(self) -> Tensor:
        return sum(((p * d).sum() for p, d in zip(self.net.parameters(), self.directions)), X[0])


X = torch.zeros(3)


def tuned(model: nn.Module, n: int = 3, dtype: torch.dtype | None = None) -> States:
    g = torch.Generator().manual_seed(3)
    found = []
    for _ in range(n):
        found.append(
            {
                name: (p.detach() + 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)).to(
                    dtype or p.dtype
                )
                for name, p in model.named_parameters()
            }
        )
    return found


def built(seed: int = 0, **options: Any) -> tuple[mk.MergedModel, nn.Module, States]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net()
    states = tuned(model)
    return mk.MergedModel(model, states, **options), model, states


def batch(seed: int = 1) -> Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))


def columns(model: mk.MergedModel, name: str) -> Tensor:
    return model.coefficients.detach()[:, model.layers.index(model._layer_of[name])]


VALUES = torch.tensor([0.7, -0.4, 1.3])


def exact_gradients(
    merged: mk.MergedModel, model: nn.Module, states: States, by_weight: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """dL/dc from dL/dW, before the constraint, and the bound of the docstring."""
    shape = merged.coefficients.shape
    found, bound = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    for name, base in model.named_parameters():
        if name not in by_weight:
            continue
        grad, xs = by_weight[name], [d[name] for d in states]
        column = merged.layers.index(merged._layer_of[name])
        one, size = torch.empty(shape[0]).double(), torch.empty(shape[0]).double()
        reference.coefficient_gradients(one, grad, xs, base.detach())
        deltas = [(x.double() - base.detach().double()).abs() for x in xs]
        reference.coefficient_gradients(size, grad.abs(), deltas, None)
        found[:, column] += one
        bound[:, column] += 2 * (grad.numel() + 2 + len(by_weight)) * 2.0**-53 * size
    return found, bound
