"""One small ViT and its experts: full copies and LoRA adapters, fine-tuned on eight tasks.

`python -m bench.experts [SEED ...]` trains what the folder lacks that MERGEKERN_BENCH_CACHE names.
The tasks are CIFAR-10 seen otherwise: turned, recoloured, coarsened, cut, or some classes of it. A
class is told by the cosine with its code, so that no head belongs to a task. The base has seen all
ten classes, as they are. Of the test images 2,000 are for choosing coefficients, the rest for
testing.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from bench import paths  # noqa: F401

from cifar import Cifar10, Images, cosines, percent, weights
from vits import ViT, moved

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.247, 0.243, 0.261]).view(3, 1, 1)
BATCH = 128
EPOCHS, RATE, DECAY = 25, 2e-3, 0.05  # of the base
STEPS = 200  # of an expert
RATES = {"full": 4e-4, "lora": 4e-3}
RANK = 8
LAYERS = ("qkv", "proj", "fc1", "fc2")  # that adapters change
HELD_OUT = 2000  # test images for choosing coefficients
State = dict[str, Tensor]


# ---- the tasks -------------------------------------------------------------------------------


class Task(NamedTuple):
    """How pixels in [0, 1] are seen, and the classes told apart."""

    seen: Callable[[Tensor], Tensor]
    classes: tuple[int, ...] = tuple(range(10))


def _mosaic(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)


TASKS = {
    "quarter turn": Task(lambda x: x.rot90(1, (2, 3))),
    "half turn": Task(lambda x: x.rot90(2, (2, 3))),
    "inverted": Task(lambda x: 1 - x),
    "grey": Task(lambda x: x.mean(1, keepdim=True).expand_as(x)),
    "hues": Task(lambda x: x.roll(1, 1)),
    "mosaic": Task(_mosaic),
    "quadrants": Task(lambda x: x.roll((16, 16), (2, 3))),
    "animals": Task(lambda x: x, (2, 3, 4, 5, 6, 7)),
}
UPRIGHT = Task(lambda x: x)


def seen(task: Task, pixels: Tensor) -> Tensor:
    """As the network takes them."""
    return (task.seen(pixels) - MEAN) / STD


def of_classes(images: Images, classes: Sequence[int], most: int | None = None) -> Images:
    """The first images of these classes."""
    there = torch.isin(images.label, torch.tensor([*classes])).nonzero()[:most, 0]
    return Images(images.x[there], images.label[there])


def part(images: Images, task: Task, most: int | None = None) -> Images:
    """The first images of the task's classes, as the task sees them."""
    chosen = of_classes(images, task.classes, most)
    return Images(seen(task, chosen.x), chosen.label)


def accuracy(model: nn.Module, task: Task, images: Images, codes: Tensor) -> float:
    """Percent of the right classes among the task's."""
    with torch.inference_mode():
        y = torch.cat([cosines(model(x), codes) for x in images.x.split(250)])
    classes = torch.tensor(task.classes)
    return percent(classes[y[:, classes].argmax(1)] == images.label)


def pixels(cifar: Cifar10, indices: np.ndarray) -> Images:
    return cifar.images(indices, mean=[0.0] * 3, std=[1.0] * 3)


def held_out_and_test(cifar: Cifar10) -> tuple[Images, Images]:
    """In an order drawn at random, as the archive is sorted by class: held out, and for testing."""
    order = np.random.default_rng(0).permutation(cifar.test_indices())
    return pixels(cifar, order[:HELD_OUT]), pixels(cifar, order[HELD_OUT:])


# ---- the network -----------------------------------------------------------------------------


def network(state: Mapping[str, Tensor] | None = None) -> ViT:
    """Three convolutions in the place of patches of 8 x 8 pixels: an image is 17 tokens."""
    model = ViT(128, 4, 4, 256, patch=8)
    model.patch_embed = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(64, 128, 3, 2, 1),
    )
    if state is not None:
        model.load_state_dict(dict(state))
    return model.eval()


def tune(model: nn.Module, images: Images, task: Task, rate: float, steps: int, seed: int) -> None:
    """Cross-entropy on 10 x cosine with the codes of the task's classes."""
    codes = weights("cifar5/codes.safetensors")["codes"][list(task.classes)]
    images = of_classes(images, task.classes)
    place = torch.zeros(10, dtype=torch.int64)
    place[list(task.classes)] = torch.arange(len(task.classes))
    g = torch.Generator().manual_seed(seed)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=rate, weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.15)
    model.train()
    order: list[Tensor] = []
    for _ in range(steps):
        if not order:
            order = [*torch.randperm(len(images), generator=g).split(BATCH)]
        chosen = order.pop(0)
        x = seen(task, moved(images.x[chosen], g))
        loss = functional.cross_entropy(10 * cosines(model(x), codes), place[images.label[chosen]])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def with_adapter(state: State, seed: int) -> Any:
    """PEFT's model, of which an adapter learns and nothing else."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LAYERS))
    return peft.get_peft_model(network(state), config)


# ---- what is kept ----------------------------------------------------------------------------


def folder() -> Path:
    return Path(os.environ.get("MERGEKERN_BENCH_CACHE", tempfile.gettempdir())) / "experts"


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made if it is not there, and told how long that took."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        make(path)
        print(f"{path}: {time.process_time() - start:.0f} s of a core", flush=True)
    return path


@functools.cache
def _images() -> Images:
    cifar = Cifar10()
    return pixels(cifar, cifar.training_indices(range(10)))


def base() -> State:
    def make(path: Path) -> None:
        torch.manual_seed(0)
        model = network()
        tune(model, _images(), UPRIGHT, RATE, EPOCHS * len(_images()) // BATCH, 0)
        save_file(model.state_dict(), path)

    return load_file(_made(folder() / "base.safetensors", make))


def full(task: str, seed: int) -> State:
    """A copy of the base of which every weight is fine-tuned."""

    def make(path: Path) -> None:
        model = network(base())
        tune(model, _images(), TASKS[task], RATES["full"], STEPS, seed)
        save_file(model.state_dict(), path)

    return load_file(_made(folder() / f"{seed}" / f"{task}.safetensors", make))


def lora(task: str, seed: int) -> Path:
    """PEFT's folder of an adapter of the base."""

    def make(path: Path) -> None:
        model = with_adapter(base(), 100 * seed + list(TASKS).index(task))
        tune(model, _images(), TASKS[task], RATES["lora"], STEPS, seed)
        model.save_pretrained(path)

    return _made(folder() / f"{seed}" / f"{task} lora", make)


def main(seeds: Iterable[int]) -> None:
    base()
    for seed in seeds:
        for task in TASKS:
            full(task, seed)
            lora(task, seed)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0, 1, 2])
