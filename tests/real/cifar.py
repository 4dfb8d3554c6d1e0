"""CIFAR-10, two families of ResNet-20 and their weights, for tests on real checkpoints.

Data lies beside the checkout (or where MERGEKERN_DATA says) and is never copied here. A test whose
data is missing skips with the path that it looked for.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MERGEKERN_DATA", ROOT.parent / "shared" / "data"))
STATISTICS_BATCH = 500


def data(name: str) -> Path:
    """A file of the data folder; skips the test where it is missing."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path}: no such file (MERGEKERN_DATA names the folder)")
    return path


# ---- images ----------------------------------------------------------------------------------


class Images:
    """Some images, decoded and normalized once, with their labels."""

    def __init__(self, x: Tensor, label: Tensor) -> None:
        self.x, self.label = x, label

    def __len__(self) -> int:
        return len(self.label)


class Cifar10:
    """The archive of JPEG bytes. split 0 is for training, 1 for testing.

    The bytes are of quality 75 with halved colour, so a network that was trained on the original
    pixels scores lower on these than published; cifar5 was trained on these.
    """

    def __init__(self) -> None:
        archive = data("cifar10_jpeg.npz")
        self._pillow = pytest.importorskip("PIL.Image", reason="pillow: not installed")
        with np.load(archive) as arrays:
            self._bytes = arrays["jpeg"]
            self._offsets = arrays["offsets"]
            self.label = torch.from_numpy(arrays["label"].astype(np.int64))
            self.split = arrays["split"]

    def images(self, indices: np.ndarray, mean: list[float], std: list[float]) -> Images:
        pixels = np.stack([self._decode(int(i)) for i in indices])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        return Images(
            x.contiguous(memory_format=torch.channels_last), self.label[torch.from_numpy(indices)]
        )

    def normalized(self, indices: np.ndarray) -> Images:
        """As the encoders of cifar5 take them."""
        return self.images(indices, mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.243, 0.261])

    def _decode(self, i: int) -> np.ndarray:
        data = self._bytes[self._offsets[i] : self._offsets[i + 1]].tobytes()
        return np.asarray(self._pillow.open(io.BytesIO(data)).convert("RGB"))

    def test_indices(self) -> np.ndarray:
        return np.flatnonzero(self.split == 1)

    def training_indices(self, classes: Sequence[int]) -> np.ndarray:
        return np.flatnonzero((self.split == 0) & np.isin(self.label.numpy(), classes))

    def statistics_indices(self) -> np.ndarray:
        """The 5,000 training images that the README of cifar5 names."""
        train = np.flatnonzero(self.split == 0)
        return np.random.default_rng(0).choice(train, 5000, replace=False)


# ---- networks --------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm. `padded`: shortcut A of the ResNet paper, no weights."""

    def __init__(self, channels: int, out: int, stride: int, *, padded: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.padding = (out - channels) // 2 if padded else 0
        self.downsample: nn.Module | None = None
        if stride > 1 and not padded:
            convolution = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.padding:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(y + x)


class ResNet20(nn.Module):
    """Width 16. head "fc": 64-d encoder of cifar5; "linear": classifier of resnet_cifar10.

    depth: blocks of a stage, 3 of a ResNet-20 and 5 of a ResNet-32.
    """

    def __init__(self, head: str, depth: int = 3) -> None:
        super().__init__()
        padded = head == "linear"
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, out in enumerate((16, 32, 64), start=1):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(Block(channels, out, stride, padded=padded))
                channels = out
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.head = head
        self.add_module(head, nn.Linear(64, 10 if padded else 64))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.get_submodule(self.head)(x.mean((2, 3)))


def network(state: Mapping[str, Tensor], head: str) -> ResNet20:
    """The network with these weights, every one of which must be there and be used."""
    model = ResNet20(head, len({key.split(".")[1] for key in state if key.startswith("layer1.")}))
    own = set(model.state_dict())
    # Published classifiers are without the counters of BatchNorm, which evaluation ignores.
    counters = {k for k in own - set(state) if k.endswith("num_batches_tracked")}
    assert own - counters == set(state)
    model.load_state_dict(dict(state), strict=False)
    return model.eval()


def weights(name: str) -> dict[str, Tensor]:
    return load_file(data(name))


# ---- evaluation ------------------------------------------------------------------------------


@torch.inference_mode()
def outputs(model: nn.Module, images: Images) -> Tensor:
    model.eval()
    return torch.cat([model(x) for x in images.x.split(100)])


@torch.no_grad()
def reset_statistics(model: nn.Module, images: Images) -> None:
    """BatchNorm means and variances as the plain average over the batches of one pass."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for x in images.x.split(STATISTICS_BATCH):
        model(x)
    model.eval()


def percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()


class Accuracy(NamedTuple):
    """Percent of the right classes in the 5+5 setting."""

    joint: float  # over all ten classes
    a: float  # over a task's five classes, the images of those
    b: float


def accuracy(cosine: Tensor, label: Tensor) -> Accuracy:
    first = label < 5
    return Accuracy(
        percent(cosine.argmax(1) == label),
        percent(cosine[first, :5].argmax(1) == label[first]),
        percent(cosine[~first, 5:].argmax(1) + 5 == label[~first]),
    )


def cosines(output: Tensor | Sequence[Tensor], codes: Tensor) -> Tensor:
    """Of embeddings with the codes of all ten classes; of two heads, each with those of its own."""
    if isinstance(output, Tensor):
        return functional.normalize(output, dim=1) @ codes.T
    return torch.cat([cosines(y, own) for y, own in zip(output, codes.split(5))], 1)
