"""Experts of one small ViT merged by every method: normalised accuracies, of whole copies and LoRA.

`python -m bench.table_experts [SEED ...]` trains what is missing (`bench.experts`), writes the rows
of these seeds under bench/results in the place of earlier ones, and prints two tables in markdown
of all that are there. A normalised accuracy is the merged model's over that of the task's expert,
on test images; the factor on the merged task vector is the best of `GRID` on images that are
neither for training nor for testing. Methods that are not there are left out, and said.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mergekern as mk
from bench import paths  # noqa: F401

import experts
from cifar import Cifar10, Images, weights
from experts import TASKS, State
from report import describe
from vits import ViT

RESULTS = Path(__file__).parent / "results"
VALIDATION, TEST = 150, 800  # images of a task
GRID = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6)
Merge = Callable[[], State]  # weights of the network

# By title: the method and its parameters. DARE drops a fifth and TIES keeps one, as in the
# experiments of KnOTS on ViT-B/32; everything else is by default.
TIES, DARE = {"density": 0.2}, {"density": 0.8, "weight": 1.0, "normalize": True}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("linear", {"weight": 1.0}),
    "task arithmetic": ("task_arithmetic", {"weight": 1.0}),
    "TIES": ("ties_global", TIES),
    "DARE-TIES": ("dare_ties", DARE),
    "TSV-M": ("tsv_m", {}),
    "Iso-C": ("iso_c", {}),
    "Iso-CTS": ("iso_cts", {}),
    "SVC": ("svc", {}),
    "WUDI": ("wudi", {}),
    "WUDI, exact": ("wudi_exact", {}),
}
INPUTS: dict[str, dict[str, Any]] = {"RegMean": {}, "RegMean++": {"blocks": "blocks"}}
FIXED = ("average", *INPUTS)  # without a coefficient
FACTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "KnOTS-TIES": ("knots_ties", TIES),
    "KnOTS-DARE-TIES": ("knots_dare_ties", DARE),
    "Core Space TIES": ("core_ties", TIES),
    "linear, factors apart": ("linear", {"weight": 1.0}),
    "TIES, factors apart": ("ties", {"weight": 1.0, **TIES}),
}


class Row(NamedTuple):
    """coefficient: the factor, None where there is none. percents: by task, of the expert's."""

    title: str
    seed: int
    coefficient: float | None
    percents: dict[str, float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.percents.values())


# ---- merging ---------------------------------------------------------------------------------


def changes(adapter: mk.Adapter) -> State:
    """Its task vectors in float64, of the rank that they have."""
    return {f"{name}.weight": f.delta() for name, f in adapter.modules.items()}


def onto(base: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> State:
    return {k: (x.double() + added[k]).float() if k in added else x for k, x in base.items()}


class Experts(NamedTuple):
    """models, and base: what a method takes. whole: to the network's weights from what it gives.

    Adapters are merged as their task vectors from a base of zeros: folded into float32 weights
    they would have noise of full rank, which methods that level a spectrum raise.
    """

    base: State
    models: list[State]
    whole: Callable[[State], State]
    more: Mapping[str, Merge]


def copies(seed: int) -> Experts:
    models = [experts.full(name, seed) for name in TASKS]
    return Experts(experts.base(), models, lambda merged: merged, {})


def adapters(seed: int) -> Experts:
    base = experts.base()
    loaded = [mk.load_adapter(experts.lora(name, seed)) for name in TASKS]
    models = [changes(adapter) for adapter in loaded]
    zeros = {key: torch.zeros_like(x) for key, x in models[0].items()}

    def factors(method: str, parameters: dict[str, Any]) -> State:
        return onto(base, changes(mk.merge_adapters(loaded, method, **parameters)))

    more = {title: partial(factors, *given) for title, given in FACTORS.items()}
    return Experts(zeros, models, partial(onto, base), more)


def merges(of: Experts, seen: Mapping[str, Images]) -> dict[str, Merge]:
    """By title. seen: images of each task, of which RegMean takes what goes into layers."""

    def merge(method: str, parameters: dict[str, Any]) -> State:
        base = None if method == "linear" else of.base
        return of.whole(mk.merge_state_dicts(of.models, method, base=base, **parameters))

    def regmean(parameters: dict[str, Any]) -> State:
        models = [experts.network(of.whole(m)) for m in of.models]
        batches = [[images.x] for images in seen.values()]
        return mk.regmean(models, batches, **parameters).state_dict()

    found = {title: partial(merge, *x) for title, x in WHOLE.items()}
    if hasattr(mk, "regmean"):
        found |= {title: partial(regmean, x) for title, x in INPUTS.items()}
    return found | of.more


# ---- the rows --------------------------------------------------------------------------------


class Judge:
    """Accuracies by task, on the images for choosing or on those of the test."""

    def __init__(self) -> None:
        chosen, test = experts.held_out_and_test(Cifar10())
        self._codes = weights("cifar5/codes.safetensors")["codes"]
        self.images = {
            split: {name: experts.part(images, task, most) for name, task in TASKS.items()}
            for split, images, most in (
                ("validation", chosen, VALIDATION),
                ("test", test, TEST),
            )
        }

    def accuracies(self, state: Mapping[str, Tensor], split: str) -> dict[str, float]:
        model = experts.network(state)
        return {name: self.accuracy(model, split, name) for name in TASKS}

    def accuracy(self, model: ViT, split: str, name: str) -> float:
        return experts.accuracy(model, TASKS[name], self.images[split][name], self._codes)


def rows(judge: Judge, of: Experts, seed: int) -> Iterator[Row]:
    """The experts' own accuracies (not normalised), the base's row, and a row for each merge."""
    base, networks = experts.base(), [of.whole(model) for model in of.models]
    best = {
        split: {
            name: judge.accuracy(experts.network(state), split, name)
            for name, state in zip(TASKS, networks, strict=True)
        }
        for split in ("validation", "test")
    }

    def normalised(state: State, split: str) -> dict[str, float]:
        got = judge.accuracies(state, split)
        return {name: 100 * got[name] / best[split][name] for name in TASKS}

    def row(title: str, merged: State) -> Row:
        if title in FIXED:
            return Row(title, seed, None, normalised(merged, "test"))
        scaled = {c: {k: x + c * (merged[k] - x) for k, x in base.items()} for c in GRID}
        validated = {c: normalised(state, "validation") for c, state in scaled.items()}
        chosen = max(GRID, key=lambda c: sum(validated[c].values()))
        return Row(title, seed, chosen, normalised(scaled[chosen], "test"))

    yield Row("experts, accuracy", seed, None, best["test"])
    yield Row("base", seed, None, normalised(base, "test"))
    for title, merge in merges(of, judge.images["validation"]).items():
        try:
            merged = merge()
        except mk.ArgumentError as error:
            print(f"{title} is left out: {error}")
            continue
        yield row(title, merged)


KINDS = (
    ("full", "Whole copies", copies),
    ("lora", f"LoRA of rank {experts.RANK}", adapters),
)


def main(seeds: Sequence[int]) -> None:
    judge, path = Judge(), RESULTS / "experts.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    out: dict[str, Any] = {"machine": describe()}
    for kind, title, experts_of in KINDS:
        found = [Row(**row) for row in earlier.get(kind, ()) if row["seed"] not in seeds]
        for seed in seeds:
            for row in rows(judge, experts_of(seed), seed):
                print(kind, seed, row.title, row.coefficient, f"{row.mean:.1f}", flush=True)
                found.append(row)
        out[kind] = [row._asdict() for row in found]
        print(f"\n{title}\n\n{markdown(found)}\n")
    path.write_text(json.dumps(out, indent=1) + "\n")


def markdown(found: Sequence[Row]) -> str:
    """A line for each title: means over the seeds, and the standard deviation of the last."""
    lines = [
        f"| method | coefficient | {' | '.join(TASKS)} | mean |",
        f"| --- | --- |{' ---: |' * (len(TASKS) + 1)}",
    ]
    for title in dict.fromkeys(row.title for row in found):
        of = [row for row in found if row.title == title]
        percents = [f"{statistics.mean(row.percents[name] for row in of):.1f}" for name in TASKS]
        chosen = sorted({row.coefficient for row in of if row.coefficient is not None})
        spread = f" ± {statistics.stdev(row.mean for row in of):.1f}" if len(of) > 1 else ""
        mean = f"{statistics.mean(row.mean for row in of):.1f}{spread}"
        lines.append(
            f"| {title} | {', '.join(map(str, chosen))} | {' | '.join(percents)} | {mean} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0, 1, 2])
