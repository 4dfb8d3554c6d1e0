"""The demo: two encoders that know five digits each, merged into one that knows ten.

The 5+5 protocol of ZipIt (Stoica et al., 2305.03053) on scikit-learn's digits: no download, no GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import PartialZip, merge_state_dicts, repair, zip_models
from ..errors import ArgumentError

Merge = Callable[[list["Encoder"], Tensor], nn.Module]

TASKS = TASK_A, TASK_B = slice(0, 5), slice(5, 10)
CODE_DIM = 32
EPOCHS = 30
# Every epoch is STEPS full batches: both models then take the same number of steps, so their
# num_batches_tracked agree and a merge copies them. Either task has more training images.
BATCH, STEPS = 64, 10
SCALE = 20.0  # inverse temperature: cosines alone are too flat for a softmax
# Fixed, because torch's sums depend on the number of threads; one, because layers this small gain
# little from a second and lose much where another process holds its core.
THREADS = 1


class Data(NamedTuple):
    """Images [n, 1, 8, 8] in 0..1 and their digits [n]; the test part is never trained on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Row(NamedTuple):
    """One line of the table: accuracies in 0..1 and the seconds of the step in `TIMED`."""

    name: str
    joint: float
    task_a: float
    task_b: float
    seconds: float


TIMED = {"model A": "training", "model B": "training", "ensemble": "evaluation"}
TIMED_MERGE = "merging"  # every other row; from two encoders to one that is ready
UNTIL = "features.12"  # the last convolution: a partial zip shares all but the linear layer


class Encoder(nn.Module):
    """unit(linear(mean over pixels of (conv, BatchNorm, ReLU) x 5)): [n, 1, 8, 8] -> [n, 32].

    Deep enough that the order of channels, which no loss fixes, decides what an average is worth.
    """

    def __init__(self, width: int = 32, dim: int = CODE_DIM) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for out, stride in ((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)):
            conv = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, dim)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.head(self.features(images).mean((2, 3))), dim=1)


def load_data(seed: int) -> Data:
    """scikit-learn's 1797 digits, three quarters to train and one to test, every digit in both."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise  # scikit-learn is there but broken: its own message says more than ours
        raise ArgumentError(
            "demo: scikit-learn is not installed; pip install 'mergekern[demo]'"
        ) from None
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images, digits, test_size=0.25, stratify=digits, random_state=seed)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return Data(_pixels(train_x), train_y.long(), _pixels(test_x), test_y.long())


def _pixels(flat: Tensor) -> Tensor:
    return (flat / 16).float().view(-1, 1, 8, 8)


def class_codes(seed: int) -> Tensor:
    """Ten fixed random unit vectors [10, 32]: the common output space of all encoders."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(10, CODE_DIM, generator=generator), dim=1)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(images: Tensor, labels: Tensor, codes: Tensor, *, seed: int, epochs: int) -> Encoder:
    """An encoder whose cosine with codes[label] is the largest; labels count from 0 in `codes`.

    Result: the same weights for the same seed and machine.
    """
    with _threads(THREADS), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would reseed the caller's GPUs, which nothing here uses.
        torch.default_generator.manual_seed(seed)
        model = Encoder().train()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-2, total_steps=epochs * STEPS
        )
        for _ in range(epochs):
            for batch in torch.randperm(len(images))[: STEPS * BATCH].view(STEPS, BATCH):
                loss = F.cross_entropy(SCALE * model(images[batch]) @ codes.T, labels[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return model.eval()


def average(models: list[Encoder], images: Tensor) -> nn.Module:
    """(a + b) / 2, tensor by tensor; images for the statistics of BatchNorm alone."""
    merged = Encoder().eval()
    states = [model.state_dict() for model in models]
    merged.load_state_dict(merge_state_dicts(states, "linear", weight=[0.5, 0.5]))
    repair(merged, [images])
    return merged


def aligned(method: str, until: str | None = None) -> Merge:
    """zip_models, as it comes; all images in one batch."""

    def merge(models: list[Encoder], images: Tensor) -> nn.Module:
        return zip_models(models, [images], method=method, until=until)

    return merge


# Table row -> how to make its encoder from the two trained ones and unlabelled training images.
MERGES: dict[str, Merge] = {
    "average": average,
    "permute": aligned("permute"),
    "zip": aligned("zip"),
    "partial zip": aligned("zip", UNTIL),
}


@torch.no_grad()
def cosines(model: nn.Module, images: Tensor, codes: Tensor) -> Tensor:
    """Cosine of every image's encoding with every code: [n, len(codes)].

    Each head of a partial zip has the codes of its own task.
    """
    if isinstance(model, PartialZip):
        each = zip(model(images), TASKS, strict=True)
        return torch.cat([code @ codes[task].T for code, task in each], dim=1)
    return model(images) @ codes.T


def accuracies(scores: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Joint, task A, task B of scores [n, 10]. A task sees only its own images and classes."""

    def share(rows: Tensor, classes: slice) -> float:
        guess = scores[rows][:, classes].argmax(1) + classes.start
        return (guess == labels[rows]).double().mean().item()

    is_a = labels < TASK_A.stop
    return share(is_a | ~is_a, slice(0, 10)), share(is_a, TASK_A), share(~is_a, TASK_B)


def experts(
    data: Data, codes: Tensor, seed: int, epochs: int
) -> Iterator[tuple[str, Encoder, float]]:
    """Name, encoder and training seconds of the two models, from different seeds."""
    # torch imports parts of itself at the first optimizer step: seconds that are not training.
    train(data.train_images, data.train_labels, codes, seed=0, epochs=1)
    for i, (name, task) in enumerate((("model A", TASK_A), ("model B", TASK_B))):
        rows = (data.train_labels >= task.start) & (data.train_labels < task.stop)
        start = time.perf_counter()
        model = train(
            data.train_images[rows],
            data.train_labels[rows] - task.start,
            codes[task],
            seed=2 * seed + i,
            epochs=epochs,
        )
        yield name, model, time.perf_counter() - start


def _rows(data: Data, codes: Tensor, seed: int, epochs: int) -> list[Row]:
    images, labels = data.test_images, data.test_labels
    rows = []
    models = []
    for name, model, seconds in experts(data, codes, seed, epochs):
        models.append(model)
        rows.append(Row(name, *accuracies(cosines(model, images, codes), labels), seconds))
    for name, merge in MERGES.items():
        start = time.perf_counter()
        merged = merge(models, data.train_images)
        seconds = time.perf_counter() - start
        scores = cosines(merged, images, codes)
        rows.append(Row(name, *accuracies(scores, labels), seconds))
    start = time.perf_counter()
    each = zip(models, TASKS, strict=True)
    both = torch.cat([cosines(model, images, codes[task]) for model, task in each], dim=1)
    rows.append(Row("ensemble", *accuracies(both, labels), time.perf_counter() - start))
    return rows


def table(rows: list[Row]) -> Table:
    """Accuracies in percent; the last column names the step that its seconds were spent in."""
    result = Table(
        title="Held-out digits: A was trained on 0-4, B on 5-9",
        caption="merging includes tracing and BatchNorm's reset",
    )
    result.add_column("encoder")
    for header in ("joint %", "task A %", "task B %"):
        result.add_column(header, justify="right")
    result.add_column("seconds of", justify="right")
    for row in rows:
        shares = [f"{100 * share:.1f}" for share in (row.joint, row.task_a, row.task_b)]
        step = TIMED.get(row.name, TIMED_MERGE)
        result.add_row(row.name, *shares, f"{step} {row.seconds:6.2f}")
    return result


NOTES = (
    "Plain averaging of encoders trained from different seeds is expected to fall far below the "
    "ensemble: their features are not aligned, so one channel holds unrelated features in A and B. "
    "permute reorders them first; zip also merges features within a model, and so does the partial "
    "zip, which leaves each model its own last layer."
    "\nCompare the joint column, all ten digits at once: a useful merged encoder beats A and B, "
    "which can know about half, and approaches the ensemble, which runs both models."
    "\nThe order average, permute, zip, partial zip, ensemble is the usual one, not a law: it held "
    "for three of the seeds 0 to 4; permute fell below average for one, the partial zip below zip "
    "for another."
)


def run(*, seed: int = 0, epochs: int | None = None, console: Console | None = None) -> list[Row]:
    """The demo's rows; also printed if a `console` is given.

    Result: accuracies are the same for the same seed and machine; the caller's random state and
    number of threads are untouched.
    Raises: ArgumentError if scikit-learn is missing, or for a seed or epochs out of range.
    """
    epochs = EPOCHS if epochs is None else epochs
    if not 0 <= seed < 2**32:
        raise ArgumentError(f"demo: seed is out of range; got {seed}; expected 0 to 2**32 - 1")
    if epochs < 1:
        raise ArgumentError(f"demo: epochs is too small; got {epochs}; expected at least 1")
    console = console or Console(quiet=True)
    data = load_data(seed)
    with (
        _threads(THREADS),
        torch.random.fork_rng(devices=[]),  # a merged Encoder() draws weights it never uses
        console.status(f"training two encoders, {epochs} epochs each"),
    ):
        rows = _rows(data, class_codes(seed), seed, epochs)
    console.print(table(rows))
    console.print(NOTES)
    return rows
