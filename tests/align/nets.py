"""Small networks of each kind, and their spaces written down by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekern.align.program import Program
from mergekern.align.spaces import Place, Probe, Space, Spaces


def each(size: int, start: int = 0) -> Tensor:
    """Positions of features with one entry each."""
    return torch.arange(start, start + size)[:, None]


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """With random tensors, buffers included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return model


class Mlp(nn.Module):
    """Two hidden layers, of 8 and 6 features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


@functools.cache
def mlp_spaces() -> Spaces:
    def space(name: str, size: int, maker: str, user: str, node: str) -> Space:
        places = (
            Place(f"{maker}.weight", 0, each(size), "produces"),
            Place(f"{maker}.bias", 0, each(size), "rides"),
            Place(f"{user}.weight", 1, each(size), "consumes"),
        )
        return Space(name, size, places, (Probe(node, 0, (-1,), each(size), user),))

    spaces = [
        space("one", 8, "fc1", "fc2", "linear_1"),
        space("two", 6, "fc2", "fc3", "linear_2"),
    ]
    return Spaces(spaces, Program(Mlp(), torch.zeros(2, 5), "spaces"))


class Convs(nn.Module):
    """A residual stream of 4 channels, one block of 6, and a head on 2 x 2 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x)), inplace=True)
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(y)) + x)
        return self.fc(functional.avg_pool2d(x, 2).flatten(1))


@functools.cache
def convs_spaces() -> Spaces:
    def norm(name: str, size: int) -> list[Place]:
        parts = ("weight", "bias", "running_mean", "running_var")
        return [Place(f"{name}.{part}", 0, each(size), "rides") for part in parts]

    flat = torch.arange(16).view(4, 4)
    stream = [
        Place("stem.weight", 0, each(4), "produces"),
        Place("stem.bias", 0, each(4), "rides"),
        *norm("bn", 4),
        Place("conv1.weight", 1, each(4), "consumes"),
        Place("conv2.weight", 0, each(4), "produces"),
        *norm("bn2", 4),
        Place("fc.weight", 1, flat, "consumes"),
    ]
    inner = [
        Place("conv1.weight", 0, each(6), "produces"),
        *norm("bn1", 6),
        Place("conv2.weight", 1, each(6), "consumes"),
    ]
    probes = (
        Probe("conv2d_1", 0, (1,), each(4), "conv1"),
        Probe("linear", 0, (1,), flat, "fc"),
    )
    spaces = [
        Space("stream", 4, tuple(stream), probes),
        Space("inner", 6, tuple(inner), (Probe("conv2d_2", 0, (1,), each(6), "conv2"),)),
    ]
    return Spaces(spaces, Program(Convs(), torch.zeros(2, 3, 4, 4), "spaces"))


class Attention(nn.Module):
    """Tokens of 6 features, 3 heads of 4; q, k and v in one tensor; a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.qkv, self.out, self.fc = nn.Linear(6, 36), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        heads = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        score = torch.matmul(q, k.transpose(-1, -2))
        if attention_mask is not None:
            score = score + (1.0 - attention_mask[:, None, None].to(score)) * -1e4
        y = torch.matmul(score.softmax(-1), v).transpose(1, 2).flatten(2)
        return self.fc((x + self.out(y)).mean(1))


@functools.cache
def attention_spaces(*, inside: str | None = None, masked: bool = False) -> Spaces:
    def rows(start: int) -> list[Place]:
        positions = each(12, start)
        return [
            Place("qkv.weight", 0, positions, "produces"),
            Place("qkv.bias", 0, positions, "rides"),
        ]

    example = torch.zeros(2, 7, 5)
    marks = {"attention_mask": torch.ones(2, 7)} if masked else {}
    program = Program(Attention(), {"x": example, **marks}, "spaces")
    nodes = [n.name for n in program.graph.nodes if n.op == "call_function"]
    first, second = [n for n in nodes if n.startswith("matmul")]
    turned = next(n for n in nodes if n.startswith("transpose"))  # of the keys
    stream = [
        Place("embed.weight", 0, each(6), "produces"),
        Place("embed.bias", 0, each(6), "rides"),
        Place("qkv.weight", 1, each(6), "consumes"),
        Place("out.weight", 0, each(6), "produces"),
        Place("out.bias", 0, each(6), "rides"),
        Place("fc.weight", 1, each(6), "consumes"),
    ]
    spaces = [
        Space("stream", 6, tuple(stream), (Probe("linear_1", 0, (2,), each(6), "qkv"),)),
        Space(
            "keys",
            12,
            (*rows(0), *rows(12)),
            (
                Probe(turned, 0, (1, 3), each(12), ""),
                Probe(first, 0, (1, 3), each(12), ""),
            ),
            heads=3,
            group="attention",
            inside=inside,
        ),
        Space(
            "values",
            12,
            (*rows(24), Place("out.weight", 1, each(12), "consumes")),
            (Probe(second, 1, (1, 3), each(12), ""),),
            heads=3,
            group="attention",
        ),
    ]
    return Spaces(spaces, program)
