"""Second moments of what goes into linear layers: each layer counts what it reads, once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mergekern as mk
from mergekern.align.input_moments import InputMoments

from accuracy import assert_within


class Reads(nn.Module):
    """Layers that share inputs in an order of their own."""

    def __init__(self, program: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        self.program(self, x)
        return x


def _in_place(m: nn.Module, x: Tensor) -> None:
    x = x.clone()
    m.a(x)
    x += 1
    m.b(x)


def _twice(m: nn.Module, x: Tensor) -> None:
    m.a(x)
    m.b(x)
    m.a(x)
    m.a(2 * x)


def _by_size(m: nn.Module, x: Tensor) -> None:
    for layer in (m.a, m.b, m.c) if len(x) > 5 else (m.a, m.c):
        layer(x)
    m.b(-x)


def _named(m: nn.Module, x: Tensor) -> None:
    m.a(input=x)
    m.b(x)
    m.c(x.clone())


@pytest.mark.parametrize("program", [_in_place, _twice, _by_size, _named])
def test_every_layer_counts_what_it_reads(
    program: Callable[[nn.Module, Tensor], None],
) -> None:
    torch.manual_seed(0)
    model = Reads(program).double()
    batches = [torch.randn(n, 3).double() for n in (4, 9, 5)]
    moments = InputMoments("models[0]", "error", "auto")
    layers = {name: [layer] for name, layer in model.named_children()}
    seen: dict[str, list[Tensor]] = {}
    for name, layer in model.named_children():
        layer.register_forward_pre_hook(
            lambda _, a, k, name=name: seen.setdefault(name, []).append(
                (a[0] if a else k["input"]).clone()
            ),
            with_kwargs=True,
        )
    with torch.no_grad(), moments.watching(layers):
        for x in batches:
            model(x)
    found = {name: c for names, c in moments.groups() for name in names}
    assert sorted(found) == sorted(seen)
    assert sum(len(names) for names, _ in moments.groups()) == len(seen)
    for name, xs in seen.items():
        x = torch.cat(xs)
        assert found[name].count == len(x)
        bound = 500 * 2.0**-53 * torch.outer(*[x.abs().amax(0)] * 2)
        assert_within(found[name].second_moment(), x.T @ x / len(x), bound)


def test_second_moments_are_not_centred() -> None:
    """By the bound of the docstring, of both sides and of one."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 6, generator=g) + torch.tensor([0.0, 1, 10, 100, -5, 0.1])
    for y in (None, x[:, :2]):
        moments = mk.Covariance(6, None if y is None else 2)
        moments.update(x, y)
        other = x if y is None else y
        u, s, a = 2.0**-24, x.double().std(0), x.double().abs().amax(0)
        k = other.shape[1]
        bound = 264 * u * torch.outer(s, s[:k]) + (6 * 3000 + 140) * 2.0**-53 * torch.outer(
            a, a[:k]
        )
        assert_within(moments.second_moment(), x.double().T @ other.double() / 3000, bound)
