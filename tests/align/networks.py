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

from mergekern.align.match import Match
from mergekern.align.program import Program
from mergekern.align.spaces import Place, Space, Spaces

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
    """A network, inputs for it, and its spaces."""

    network: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    spaces: Callable[[nn.Module, Any], Spaces]

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
    return case.spaces(case.model(0).to(dtype), cast(case.inputs(0), dtype))


def one_to_one(size: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + size)[:, None]


def places(role_axis_names: str, positions: Tensor) -> list[Place]:
    """Of "produces 0 a.weight, rides 0 a.bias, ...", all with the same positions."""
    given = [entry.split() for entry in role_axis_names.split(", ")]
    return [Place(name, int(axis), positions, role) for role, axis, name in given]


def norm(name: str) -> str:
    entries = ("weight", "bias", "running_mean", "running_var")
    return ", ".join(f"rides 0 {name}.{entry}" for entry in entries)


def carried(**nodes: str) -> dict[str, list[tuple[str, tuple[int, ...], Tensor]]]:
    """node="space size axes" -> its layout."""
    found = {}
    for node, text in nodes.items():
        space, size, *axes = text.split()
        found[node] = [(space, tuple(map(int, axes)), one_to_one(int(size)))]
    return found


def mlp_spaces(model: nn.Module, inputs: Any) -> Spaces:
    a, b = one_to_one(8), one_to_one(6)
    spaces = [
        Space("a", 8, (*places("produces 0 a.weight, rides 0 a.bias, consumes 1 b.weight", a),)),
        Space("b", 6, (*places("produces 0 b.weight, rides 0 b.bias, consumes 1 c.weight", b),)),
        Space(
            "out", 3, (*places("produces 0 c.weight, rides 0 c.bias", one_to_one(3)),), fixed="o"
        ),
    ]
    layout = carried(linear="a 8 1", relu="a 8 1", linear_1="b 6 1", tanh="b 6 1")
    return Spaces(spaces, Program(model, inputs, "test"), layout)


def residual_spaces(model: nn.Module, inputs: Any) -> Spaces:
    stream, inner = one_to_one(6), one_to_one(8)
    pixels = torch.arange(24).view(6, 4)
    text = (
        f"produces 0 stem.weight, {norm('norm')}, consumes 1 conv1.weight, produces 0 conv2.weight"
    )
    text += f", {norm('norm2')}, rides 0 depthwise.weight, rides 0 depthwise.bias, {norm('norm3')}"
    head = Place("head.weight", 1, pixels, "consumes")
    text1 = f"produces 0 conv1.weight, {norm('norm1')}, consumes 1 conv2.weight"
    spaces = [
        Space("stream", 6, (*places(text, stream), head)),
        Space("inner", 8, (*places(text1, inner),)),
    ]
    streams = (
        "conv2d batch_norm relu_ conv2d_2 batch_norm_2 add_ relu__2 conv2d_3 batch_norm_3 relu__3"
    )
    layout = carried(
        **dict.fromkeys(streams.split(), "stream 6 1"),
        **dict.fromkeys(("conv2d_1", "batch_norm_1", "relu__1"), "inner 8 1"),
    )
    layout["flatten"] = [("stream", (1,), pixels)]
    return Spaces(spaces, Program(model, inputs, "test"), layout)


def attention_spaces(model: nn.Module, inputs: Any) -> Spaces:
    stream, inner = one_to_one(8), one_to_one(12)
    text = "both 1 embed.weight, both 1 out.weight, rides 2 position, consumes 1 qkv.weight"
    text += ", produces 0 proj.weight, rides 0 proj.bias, consumes 1 fc1.weight"
    text += ", produces 0 fc2.weight, rides 0 fc2.bias"
    for name in ("norm1", "norm2", "norm3"):
        text += f", rides 0 {name}.weight, rides 0 {name}.bias"
    qk, v = torch.stack([torch.arange(8), torch.arange(8, 16)], 1), one_to_one(8, 16)
    qkv = "produces 0 qkv.weight, rides 0 qkv.bias"
    proj = Place("proj.weight", 1, one_to_one(8), "consumes")
    text1 = "produces 0 fc1.weight, rides 0 fc1.bias, consumes 1 fc2.weight"
    spaces = [
        Space("stream", 8, (*places(text, stream),), approximate="LayerNorm"),
        Space("qk", 8, (*places(qkv, qk),), heads=2, group="heads", approximate="softmax"),
        Space("v", 8, (*places(qkv, v), proj), heads=2, group="heads"),
        Space("inner", 12, (*places(text1, inner),), approximate="gelu"),
    ]
    streams = (
        "embedding index add layer_norm linear_1 add_1 layer_norm_1 linear_3 add_2 layer_norm_2"
    )
    layout = carried(
        **dict.fromkeys(streams.split(), "stream 8 2"),
        **dict.fromkeys(("getitem", "getitem_1"), "qk 8 1 3"),
        **dict.fromkeys(("getitem_2", "scaled_dot_product_attention"), "v 8 1 3"),
        **dict.fromkeys(("linear_2", "gelu"), "inner 12 2"),
        transpose="v 8 2 3",
        flatten="v 8 2",
    )
    layout["linear"] = [("qk", (2,), qk), ("v", (2,), v)]
    layout["unflatten"] = [("qk", (2, 3, 4), qk), ("v", (2, 3, 4), v)]
    layout["permute"] = [("qk", (0, 2, 4), qk), ("v", (0, 2, 4), v)]
    return Spaces(spaces, Program(model, inputs, "test"), layout)


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
    "mlp": Case(Mlp, normal(7, 5), mlp_spaces),
    "residual": Case(Residual, normal(7, 3, 4, 4), residual_spaces),
    "attention": Case(Attention, tokens, attention_spaces),
}


# ---- several models --------------------------------------------------------------------------


def planted(case: Case, n: int, dtype: torch.dtype = torch.float64) -> tuple[list, Match, Any]:
    """A model and n - 1 reorderings of it, the match that undoes them, and inputs."""
    first, inputs = case.model(0).to(dtype), cast(case.inputs(0), dtype)
    spaces = case.traced(dtype)
    models = [first]
    labels = {name: [torch.arange(s.size)] for name, s in spaces.movable.items()}
    for seed in range(1, n):
        moved = spaces.random(seed)
        other = copy.deepcopy(first)
        other.load_state_dict(spaces.permuted(moved, first.state_dict()))
        models.append(other)
        for name, vectors in labels.items():
            vectors.append(moved[name])
    return models, Match(spaces, labels, "permute", {}), inputs


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
    return tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)


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
