"""Small networks, one for each construct that discovery must understand."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Case(NamedTuple):
    """A network, inputs for it, and what its movable spaces are: name -> (size, heads)."""

    model: nn.Module
    inputs: Tensor | tuple[Tensor, ...]
    movable: dict[str, tuple[int, int]]


class Net(nn.Module):
    """Modules by name, and a function of them."""

    def __init__(self, function, **modules: nn.Module | nn.Parameter) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def image(channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size)


def tokens(n: int = 5, d: int = 6) -> Tensor:
    return torch.randn(2, n, d)


def heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# ---- convolutions -------------------------------------------------------------------------------


def residual() -> Case:
    def run(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.bn(m.stem(x)))
        x = F.relu(x + m.bn2(m.b(F.relu(m.bn1(m.a(x))))))
        return m.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    model = Net(
        run,
        stem=nn.Conv2d(3, 6, 3, bias=False),
        bn=nn.BatchNorm2d(6),
        a=nn.Conv2d(6, 4, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(4),
        b=nn.Conv2d(4, 6, 3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(6),
        head=nn.Linear(6, 3),
    )
    return Case(model, image(), {"stem": (6, 1), "a": (4, 1)})


def padded_shortcut() -> Case:
    """A shortcut that pads channels with zeros: old channels and new ones are two spaces."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        y = m.b(F.relu(m.a(x)))
        return m.head((F.pad(x, (0, 0, 0, 0, 2, 2)) + y).mean((2, 3)))

    model = Net(
        run,
        stem=nn.Conv2d(3, 4, 3),
        a=nn.Conv2d(4, 5, 3, padding=1),
        b=nn.Conv2d(5, 8, 3, padding=1),
        head=nn.Linear(8, 3),
    )
    return Case(model, image(), {"stem": (4, 1), "a": (5, 1), "b": (4, 1)})


def flattened() -> Case:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.fc(F.max_pool2d(F.relu(m.conv(x)), 2).flatten(1))

    model = Net(run, conv=nn.Conv2d(3, 5, 3, padding=1), fc=nn.Linear(5 * 16, 3))
    return Case(model, image(), {"conv": (5, 1)})


def depthwise() -> Case:
    """ConvNeXt's block: depthwise, norm over channels last, MLP, a scale for each channel."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.norm(m.dw(x).permute(0, 2, 3, 1))
        y = (m.gamma * m.down(F.gelu(m.up(y)))).permute(0, 3, 1, 2)
        return m.head((x + y).mean((2, 3)))

    model = Net(
        run,
        stem=nn.Conv2d(3, 6, 2, 2),
        dw=nn.Conv2d(6, 6, 3, padding=1, groups=6),
        norm=nn.LayerNorm(6),
        up=nn.Linear(6, 9),
        down=nn.Linear(9, 6),
        gamma=weight(6),
        head=nn.Linear(6, 3),
    )
    return Case(model, image(), {"stem": (6, 1), "up": (9, 1)})


def multiplied() -> Case:
    """A depthwise convolution with two outputs a channel: they follow their channel."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(F.relu(m.dw(F.relu(m.stem(x)))).mean((2, 3)))

    model = Net(
        run,
        stem=nn.Conv2d(3, 4, 3),
        dw=nn.Conv2d(4, 8, 3, groups=4),
        head=nn.Linear(8, 3),
    )
    return Case(model, image(), {"stem": (4, 4), "dw": (8, 4)})


def grouped() -> Case:
    """Groups move as blocks; inputs keep their place in a group, outputs need not."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(F.relu(m.conv(F.relu(m.stem(x)))).mean((2, 3)))

    model = Net(
        run,
        stem=nn.Conv2d(3, 6, 3),
        conv=nn.Conv2d(6, 12, 3, groups=3),
        head=nn.Linear(12, 3),
    )
    return Case(model, image(), {"stem": (6, 3), "conv": (12, 3)})


def group_norm() -> Case:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(F.silu(m.norm(m.stem(x))).mean((2, 3)))

    model = Net(run, stem=nn.Conv2d(3, 6, 3), norm=nn.GroupNorm(2, 6), head=nn.Linear(6, 3))
    return Case(model, image(), {"stem": (6, 2)})


def squeeze_excitation() -> Case:
    def run(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        gate = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3))))))
        return m.head((x * gate[:, :, None, None]).mean((2, 3)))

    model = Net(
        run,
        stem=nn.Conv2d(3, 6, 3),
        down=nn.Linear(6, 4),
        up=nn.Linear(4, 6),
        head=nn.Linear(6, 3),
    )
    return Case(model, image(), {"stem": (6, 1), "down": (4, 1)})


def concatenated() -> Case:
    """DenseNet: channels of two layers side by side."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        both = torch.cat([x, F.relu(m.b(x))], 1)
        return m.head(m.c(both).relu_().mean((2, 3)))

    model = Net(
        run,
        a=nn.Conv2d(3, 4, 3),
        b=nn.Conv2d(4, 5, 3, padding=1),
        c=nn.Conv2d(9, 6, 1),
        head=nn.Linear(6, 3),
    )
    return Case(model, image(), {"a": (4, 1), "b": (5, 1), "c": (6, 1)})


def two_signs() -> Case:
    """CReLU: each channel twice."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(F.relu(torch.cat([x, -x], 1)).mean((2, 3)))

    model = Net(run, a=nn.Conv2d(3, 4, 3), head=nn.Linear(8, 3))
    return Case(model, image(), {"a": (4, 1)})


def two_halves() -> Case:
    """Halves that go through different functions do not mix, though one layer makes both."""

    def run(m: Net, x: Tensor) -> Tensor:
        a, b = m.a(x).chunk(2, -1)
        return m.head(torch.cat([torch.tanh(a), torch.sigmoid(b)], -1))

    model = Net(run, a=nn.Linear(6, 8), head=nn.Linear(8, 3))
    return Case(model, torch.randn(4, 6), {"a": (4, 1), "a[4:8]": (4, 1)})


def shuffled() -> Case:
    """ShuffleNet: half of the channels pass by, then both halves are dealt out."""

    def run(m: Net, x: Tensor) -> Tensor:
        a, b = F.relu(m.stem(x)).chunk(2, 1)
        x = F.channel_shuffle(torch.cat([a, F.relu(m.conv(b))], 1), 2)
        return m.head(x.mean((2, 3)))

    model = Net(run, stem=nn.Conv2d(3, 8, 3), conv=nn.Conv2d(4, 4, 1), head=nn.Linear(8, 3))
    return Case(model, image(), {"stem": (4, 1), "stem[4:8]": (4, 1), "conv": (4, 1)})


def upsampled() -> Case:
    def run(m: Net, x: Tensor) -> Tensor:
        x = F.interpolate(F.relu(m.down(x)), scale_factor=2, mode="bilinear")
        return m.head(F.relu(m.up(x)))

    model = Net(
        run,
        down=nn.Conv2d(3, 5, 2, 2),
        up=nn.ConvTranspose2d(5, 4, 2, 2),
        head=nn.Conv2d(4, 3, 1),
    )
    return Case(model, image(), {"down": (5, 1), "up": (4, 1)})


def constants() -> Case:
    """A mask that is no parameter, 1 for some features and 2 for others."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(F.relu(m.a(x)) * m.mask)

    model = Net(run, a=nn.Linear(6, 8), head=nn.Linear(8, 3))
    model.register_buffer("mask", torch.tensor([1.0, 2, 1, 2, 1, 2, 2, 2]), persistent=False)
    return Case(model, torch.randn(4, 6), {"a": (3, 1), "a[1:8]": (5, 1)})


# ---- transformers -------------------------------------------------------------------------------


def fused_qkv() -> Case:
    """A pre-norm ViT block: class token, positions, fused projection, LayerScale, MLP."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1) + m.position
        q, k, v = m.qkv(m.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + m.gamma * m.proj(merged(F.scaled_dot_product_attention(q, k, v)))
        x = x + m.fc2(F.gelu(m.fc1(m.norm2(x))))
        return m.head(m.norm(x)[:, 0])

    model = Net(
        run,
        patch=nn.Conv2d(3, 8, 4, 4),
        cls=weight(1, 1, 8),
        position=weight(1, 5, 8),
        norm1=nn.LayerNorm(8),
        qkv=nn.Linear(8, 24),
        proj=nn.Linear(8, 8),
        gamma=weight(8),
        norm2=nn.LayerNorm(8),
        fc1=nn.Linear(8, 12),
        fc2=nn.Linear(12, 8),
        norm=nn.LayerNorm(8),
        head=nn.Linear(8, 3),
    )
    movable = {"patch": (8, 1), "qkv": (8, 2), "qkv[16:24]": (8, 2), "fc1": (12, 1)}
    return Case(model, image(), movable)


def plain_attention() -> Case:
    """Attention by matmul and softmax, a bias for each head, heads in the order [B N H D]."""

    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (heads(f(x), 3) for f in (m.q, m.k, m.v))
        scores = (q @ k.transpose(-2, -1)) * 0.5 + m.bias[:, m.index]
        return m.out(merged(scores.softmax(-1) @ v))

    model = Net(
        run,
        q=nn.Linear(6, 6),
        k=nn.Linear(6, 6, bias=False),
        v=nn.Linear(6, 9),
        out=nn.Linear(9, 6),
        bias=weight(3, 9),
    )
    model.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5) + 4)
    return Case(model, tokens(), {"q": (6, 3), "v": (9, 3), "bias": (3, 3)})


def einsum_attention() -> Case:
    """Weights of three axes: heads and features of a head are axes of their own.

    An axis of a tensor has one order, so features of a head are in the same order in all heads.
    """

    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bnhd", x, w) for w in (m.q, m.k, m.v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
        return torch.einsum("bnhd,hdc->bnc", torch.einsum("bhnm,bmhd->bnhd", scores, v), m.out)

    model = Net(run, q=weight(6, 3, 2), k=weight(6, 3, 2), v=weight(6, 3, 4), out=weight(3, 4, 6))
    return Case(model, tokens(), {"q": (3, 1), "q[0:2]": (2, 1), "v": (4, 1)})


def grouped_queries() -> Case:
    """Four heads of queries for two of keys and values."""

    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2)
        return m.out(merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))

    model = Net(
        run,
        q=nn.Linear(6, 12),
        k=nn.Linear(6, 6),
        v=nn.Linear(6, 6),
        out=nn.Linear(12, 6),
    )
    return Case(model, tokens(), {"q": (6, 2), "v": (6, 2)})


def rotary() -> Case:
    """Pairs of features turn by constant angles: heads move, pairs do not."""

    def turned(x: Tensor, angle: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def run(m: Net, x: Tensor) -> Tensor:
        frequency = 1.0 / 10 ** (torch.arange(2, dtype=x.dtype) / 2)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequency.repeat(2)
        q, k = turned(heads(m.q(x), 3), angle), turned(heads(m.k(x), 3), angle)
        return m.out(merged(F.scaled_dot_product_attention(q, k, heads(m.v(x), 3))))

    model = Net(
        run,
        q=nn.Linear(6, 12),
        k=nn.Linear(6, 12),
        v=nn.Linear(6, 6),
        out=nn.Linear(6, 6),
    )
    return Case(model, tokens(), {"q": (6, 3), "v": (6, 3)})


def query_norm() -> Case:
    """A norm that all heads share: heads move, features of queries and keys do not."""

    def run(m: Net, x: Tensor) -> Tensor:
        q, k = m.norm_q(heads(m.q(x), 3)), m.norm_k(heads(m.k(x), 3))
        return m.out(merged(F.scaled_dot_product_attention(q, k, heads(m.v(x), 3))))

    model = Net(
        run,
        q=nn.Linear(6, 6),
        k=nn.Linear(6, 6),
        v=nn.Linear(6, 6),
        norm_q=nn.LayerNorm(2),
        norm_k=nn.LayerNorm(2),
        out=nn.Linear(6, 6),
    )
    return Case(model, tokens(), {"q": (6, 3), "v": (6, 3)})


def swiglu() -> Case:
    """Gate and value from one layer, halves of it tied."""

    def run(m: Net, x: Tensor) -> Tensor:
        gate, value = m.up(x).chunk(2, -1)
        return m.down(F.silu(gate) * value)

    model = Net(run, up=nn.Linear(6, 16), down=nn.Linear(8, 6))
    return Case(model, tokens(), {"up": (8, 1)})


def gated() -> Case:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.down(m.norm(F.silu(m.gate(x)) * m.up(x)))

    model = Net(
        run,
        gate=nn.Linear(6, 8),
        up=nn.Linear(6, 8, bias=False),
        norm=nn.RMSNorm(8),
        down=nn.Linear(8, 6),
    )
    return Case(model, tokens(), {"gate": (8, 1)})


def tied() -> Case:
    """A language model whose classifier is its embedding."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.embed(x) + m.position(torch.arange(x.shape[1]))
        return F.linear(m.norm(x + m.down(F.gelu(m.up(x)))), m.embed.weight)

    model = Net(
        run,
        embed=nn.Embedding(11, 6),
        position=nn.Embedding(5, 6),
        up=nn.Linear(6, 8),
        down=nn.Linear(8, 6),
        norm=nn.LayerNorm(6),
    )
    return Case(model, torch.randint(0, 11, (2, 5)), {"embed": (6, 1), "up": (8, 1)})


def torch_encoder() -> Case:
    """torch's own layer: one tensor for all projections, post-norm."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(m.layer(m.stem(x)))

    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = Net(run, stem=nn.Linear(6, 8), layer=layer, head=nn.Linear(8, 3))
    movable = {
        "stem": (8, 1),
        "layer.self_attn": (8, 2),
        "layer.self_attn[16:24]": (8, 2),
        "layer.linear1": (12, 1),
    }
    return Case(model, tokens(), movable)


def mixer() -> Case:
    """Layers over tokens as well as over channels."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.t2(F.gelu(m.t1(x.transpose(1, 2)))).transpose(1, 2)
        return m.head((x + m.c2(F.gelu(m.c1(x)))).mean(1))

    model = Net(
        run,
        stem=nn.Linear(6, 8),
        t1=nn.Linear(5, 7),
        t2=nn.Linear(7, 5),
        c1=nn.Linear(8, 9),
        c2=nn.Linear(9, 8),
        head=nn.Linear(8, 3),
    )
    return Case(model, tokens(), {"stem": (8, 1), "t1": (7, 1), "c1": (9, 1)})


def factored() -> Case:
    """A LoRA beside a weight: the product of two weights."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(F.relu(F.linear(x, m.base + m.b @ m.a)))

    model = Net(run, base=weight(8, 6), b=weight(8, 4), a=weight(4, 6), head=nn.Linear(8, 3))
    return Case(model, torch.randn(4, 6), {"base": (8, 1), "a": (4, 1)})


def learnt_query() -> Case:
    """Attention pooling: one learnt query for each image."""

    def run(m: Net, x: Tensor) -> Tensor:
        q = heads(m.query.expand(x.shape[0], -1, -1), 2)
        return m.out(merged(F.scaled_dot_product_attention(q, heads(m.k(x), 2), heads(m.v(x), 2))))

    model = Net(
        run, query=weight(1, 1, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), out=nn.Linear(8, 3)
    )
    return Case(model, tokens(), {"k": (8, 2), "v": (8, 2)})


CASES = {
    f.__name__: f
    for f in (
        residual,
        padded_shortcut,
        flattened,
        depthwise,
        multiplied,
        grouped,
        group_norm,
        squeeze_excitation,
        concatenated,
        two_signs,
        two_halves,
        shuffled,
        upsampled,
        constants,
        fused_qkv,
        plain_attention,
        einsum_attention,
        grouped_queries,
        rotary,
        query_norm,
        swiglu,
        gated,
        tied,
        torch_encoder,
        mixer,
        factored,
        learnt_query,
    )
}


def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """A case with every parameter and every statistic drawn at random."""
    torch.manual_seed(0)
    made = CASES[name]()
    model = made.model.to(dtype).eval()
    with torch.no_grad():
        for x in [*model.parameters(), *model.buffers()]:
            if x.is_floating_point() and name != "constants":
                x.copy_(torch.rand(x.shape) + 0.5 if x.ndim == 1 else torch.randn(x.shape) / 2)
    inputs = made.inputs if isinstance(made.inputs, tuple) else (made.inputs,)
    cast = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    return Case(model, cast, made.movable)
