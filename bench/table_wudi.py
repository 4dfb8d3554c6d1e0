"""WUDI with 300 steps beside FusionBench, by matrix and number of tasks, on one thread each.

`python -m bench.table_wudi` prints it. FusionBench is timed for two steps, which all take the same
time, ours for its set-up and for 40 steps: time of the processor, which others on the machine
disturb less, the best of two runs each. A step is 2 out in**2 flops for any number of tasks, there
4 tasks out**2 in: 2 tasks out / in times as many.
"""

from __future__ import annotations

import logging
import time

import torch

import mergekern as mk
from bench import paths  # noqa: F401

from measure import Call
from peers import fusion_bench_wudi

SHAPES = ((768, 768), (3072, 768), (768, 3072))
TASKS = (2, 4, 8, 16)
STEPS, THEIRS, OURS = 300, 2, 40


def best(call: Call) -> float:
    """Seconds of the processor."""
    taken = []
    for _ in range(2):
        begun = time.process_time()
        call()
        taken.append(time.process_time() - begun)
    return min(taken)


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("fusion_bench").setLevel(logging.WARNING)
    print("matrix tasks | ms a step: fusion-bench, ours, ratio | ms set-up | ratio of 300 steps")
    for out, into in SHAPES:
        for n in TASKS:
            g = torch.Generator().manual_seed(0)
            taus = [1e-3 * torch.randn(out, into, generator=g) for _ in range(n)]
            base = torch.zeros(out, into)

            def ours(steps: int, taus: list = taus, base: torch.Tensor = base) -> object:
                return mk.merge_tensors(taus, "wudi", base=base, steps=steps)

            setup = best(lambda: ours(0))
            step = (best(lambda: ours(OURS)) - setup) / OURS
            row = f"{out} x {into} {n:5d} |"
            peers = fusion_bench_wudi(taus, THEIRS, 1.0) if n <= 8 else {}
            if peers:
                theirs = best(peers["fusion_bench"][0]) / THEIRS
                whole = STEPS * theirs / (setup + STEPS * step)
                row += f" {1e3 * theirs:8.0f}, {1e3 * step:6.1f}, {theirs / step:5.1f} |"
                row += f" {1e3 * setup:6.0f} | {whole:5.1f}"
            else:
                row += f" {'':8s}, {1e3 * step:6.1f} {'':6s} | {1e3 * setup:6.0f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
