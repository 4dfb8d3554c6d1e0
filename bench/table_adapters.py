"""KnOTS-TIES, Core Space and cat of random adapters: ours beside KnOTS' own code, one layer.

`python -m bench.table_adapters` prints a layer of ViT-B (8 adapters of rank 16 at 768 x 768) and
writes it under bench/results; `--large` adds one of a Llama (6 of rank 16 at 4096 x 4096), for
which the original's SVD of 4096 x 24576 takes minutes and 5 GB. Seconds are those of the processor,
of one thread: other processes do not count. The original needs MERGEKERN_KNOTS, a checkout of it.
Errors are relative to the largest element of the same merge in float64.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mergekern as mk
from bench import paths  # noqa: F401
from mergekern.adapters.factors import align
from mergekern.integrations import knots as dropin

from adapters import knots
from adapters.random_adapters import dense, factors
from report import describe

RESULTS = Path(__file__).parent / "results" / "adapters-cpu.json"
DENSITY, SCALE, RANK = 0.2, 0.6, 16
LAYERS = {"ViT-B, 768 x 768": (768, 8), "Llama, 4096 x 4096": (4096, 6)}


def seconds(call: Callable[[], Any], rounds: int = 1) -> tuple[float, Any]:
    """Of the processor; the best of all rounds, and what the last one returned."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        result = call()
        taken.append(time.process_time() - start)
    return min(taken), result


def adapters_of(size: int, count: int) -> list[mk.Adapter]:
    """As small as trained ones: of larger ones the rounding of dense float32 matrices passes the
    original's cut, and it counts that among the parts."""
    return [mk.Adapter({"q": factors(size, (size,), RANK, i, scale=1e-3)}) for i in range(count)]


def merge(given: list[mk.Adapter], method: str, **parameters: Any) -> Tensor:
    """The merged task vector as a matrix."""
    f = mk.merge_adapters(given, method, **parameters).modules["q"]
    return f.b @ f.a


def exact(given: list[mk.Adapter], mask: Tensor) -> Tensor:
    """The merge of what a mask keeps of each part, in float64."""
    u, parts = align([a.modules["q"] for a in given], 1e-5)
    kept = torch.stack(parts) * mask.view(len(given), *parts[0].shape)
    return SCALE * (u @ (kept.sum(0) / (kept != 0).sum(0).clamp(min=1)))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


def ours(given: list[mk.Adapter], mask: Tensor) -> dict[str, Any]:
    """Seconds of each method, and errors of those whose result is known."""
    ties = {"density": DENSITY, "lambda_": SCALE}
    expected = {"knots_ties": exact(given, mask), "core_ties": None, "cat": sum_of(given)}
    parameters = {"knots_ties": ties | {"host": "knots"}, "core_ties": ties, "cat": {}}
    found: dict[str, Any] = {}
    for method, oracle in expected.items():
        taken, merged = seconds(partial(merge, given, method, **parameters[method]), 5)
        found[method] = {"seconds": taken}
        if oracle is not None:
            found[method]["error"] = error(merged, oracle)
    return found


def sum_of(given: list[mk.Adapter]) -> Tensor:
    total = dense(given[0].modules["q"])
    for a in given[1:]:
        total += dense(a.modules["q"])
    return total


def own_mask(given: list[mk.Adapter]) -> Tensor:
    parts = align([a.modules["q"] for a in given], 1e-5).parts
    return dropin.ties_masking([p.float().reshape(-1) for p in parts], 100 * DENSITY)


def steps(given: list[mk.Adapter], *, replaced: bool) -> tuple[float, knots.Merged]:
    """KnOTS' own steps on the dense float32 matrices that it has; `replaced`: on our functions."""
    matrices = [{"q": dense(a.modules["q"]).float()} for a in given]
    with knots.original() as modules, dropin.accelerated() if replaced else nullcontext():
        return seconds(partial(knots.merged_by, modules, matrices, 100 * DENSITY, SCALE))


def layer(size: int, count: int) -> dict[str, Any]:
    given = adapters_of(size, count)
    mask = own_mask(given)
    found: dict[str, Any] = {"mergekern": ours(given, mask)}
    if knots.AT_HAND:
        oracle = exact(given, mask)
        for name, replaced in (("drop-in", True), ("knots", False)):
            taken, (merged, its) = steps(given, replaced=replaced)
            differing = int((its != mask).sum())
            found[name] = {"seconds": taken, "error": error(merged["q"], oracle)}
            found[name]["elements of masks that differ"] = differing
        for of in (*found["mergekern"].values(), found["drop-in"]):
            of["times faster"] = found["knots"]["seconds"] / of["seconds"]
    return found


def functions() -> dict[str, Any]:
    """Times faster than KnOTS' functions on 8 vectors of 2^20 elements, the bits compared."""
    g = torch.Generator().manual_seed(0)
    rows = [*torch.randn(8, 1 << 20, generator=g)]
    found = {}
    with knots.original() as modules:
        for module, name in (
            ("merging_functions", "ties_merging"),
            ("masking_ops", "ties_masking"),
            ("masking_ops", "masked_merge"),
        ):
            given = (torch.stack(rows), "mean") if name == "masked_merge" else (rows, 20)
            (fast, mine), (slow, its) = (
                seconds(partial(f, *given), 3)
                for f in (getattr(dropin, name), getattr(modules[module], name))
            )
            pairs = zip(mine, its, strict=True) if isinstance(its, tuple) else [(mine, its)]
            assert all(torch.equal(a, b) for a, b in pairs), name
            found[name] = slow / fast
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table_adapters")
    parser.add_argument("--large", action="store_true", help="the layer of a Llama, too: minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    out: dict[str, Any] = {**known, "machine": describe()}
    for title, (size, count) in LAYERS.items():
        if size < 1000 or options.large:
            out[title] = layer(size, count)
            print(title, json.dumps(out[title], indent=1), flush=True)
    if knots.AT_HAND:
        out["functions, times faster"] = functions()
        print(out["functions, times faster"])
    RESULTS.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
