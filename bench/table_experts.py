"""Experts of one small ViT merged by every method: normalised accuracies, of whole copies and LoRA.

`python -m bench.table_experts [SEED ...]` trains what is missing (`bench.experts`), prints two
tables in markdown and writes them under bench/results. A normalised accuracy is the merged model's
over that of the task's expert, on test images; the coefficient of each row is the best of `GRID` on
images that are neither for training nor for testing. Rows of methods that are not there are left
out, and said.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import mergekern as mk
from bench import paths  # noqa: F401

import experts
from cifar import Cifar10, Images, weights
from experts import TASKS, State
from report import describe

RESULTS = Path(__file__).parent / "results"
VALIDATION, TEST = 200, 1000  # images of a task
GRID = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
Merge = Callable[[float], State]  # by the coefficient

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
    "RegMean": ("regmean", {}),
}
FACTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "KnOTS-TIES": ("knots_ties", TIES),
    "KnOTS-DARE-TIES": ("knots_dare_ties", DARE),
    "Core Space TIES": ("core_ties", TIES),
}


class Row(NamedTuple):
    """coefficient: None where the method has none. percents: by task, of the expert's accuracy."""

    title: str
    seed: int
    coefficient: float | None
    percents: dict[str, float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.percents.values())


# ---- merging ---------------------------------------------------------------------------------


def folded(base: Mapping[str, Tensor], adapter: mk.Adapter) -> State:
    """The base with an adapter's changes in its weights."""
    state = dict(base)
    for name, f in adapter.modules.items():
        key = f"{name}.weight"
        state[key] = (base[key].double() + f.delta()).float()
    return state


def merges(base: State, models: Sequence[State], batches: Sequence[Tensor]) -> dict[str, Merge]:
    """Of state dicts, by title."""
    found: dict[str, Merge] = {}
    for title, (method, parameters) in WHOLE.items():
        if method not in mk.methods():
            print(f"{title}: no method {method}", flush=True)
        else:
            found[title] = partial(_whole, base, models, batches, method, parameters)
    return found


def _whole(
    base: State,
    models: Sequence[State],
    batches: Sequence[Tensor],
    method: str,
    parameters: dict[str, Any],
    coefficient: float,
) -> State:
    if method == "linear":
        return mk.merge_state_dicts(models, method, **parameters)
    return mk.merge_state_dicts(models, method, base=base, lambda_=coefficient, **parameters)


def factor_merges(base: State, folders: Sequence[Path]) -> dict[str, Merge]:
    """Of adapters, by title."""
    loaded = [mk.load_adapter(folder) for folder in folders]

    def merge(method: str, parameters: dict[str, Any], coefficient: float) -> State:
        merged = mk.merge_adapters(loaded, method, lambda_=coefficient, **parameters)
        return folded(base, merged)

    return {title: partial(merge, *method) for title, method in FACTORS.items()}


# ---- the rows --------------------------------------------------------------------------------


class Judge:
    """Accuracies by task, on the images for choosing or on those of the test."""

    def __init__(self) -> None:
        chosen, test = experts.test_pixels(Cifar10())
        self._codes = weights("cifar5/codes.safetensors")["codes"]
        self._images = {
            split: {name: experts.part(images, task, most) for name, task in TASKS.items()}
            for split, images, most in (
                ("validation", chosen, VALIDATION),
                ("test", test, TEST),
            )
        }

    def image(self, split: str, task: str) -> Images:
        return self._images[split][task]

    def accuracies(self, state: Mapping[str, Tensor], split: str) -> dict[str, float]:
        return {name: self.accuracy(state, split, name) for name in TASKS}

    def accuracy(self, state: Mapping[str, Tensor], split: str, name: str) -> float:
        model = experts.network(state)
        return experts.accuracy(model, TASKS[name], self.image(split, name), self._codes)


def rows(
    judge: Judge, base: State, models: Sequence[State], more: Mapping[str, Merge], seed: int
) -> Iterator[Row]:
    """The base's row, the experts' own accuracies (not normalised), and a row for each merge."""
    best = {
        split: {
            name: judge.accuracy(model, split, name)
            for name, model in zip(TASKS, models, strict=True)
        }
        for split in ("validation", "test")
    }
    yield Row("experts, accuracy", seed, None, best["test"])

    def normalised(state: State, split: str) -> dict[str, float]:
        got = judge.accuracies(state, split)
        return {name: 100 * got[name] / best[split][name] for name in TASKS}

    yield Row("pretrained", seed, None, normalised(base, "test"))
    batches: list[Tensor] = []
    for title, merge in {**merges(base, models, batches), **more}.items():
        if title in ("average", "RegMean"):
            yield Row(title, seed, None, normalised(merge(1.0), "test"))
            continue
        scored = [(statistics.mean(normalised(merge(c), "validation").values()), -c) for c in GRID]
        coefficient = -max(scored)[1]
        yield Row(title, seed, coefficient, normalised(merge(coefficient), "test"))


def main(seeds: Sequence[int]) -> None:
    judge, base = Judge(), experts.base()
    found: dict[str, list[Row]] = {"full": [], "lora": []}
    for seed in seeds:
        copies = [experts.full(name, seed) for name in TASKS]
        folders = [experts.lora(name, seed) for name in TASKS]
        adapted = [folded(base, mk.load_adapter(folder)) for folder in folders]
        for kind, models, more in (
            ("full", copies, {}),
            ("lora", adapted, factor_merges(base, folders)),
        ):
            for row in rows(judge, base, models, more, seed):
                print(kind, seed, row.title, row.coefficient, f"{row.mean:.1f}", flush=True)
                found[kind].append(row)
    for kind, of_kind in found.items():
        print(f"\n{kind}\n\n{markdown(of_kind)}")
    out = {"machine": describe(), **{k: [r._asdict() for r in v] for k, v in found.items()}}
    (RESULTS / "experts.json").write_text(json.dumps(out, indent=1) + "\n")


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
