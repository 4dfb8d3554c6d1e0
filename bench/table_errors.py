"""Errors of each method beside its host's, on layers of ViT-B/32 and ViT-L/14.

`python -m bench.table_errors [ViT-B ViT-L]` prints the table in markdown and keeps it under
bench/results. Eight random task vectors of one matrix, or three adapters of rank 16. Errors are
those of the merged task vector in the Frobenius norm against the same formula in float64, relative
to it; ours are of a float64 result where the method gives one, the host's of what it returns by
default. WUDI takes a few steps. KnOTS needs MERGEKERN_KNOTS, a checkout of it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mergekern as mk
from bench import paths  # noqa: F401

import bench_spectral
import table_adapters
import table_peft
from adapters import knots
from adapters.random_adapters import factors
from bench_regmean import layer
from peers import fusion_bench_regmean, fusion_bench_wudi
from report import describe

RESULTS = Path(__file__).parent / "results" / "errors-cpu.json"
SHAPES = {
    model: [(out * width, into * width) for out, into in bench_spectral.LAYERS]
    for model, width in (("ViT-B", 768), ("ViT-L", 1024))
}
MODELS, ADAPTERS, RANK = 8, 3, 16
STEPS = 3  # of WUDI
SCALE, ALPHA = 0.4, 0.8  # of SVC


class Merges(NamedTuple):
    """A merged task vector: ours, the host's and the exact one."""

    ours: Tensor
    host: Tensor
    exact: Tensor

    def errors(self) -> tuple[float, float]:
        size = torch.linalg.vector_norm(self.exact)
        return tuple(
            float(torch.linalg.vector_norm(x.double() - self.exact) / size)
            for x in (self.ours, self.host)
        )


def models(shape: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(shape, generator=g)
    return base, [base + 1e-3 * torch.randn(shape, generator=g) for _ in range(MODELS)]


def merged(shape: tuple[int, int], method: str, **parameters: Any) -> Tensor:
    base, xs = models(shape)
    got = mk.merge_tensors(xs, method, base=base, out_dtype=torch.float64, **parameters)
    return got - base.double()


def spectral(method: str, shape: tuple[int, int]) -> Merges:
    base, xs = models(shape)
    call = bench_spectral.functions()[method]
    host, exact = (
        call([{"w": x.to(dtype) - base.to(dtype)} for x in xs])["w"]
        for dtype in (torch.float32, torch.float64)
    )
    return Merges(merged(shape, method), host, exact)


def svc(shape: tuple[int, int]) -> Merges:
    base, xs = models(shape)
    utils = importlib.import_module("fusion_bench.method.singular_value_calibration.utils")

    def call(dtype: torch.dtype) -> Tensor:
        b, each = base.to(dtype), [x.to(dtype) for x in xs]
        whole = b + SCALE * sum(x - b for x in each)
        calibrated = utils.subspace_consistency_spectral_calibration_accelerated
        return calibrated(b, each, whole, ALPHA) - b

    ours = merged(shape, "svc", lambda_=SCALE, alpha=ALPHA)
    return Merges(ours, call(torch.float32), call(torch.float64))


def wudi(shape: tuple[int, int]) -> Merges:
    """From the base of zeros, as FusionBench takes task vectors and keeps their dtype."""
    base, xs = models(shape)
    taus = [x - base for x in xs]
    host, exact = (
        fusion_bench_wudi([t.to(dtype) for t in taus], STEPS, 1.0)["fusion_bench"][0]()["w"]
        for dtype in (torch.float32, torch.float64)
    )
    zero = torch.zeros_like(base)
    ours = mk.merge_tensors(taus, "wudi", base=zero, steps=STEPS, out_dtype=torch.float64)
    return Merges(ours, host, exact)


def regmean(shape: tuple[int, int]) -> Merges:
    ws, grams = layer(True, *shape)
    ours = mk.merge_tensors(ws, "regmean", gram=grams, out_dtype=torch.float64)
    right = sum(w.double() @ g.double() for w, g in zip(ws, grams, strict=True))
    exact = torch.linalg.solve(sum(g.double() for g in grams), right.T).T
    return Merges(ours, fusion_bench_regmean(ws, grams)["fusion_bench"][0](), exact)


def knots_ties(shape: tuple[int, int]) -> Merges:
    out, into = shape
    given = [mk.Adapter({"q": factors(out, (into,), RANK, i, scale=1e-3)}) for i in range(ADAPTERS)]
    mask = table_adapters.own_mask(given)
    _, (tensors, its) = table_adapters.steps(given, replaced=False)
    assert torch.equal(mask, its), "KnOTS keeps other elements"
    parameters = {"density": table_adapters.DENSITY, "lambda_": table_adapters.SCALE}
    ours = table_adapters.merge(given, "knots_ties", host="knots", **parameters)
    return Merges(ours, tensors["q"], table_adapters.exact(given, mask))


def peft(kind: str, shape: tuple[int, int]) -> Merges:
    model = table_peft.adapted(1, 1.0, shape)

    def call() -> Tensor:
        torch.manual_seed(0)
        a, b = table_peft.of_layer(model, kind)
        return b.double() @ a.double()

    with table_peft.dropin.accelerated():
        ours = call()
    return Merges(ours, call(), table_peft.oracle(model, kind))


ROWS: dict[str, tuple[str, Callable[[tuple[int, int]], Merges]]] = {
    **{m: ("FusionBench", partial(spectral, m)) for m in ("tsv_m", "iso_c", "iso_cts")},
    "svc": ("FusionBench", svc),
    "wudi": ("FusionBench", wudi),
    "regmean": ("FusionBench", regmean),
    **({"knots_ties": ("KnOTS", knots_ties)} if knots.AT_HAND else {}),
    **{kind: ("PEFT", partial(peft, kind)) for kind in table_peft.KINDS},
}


def main(names: Sequence[str]) -> None:
    logging.getLogger("fusion_bench").setLevel(logging.WARNING)
    found: dict[str, Any] = {}
    for name in names:
        shapes = SHAPES[name]
        titles = [f"{out} x {into}" for out, into in shapes]
        print(f"\n| {name}, error here / there | {' | '.join(titles)} |")
        print("| --- |" + " --- |" * len(shapes))
        for method, (host, call) in ROWS.items():
            cells = []
            for title, shape in zip(titles, shapes, strict=True):
                with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    errors = call(shape).errors()
                assert errors[0] <= errors[1], (method, shape, errors)
                found[f"{method}, {title}"] = {"mergekern": errors[0], host: errors[1]}
                cells.append(f"{errors[0]:.0e} / {errors[1]:.0e}")
            print(f"| `{method}`, {host} | {' | '.join(cells)} |", flush=True)
    RESULTS.write_text(json.dumps({"machine": describe(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or [*SHAPES])
