"""Small networks of the kinds that are aligned."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_map

from mergekern.align.discover import discover_spaces
from mergekern.align.match import Match
from mergekern.align.spaces import Spaces

from accuracy import assert_bytes_equal, assert_within


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.a(x))
        return self.c(torch.tanh(self.b(x)))


class Residual(nn.Module):
    """Convolutions with BatchNorm and a stream that they add to; flattened into the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.norm3 = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6 * 4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.act(self.norm(self.stem(x)))
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        y = self.act(self.norm3(self.depthwise(self.act(y))))
        return {"logits": self.head(y.flatten(1)), "pooled": y.mean((1, 2, 3))}


class Attention(nn.Module):
    """A layer of a transformer: heads, fused qkv, tied embeddings, positions, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(1, 6, 8))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(8) for _ in range(3))
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.out = nn.Linear(8, 11)
        self.out.weight = self.embed.weight
        self.register_buffer("ids", torch.arange(6)[None])

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[:, self.ids[0, : tokens.shape[1]]]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        seen = mask[:, None, None, :] & torch.ones(6, 6, dtype=torch.bool, device=x.device).tril()
        y = functional.scaled_dot_product_attention(q, k, v, seen)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        x = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return self.out(self.norm3(x))


# ---- their spaces ----------------------------------------------------------------------------


class Case(NamedTuple):
    """A network and inputs for it."""

    network: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    outputs: str = "fixed"

    def model(self, seed: int) -> nn.Module:
        """In eval mode, with statistics of BatchNorm that are not those of a new one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.network()
            for name, x in model.state_dict().items():
                if x.is_floating_point():
                    x.copy_(torch.rand_like(x) + 0.5 if "var" in name else torch.randn_like(x))
        return model.eval()

    def traced(self, dtype: torch.dtype) -> Spaces:
        """The spaces of all its models; traced once, which takes longer than a test."""
        return _traced(self, dtype)


@functools.cache
def _traced(case: Case, dtype: torch.dtype) -> Spaces:
    return discover_spaces(
        case.model(0).to(dtype), cast(case.inputs(0), dtype), outputs=case.outputs
    )


def one_to_one(size: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + size)[:, None]


def tokens(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (5, 1), generator=generator)
    return {
        "tokens": torch.randint(0, 11, (5, 6), generator=generator),
        "mask": torch.arange(6) < lengths,
    }


def normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "mlp": Case(Mlp, normal(7, 5)),
    "residual": Case(Residual, normal(7, 3, 4, 4)),
    "attention": Case(Attention, tokens),
}


# ---- several models --------------------------------------------------------------------------


def planted(case: Case, n: int, dtype: torch.dtype = torch.float64) -> tuple[list, Match, Any]:
    """A model and n - 1 reorderings of it, the match that undoes them, and inputs."""
    models, match = reordered(case.model(0).to(dtype), case.traced(dtype), n)
    return models, match, cast(case.inputs(0), dtype)


def reordered(first: nn.Module, spaces: Spaces, n: int) -> tuple[list, Match]:
    """`first` and n - 1 models with its features in another order, and what undoes that."""
    models = [first]
    labels = {name: [torch.arange(s.size)] for name, s in spaces.movable.items()}
    for seed in range(1, n):
        moved = spaces.random(seed)
        other = copy.deepcopy(first)
        other.load_state_dict(spaces.permuted(moved, first.state_dict()))
        models.append(other)
        for name, vectors in labels.items():
            vectors.append(moved[name])
    return models, Match(spaces, labels, "permute")


def unrelated(case: Case, n: int) -> tuple[list[nn.Module], Spaces, Any]:
    """n models of their own, in float64."""
    models, inputs = [case.model(i).double() for i in range(n)], cast(case.inputs(0), torch.float64)
    return models, case.traced(torch.float64), inputs


def random_labels(size: int, n: int, seed: int) -> list[Tensor]:
    """Of n models: any feature to any merged one, each of which has at least one."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.cat(
        [torch.arange(size), torch.randint(size, (size * (n - 1),), generator=generator)]
    )
    return list(flat[torch.randperm(len(flat), generator=generator)].view(n, size))


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )


@torch.no_grad()
def run(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def assert_same_output(got: Any, expected: Any) -> None:
    """Sums in another order: |got - expected| <= sqrt(u) max |expected|, as Spaces.verify has it.

    A wrong feature is wrong by the order of the output.
    """
    ours, theirs = tree_flatten(got), tree_flatten(expected)
    assert ours[1] == theirs[1]
    for x, y in zip(ours[0], theirs[0], strict=True):
        bound = torch.finfo(y.dtype).eps ** 0.5 * y.double().abs().max()
        assert_within(x, y.double(), bound)


def assert_bytes_of_output(got: Any, expected: Any) -> None:
    ours, theirs = tree_flatten(got), tree_flatten(expected)
    assert ours[1] == theirs[1]
    for x, y in zip(ours[0], theirs[0], strict=True):
        assert_bytes_equal(x, y)
