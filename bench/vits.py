"""Two small ViTs trained apart on CIFAR-10's first and last five classes, as cifar5 was.

`python -m bench.vits` trains what the folder lacks that MERGEKERN_BENCH_CACHE names, and prints
accuracies. Half of the patches of an image, drawn anew, are seen in all but the last epochs: a ViT
learns from 25,000 images slowly, and this gives twice the epochs in the same time.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from bench import paths  # noqa: F401

from cifar import Cifar10, Images, accuracy, cosines, outputs, weights

EPOCHS, WHOLE = 25, 3  # the last WHOLE epochs see whole images
BATCH = 64
RATE, DECAY = 2e-3, 0.05


# ---- the network -----------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Images [n, 3, side, side] to [n, outputs]; norms before the branches, a class token."""

    def __init__(
        self,
        width: int = 96,
        layers: int = 4,
        heads: int = 4,
        hidden: int = 192,
        *,
        side: int = 32,
        patch: int = 4,
        outputs: int = 64,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def tokens(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed

    def read(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(tokens))[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.tokens(x))


def vit_b() -> ViT:
    """A ViT-B/16, 86 million parameters."""
    return ViT(768, 12, 12, 3072, side=224, patch=16, outputs=1000)


# ---- training --------------------------------------------------------------------------------


def moved(x: Tensor, g: torch.Generator) -> Tensor:
    """Each image shifted by up to four pixels, zeros around it, and mirrored or not."""
    n, side = len(x), torch.arange(32)
    top, left = torch.randint(0, 9, (2, n, 1), generator=g)
    mirrored = torch.rand(n, 1, generator=g) < 0.5
    rows, columns = top + side, left + torch.where(mirrored, 31 - side, side)
    padded = functional.pad(x, (4, 4, 4, 4))
    image = torch.arange(n)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _half(tokens: Tensor, g: torch.Generator) -> Tensor:
    """The class token and half of each image's patches."""
    patches = tokens.shape[1] - 1
    drawn = torch.rand(len(tokens), patches, generator=g).argsort(1)[:, : patches // 2]
    kept = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.int64), 1 + drawn], 1)
    return tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))


def train(images: Images, codes: Tensor, seed: int) -> ViT:
    """Cross-entropy on 10 x cosine with `codes`, of which labels count from 0."""
    torch.manual_seed(seed)
    model = ViT()
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.15)
    for epoch in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=g).split(BATCH):
            if len(chosen) < BATCH:
                continue  # its gradient is the noisiest
            tokens = model.tokens(moved(images.x[chosen], g))
            y = model.read(_half(tokens, g) if epoch < EPOCHS - WHOLE else tokens)
            loss = functional.cross_entropy(10 * cosines(y, codes), images.label[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1} of {EPOCHS}: loss {loss.item():.2f} on the last batch", flush=True
        )
    return model.eval()


def pair(cifar: Cifar10) -> list[ViT]:
    """Of the folder that MERGEKERN_BENCH_CACHE names, or of a temporary one; trained if not there.

    Twelve minutes of one core each.
    """
    folder = Path(os.environ.get("MERGEKERN_BENCH_CACHE", tempfile.gettempdir())) / "vits"
    folder.mkdir(parents=True, exist_ok=True)
    codes = weights("cifar5/codes.safetensors")["codes"]
    models = []
    for seed, name in enumerate("ab"):
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            start = time.process_time()
            images = cifar.normalized(cifar.training_indices(range(5 * seed, 5 * seed + 5)))
            trained = train(Images(images.x, images.label - 5 * seed), codes.split(5)[seed], seed)
            save_file(trained.state_dict(), path)
            print(f"{path}: {(time.process_time() - start) / 60:.1f} minutes of a core")
        model = ViT()
        model.load_state_dict(load_file(path))
        models.append(model.eval())
    return models


def main() -> None:
    cifar = Cifar10()
    models = pair(cifar)
    test = cifar.normalized(cifar.test_indices())
    codes = weights("cifar5/codes.safetensors")["codes"]
    average = ViT().eval()
    a, b = (m.state_dict() for m in models)
    average.load_state_dict({key: (a[key] + b[key]) / 2 for key in a})
    embeddings = [outputs(m, test) for m in (*models, average)]
    rows = dict(zip(("model A", "model B", "weight average"), embeddings))
    for name, output in {**rows, "ensemble": embeddings[:2]}.items():
        got = accuracy(cosines(output, codes), test.label)
        print(f"{name:15} joint {got.joint:.2f}, task A {got.a:.2f}, task B {got.b:.2f}")


if __name__ == "__main__":
    main()
