"""Two encoders trained apart, merged by every method: accuracy, FLOPs and time, beside ZipIt's own.

`python -m bench.table_zip [cifar5] [vits]` prints the tables and writes them under bench/results.
ZipIt's rows need MERGEKERN_ZIPIT, a checkout of it; all need the data of tests/real.

Times are of one run: "passes" are the forward passes that a method cannot do without, both models
on the images of the statistics, and the merged one where its BatchNorm is reset, timed alone;
"beside" is what the method takes beside them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mergekern as mk
from bench import paths  # noqa: F401

import original_zipit
import vits
import zipit
from cifar import Cifar10, Images, accuracy, cosines, reset_statistics, weights
from measure import seconds
from report import describe
from zipit_encoder import encoder

RESULTS = Path(__file__).parent / "results"
PAPER = {"alpha": 1e-4, "beta": 0.075}  # of the paper's CIFAR experiments
Run = Callable[[Tensor], Any]  # a batch to one output, or one for each head


class Method(NamedTuple):
    """One way to merge: our name of it, ZipIt's function if it has one, and where it ends.

    until: the space that is the last to be zipped, and ZipIt's name of the next layer.
    """

    title: str
    ours: str
    theirs: str | None
    parameters: dict[str, Any]
    until: tuple[str | None, str | None] = (None, None)


class Pair(NamedTuple):
    """Two encoders, and the images of the statistics."""

    name: str
    models: Sequence[nn.Module]
    images: Images
    methods: Sequence[Method]

    @property
    def batches(self) -> Sequence[Tensor]:
        return self.images.x.split(500)


class Merged(NamedTuple):
    """parts: seconds of ZipIt's, as it calls its functions."""

    run: Run
    passes: float = 0.0
    beside: float = 0.0
    parts: dict[str, float] | None = None


class Row(NamedTuple):
    method: str
    by: str
    joint: float
    a: float
    b: float
    mflops: float
    passes: float
    beside: float
    parts: dict[str, float] | None


# ---- the pairs -------------------------------------------------------------------------------

WHOLE = (
    Method("average", "identity", "match_tensors_identity", {}),
    Method("permute", "permute", "match_tensors_permute", {}),
    Method("permute by weights", "weights", None, {}),
    Method("zip, .3 .125", "zip", "match_tensors_zipit", {"alpha": 0.3, "beta": 0.125}),
    Method("zip", "zip", "match_tensors_zipit", PAPER),
)


def cifar5(cifar: Cifar10) -> Pair:
    images = cifar.normalized(cifar.statistics_indices())
    models = [encoder(weights(f"cifar5/{name}.safetensors")) for name in "ab"]
    until = {
        "19/20": ("layer3.0.conv2", "fc"),
        "13/20": ("layer2.0.conv2", "layer3.0.conv1"),
        "7/20": ("conv1", "layer2.0.conv1"),
    }
    return Pair("cifar5", models, images, [*WHOLE, *_partial(until, "match_tensors_zipit")])


def small_vits(cifar: Cifar10) -> Pair:
    """Zipped until the hidden features of a block; ZipIt has no graph of a ViT.

    Without BatchNorm, what zip_models does last is REPAIR; whole zips are shown without it too.
    """
    images = cifar.normalized(cifar.statistics_indices())
    until = {f"{i + 1}/4 blocks": (f"blocks.{i}.fc1", None) for i in (2, 1, 0)}
    methods = [m._replace(theirs=None) for m in WHOLE]
    bare = [
        m._replace(title=f"{m.title}, bare", parameters={**m.parameters, "repair": "none"})
        for m in methods
    ]
    return Pair("vits", vits.pair(cifar), images, [*bare, *methods, *_partial(until, None)])


def _partial(until: dict[str, tuple[str, str | None]], theirs: str | None) -> Iterator[Method]:
    for share, end in until.items():
        yield Method(f"zip {share}", "zip", theirs, PAPER, end)


PAIRS = {"cifar5": cifar5, "vits": small_vits}


# ---- the methods -----------------------------------------------------------------------------


def alone(pair: Pair, i: int) -> Merged:
    return Merged(pair.models[i])


def ensemble(pair: Pair) -> Merged:
    return Merged(lambda x: [model(x) for model in pair.models])


def ours(pair: Pair, method: Method) -> Merged:
    until = method.until[0]
    return _timed(
        pair,
        lambda: mk.zip_models(
            pair.models, pair.batches, method=method.ours, until=until, **method.parameters
        ),
        reads=method.ours != "weights",
    )


def theirs(pair: Pair, method: Method, merger: ModuleType) -> Merged:
    parts: dict[str, float] = {}

    def make() -> nn.Module:
        made = original_zipit.zip_pair(
            merger,
            pair.models,
            pair.batches,
            method.theirs,
            until=method.until[1],
            **{key[0]: x for key, x in method.parameters.items()},  # a and b
        )
        parts.update(made.seconds)
        parts["reset"] = seconds(lambda: reset_statistics(made.model, pair.images))
        return made.model

    return _timed(pair, make)._replace(parts=parts)


def _timed(pair: Pair, make: Callable[[], nn.Module], *, reads: bool = True) -> Merged:
    """reads: whether the method has the models read the images."""
    made: list[nn.Module] = []
    whole = seconds(lambda: made.append(make().eval()))
    reset = any(isinstance(m, nn.BatchNorm2d) for m in pair.models[0].modules())
    models = [*(pair.models if reads else []), *(made if reset else [])]
    passes = seconds(lambda: [_outputs(model, pair.batches) for model in models])
    return Merged(made[0], passes, whole - passes)


@torch.inference_mode()
def _outputs(run: Run, batches: Sequence[Tensor]) -> list[Any]:
    return [run(x) for x in batches]


# ---- the table -------------------------------------------------------------------------------


def rows(pair: Pair, test: Images, codes: Tensor) -> Iterator[Row]:
    def row(method: str, by: str, merged: Merged) -> Row:
        return _row(method, by, merged, test, codes)

    for i, name in enumerate("AB"):
        yield row(f"model {name}", "", alone(pair, i))
    original = [m for m in pair.methods if m.theirs is not None]
    if zipit.AT_HAND and original:
        with zipit.original() as merger:
            for method in original:
                yield row(method.title, "ZipIt", theirs(pair, method, merger))
    for method in pair.methods:
        yield row(method.title, "mergekern", ours(pair, method))
    yield row("ensemble", "", ensemble(pair))


def _row(method: str, by: str, merged: Merged, test: Images, codes: Tensor) -> Row:
    batches = _outputs(merged.run, test.x.split(100))
    got = accuracy(torch.cat([cosines(y, codes) for y in batches]), test.label)
    return Row(method, by, *got, flops(merged.run, test.x) / 1e6, *merged[1:])


def flops(run: Run, x: Tensor) -> int:
    """Of the products and convolutions for one more image in a batch.

    The heads of ZipIt's partial zip also run from the first layer on a single image of the batch,
    whose features they then replace: what a batch costs beside its images is left out.
    """
    counted = []
    for images in (x[:1], x[:2]):
        counter = FlopCounterMode(display=False)  # counts attention by its products alone
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            run(images)
        counted.append(counter.get_total_flops())
    return counted[1] - counted[0]


def show(name: str, found: list[Row]) -> None:
    table = Table(title=name)
    shares = ("joint", "task A", "task B", "average")
    for title in ("method", "by", *shares, "MFLOP", "passes s", "beside s"):
        table.add_column(title, justify="left" if title in ("method", "by") else "right")
    for r in found:
        percents = (f"{x:.1f}" for x in (r.joint, r.a, r.b, (r.a + r.b) / 2))
        times = (f"{x:.2f}" if r.passes else "" for x in (r.passes, r.beside))
        table.add_row(r.method, r.by, *percents, f"{r.mflops:.1f}", *times)
    Console(width=120).print(table)


def main(names: Sequence[str]) -> None:
    cifar = Cifar10()
    test = cifar.normalized(cifar.test_indices())
    codes = weights("cifar5/codes.safetensors")["codes"]
    for name in names or PAIRS:
        found = list(rows(PAIRS[name](cifar), test, codes))
        show(name, found)
        out = {"machine": describe(), "rows": [r._asdict() for r in found]}
        (RESULTS / f"zip-{name}.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
