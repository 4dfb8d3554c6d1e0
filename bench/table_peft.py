"""PEFT's SVD combinations beside its own: a layer of 2048 x 512, and whole models of such layers.

`python -m bench.table_peft` prints the table and keeps it under bench/results. Three adapters of
rank 8, random, their singular values equal or halved from one to the next. Milliseconds of the
processor, of all threads together, which neighbours on the machine change less than the clock: the
least of several runs, both tools in turn. Errors in float64, of the product against the best one of
what PEFT merged (`svd`: of the exact sum), over its norm.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import paths  # noqa: F401
from mergekern.integrations import peft as dropin
from mergekern.integrations.peft.adapters import METHOD

from measure import Call, gemm_rate
from report import describe

RESULTS = Path(__file__).parent / "results"
OUT, IN, RANK = 2048, 512, 8
WEIGHTS = [0.7, 0.3, 0.5]
KINDS = ("svd", "ties_svd", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd")
DENSITY = 0.3


def milliseconds(call: Call) -> float:
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def adapted(layers: int, falling: float, shape: tuple[int, int] = (OUT, IN)) -> Any:
    """Layers with three adapters, the factors of which have singular values falling by that."""
    out, into = shape
    net = nn.ModuleDict({f"fc{i}": nn.Linear(into, out, bias=False) for i in range(layers)})
    config = peft.LoraConfig(r=RANK, target_modules=[*net])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config, "0")
        for name in ("1", "2"):
            model.add_adapter(name, config)
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=g) * falling ** torch.arange(RANK)
        elif "lora_A" in name:
            p.data = torch.randn(p.shape, generator=g)
    return model


def of_layer(model: Any, kind: str) -> tuple[Tensor, Tensor]:
    """The factors (a, b) of the first layer by the method as it is installed."""
    tuner, layer = model.base_model, model.base_model.model["fc0"]
    like = layer.lora_A["0"].weight, layer.lora_B["0"].weight
    options = (DENSITY, "total", None, True, None)
    with torch.no_grad():
        return getattr(tuner, METHOD)(kind, ["0", "1", "2"], WEIGHTS, RANK, layer, *like, *options)


def oracle(model: Any, kind: str) -> Tensor:
    """The best product of the rank, of PEFT's merged task vector or of the exact sum."""
    layer = model.base_model.model["fc0"]
    if kind == "svd":
        merged = sum(
            w * (layer.lora_B[n].weight.double() @ layer.lora_A[n].weight.double())
            for n, w in zip("012", WEIGHTS)
        )
    else:
        merge = getattr(peft.utils.merge_utils, kind.removesuffix("_svd"))
        deltas = [layer.get_delta_weight(n) for n in "012"]
        torch.manual_seed(0)
        merged = merge(deltas, torch.tensor(WEIGHTS), DENSITY)
    u, s, vh = torch.linalg.svd(merged.detach().double(), full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vh[:RANK]


def layer_row(kind: str, falling: float, rounds: int) -> dict[str, Any]:
    model = adapted(1, falling)
    expected = oracle(model, kind)
    row: dict[str, Any] = {"name": f"layer, {kind}", "falling": falling}
    times: dict[str, list[float]] = {"peft": [], "mergekern": []}

    def call(tool: str) -> None:
        torch.manual_seed(0)
        a, b = of_layer(model, kind)
        off = torch.linalg.vector_norm(b.double() @ a.double() - expected)
        row[f"{tool}_error"] = float(off / torch.linalg.vector_norm(expected))

    for tool in times:  # once for the errors, and to warm up
        with dropin.accelerated() if tool == "mergekern" else warnings.catch_warnings():
            call(tool)
    for _ in range(rounds):
        times["peft"].append(milliseconds(lambda: of_layer(model, kind)))
        with dropin.accelerated():
            times["mergekern"] += [milliseconds(lambda: of_layer(model, kind)) for _ in range(5)]
    row |= {tool: min(taken) for tool, taken in times.items()}
    return row


def model_row(kind: str, layers: int) -> dict[str, Any]:
    """add_weighted_adapter of a whole model, which registers a new adapter."""
    model = adapted(layers, 1.0)

    def add(name: str) -> float:
        def call() -> None:
            model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, name, kind, density=DENSITY)

        return milliseconds(call)

    with dropin.accelerated():
        ours = min(add(f"ours {i}") for i in range(3))
    row = {"name": f"{layers} layers, {kind}", "falling": 1.0, "mergekern": ours}
    return row | {"peft": add("theirs")}


def rows(layers: int, rounds: int) -> Iterator[dict[str, Any]]:
    for kind in KINDS:
        for falling in (1.0, 0.5):
            yield layer_row(kind, falling, rounds)
    for kind in ("svd", "ties_svd"):
        yield model_row(kind, layers)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table_peft")
    parser.add_argument("--layers", type=int, default=24, help="of the whole model")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    table = Table("", "falling", "PEFT ms", "mergekern ms", "ratio", "PEFT error", "error")
    found = []
    for row in rows(options.layers, options.rounds):
        row["ratio"] = row["peft"] / row["mergekern"]
        errors = [f"{row.get(f'{t}_error', math.nan):.1e}" for t in ("peft", "mergekern")]
        ratio, times = f"{row['ratio']:.0f}", [f"{row[t]:.1f}" for t in ("peft", "mergekern")]
        table.add_row(row["name"], str(row["falling"]), *times, ratio, *errors)
        found.append(row)
    Console(width=120).print(table)
    told = {"machine": describe() | {"gemm_gflops": gemm_rate() / 1e9}, "rows": found}
    (RESULTS / "peft-cpu.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
