"""tsv_m, iso_c and iso_cts of one matrix of a ViT-B or ViT-L beside FusionBench's functions.

Host and method take turns; "vs" is the host's best time over ours. Errors are those of the merged
task vector in the Frobenius norm against FusionBench's function in float64, relative to it, in
units of 2**-23 (float32's, which is the contract).
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk

from measure import seconds

peer = pytest.importorskip("fusion_bench.method")
MODELS = 8
ROUNDS = 3
UNIT = 2.0**-23
LAYERS = ((4, 1), (1, 4), (1, 1))  # of an MLP and of attention, by the width
SHAPES = [(out * width, into * width) for width in (768, 1024) for out, into in LAYERS]


def functions() -> dict[str, Callable[[Any], Any]]:
    tsv = importlib.import_module("fusion_bench.method.task_singular_vector.utils.TSVM_utils")
    iso = importlib.import_module("fusion_bench.method.isotropic_merging.iso_utils")
    return {
        "tsv_m": lambda v: tsv.compute_and_sum_svd_mem_reduction(v, accelerator="cpu"),
        "iso_c": lambda v: iso.iso_c(v, "cpu"),
        "iso_cts": lambda v: iso.iso_cts(v, 0.8, "cpu"),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def bench_spectral(benchmark: Any, timed: bool, method: str, shape: tuple[int, int]) -> None:
    rows, columns = shape if timed else (shape[0] // 16, shape[1] // 16)
    g = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(rows, columns, generator=g)
    xs = [base + 1e-3 * torch.randn(rows, columns, generator=g) for _ in range(MODELS)]

    def theirs(dtype: torch.dtype) -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):
            merged = functions()[method]([{"w": x.to(dtype) - base.to(dtype)} for x in xs])
        return merged["w"].double()

    def ours(out: torch.dtype = torch.float32) -> Tensor:
        return mk.merge_tensors(xs, method, base=base, out_dtype=out)

    exact = theirs(torch.float64)
    size = float(exact.norm()) * UNIT
    error = float((ours(torch.float64) - base.double() - exact).norm()) / size
    host_error = float((theirs(torch.float32) - exact).norm()) / size
    assert error <= min(1.0, host_error)
    if not timed:
        benchmark(ours)
        return
    host: list[float] = []
    benchmark.pedantic(
        ours, setup=lambda: host.append(seconds(lambda: theirs(torch.float32))), rounds=ROUNDS
    )
    best = benchmark.stats.stats.min
    info = benchmark.extra_info
    info["ms"], info["fusion_bench"] = 1e3 * best, min(host) / best
    info["error"], info["host_error"] = error, host_error
