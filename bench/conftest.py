"""Fixtures of all benchmarks. With --benchmark-disable (as in the tests) each runs once, small."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mergekern.ops._cost import Cost

from measure import ROUNDS, Call, Copy, best, first_touch, gemm_rate, peak_extra

MEGABYTE = 2**20
SCRATCH = 64 * MEGABYTE  # what a call may take beside its result


@pytest.fixture(scope="session")
def timed(request: pytest.FixtureRequest) -> bool:
    """--benchmark-enable on the command line outweighs the project's --benchmark-disable."""
    return bool(request.config.getoption("benchmark_enable"))


@pytest.fixture(scope="session")
def nbytes(timed: bool) -> int:
    """Bytes of one tensor; MERGEKERN_BENCH_MB sets another size than 256 MiB."""
    return int(os.environ.get("MERGEKERN_BENCH_MB", "256")) * MEGABYTE if timed else MEGABYTE // 4


@pytest.fixture(scope="session")
def gemm(timed: bool) -> float:
    """FLOP/s that torch.mm reaches in this run."""
    return gemm_rate() if timed else 0.0


def _median_ratio(
    times: list[float], copy: Copy, cost: Cost, gemm: float, pages: float = 0.0
) -> float:
    """Time over limit, round by round, each against the copy just before it.

    pages: seconds that the pages of a new result cost, a part of the limit then.

    The bandwidth of a shared machine jumps by a factor of 1.7 between minutes, so bests of
    different rounds must not be compared.
    """
    ratios = []
    for taken, copied in zip(times, copy.times[-len(times) :], strict=True):
        bandwidth = 2 * copy.source.nbytes / copied
        ratios.append(taken / (max(cost.bytes / bandwidth, cost.flops / gemm) + pages))
    return statistics.median(ratios)


Row = Callable[..., None]


@pytest.fixture
def row(benchmark: Any, timed: bool, nbytes: int, gemm: float) -> Row:
    """row(call, cost=..., error=..., torch=..., peers=...): times the call, asserts, records.

    error: float64 error over the bound of the docstring, at most 1 or the benchmark fails.
    torch: the same in plain torch on the same tensors. peers: name -> (call, share of elements):
    slow tools run on a slice, and are compared per element.
    result: bytes of a result that the call allocates. What its pages cost is timed apart and told
    as a part of the limit too; the call may take no more memory than that plus 64 MiB.
    allowed, wanted: times the limit at most and times mergekit at least, told beside what is
    measured; times of a shared machine are not asserted.
    """

    def measure(
        call: Call,
        *,
        cost: Cost,
        error: float,
        torch: Call | None = None,
        peers: dict[str, tuple[Call, float]] | None = None,
        result: int | None = None,
        allowed: float | None = None,
        wanted: float | None = None,
    ) -> None:
        assert 0 <= error <= 1, f"error is {error} times its bound"
        if not timed:
            benchmark(call)
            return
        copy = Copy(nbytes)
        call()
        benchmark.pedantic(call, setup=copy, rounds=ROUNDS)
        ours = benchmark.stats.stats.min
        info = benchmark.extra_info
        info["copy_gbs"], info["gemm_gflops"] = copy.bandwidth / 1e9, gemm / 1e9
        info["ms"], info["gbs"] = 1e3 * ours, cost.bytes / ours / 1e9
        info["times_limit"] = _median_ratio(benchmark.stats.stats.data, copy, cost, gemm)
        info["error"] = error
        extra = peak_extra(call) or 0
        info["extra_mb"] = extra / 1e6
        if result is not None:
            assert extra <= result + SCRATCH, f"{extra} bytes for a result of {result}"
            pages = first_touch(result)
            info["pages_ms"] = 1e3 * pages
            info["times_new"] = _median_ratio(benchmark.stats.stats.data, copy, cost, gemm, pages)
        targets = {"allowed": allowed, "wanted": wanted}
        info.update({key: value for key, value in targets.items() if value is not None})
        if torch is not None:
            info["torch"] = best(torch) / ours
        for name, (peer, share) in (peers or {}).items():
            info[name] = best(peer, 2) / share / ours

    return measure


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)  # type: ignore[no-any-return]
