"""Other tools on the same task, where they are installed, and plain torch where it is short.

Each function gives name -> (call, share of the elements it runs on), as `row` takes them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from typing import Any

import torch
from torch import Tensor

from measure import Call

PEER_ELEMENTS = 1 << 25  # more would say nothing else
SORT_ELEMENTS = 1 << 22  # for what sorts: seconds a call; a smaller sort is not slower per element

Peers = dict[str, tuple[Call, float]]


def _installed(name: str) -> bool:
    """A module that is loaded may lack the spec that find_spec asks for: fusion_bench's does."""
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _slice(x: Tensor, elements: int) -> Tensor:
    """The first elements, in whole rows."""
    return x.reshape(-1)[:elements].reshape(-1, *x.shape[1:])


def _share(x: Tensor, elements: int) -> float:
    return min(1.0, elements / x.numel())


def mergekit(
    method: str,
    xs: list[Tensor],
    base: Tensor | None = None,
    *,
    elements: int = PEER_ELEMENTS,
    **parameters: Any,
) -> Peers:
    if not _installed("mergekit"):
        return {}
    from mergekit.merge_methods import merge_tensors

    tensors = [_slice(x, elements) for x in ([] if base is None else [base]) + xs]

    def call() -> object:
        index = None if base is None else 0
        return merge_tensors(tensors, method, parameters=parameters, base_index=index)

    return {"mergekit": (call, _share(xs[0], elements))}


def peft_ties(base: Tensor, xs: list[Tensor], density: float) -> Peers:
    if not _installed("peft"):
        return {}
    from peft.utils.merge_utils import ties

    b = _slice(base, PEER_ELEMENTS)
    deltas = [_slice(x, PEER_ELEMENTS) - b for x in xs]
    weights = torch.ones(len(xs))
    return {"peft": (lambda: ties(deltas, weights, density), _share(base, PEER_ELEMENTS))}


def fusion_bench_ties(base: Tensor, xs: list[Tensor], density: float) -> Peers:
    """As its TiesMergingAlgorithm merges flat vectors."""
    if not _installed("fusion_bench"):
        return {}
    b = _slice(base, SORT_ELEMENTS)
    tensors = [_slice(x, SORT_ELEMENTS) for x in xs]

    def call() -> object:
        # Imported in the first of two calls, the best of which counts: it takes seconds.
        from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

        with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress
            merged = ties_merging(torch.vstack(tensors) - b, density, "sum")
        return b + merged

    return {"fusion_bench": (call, _share(base, SORT_ELEMENTS))}


def fusion_bench_wudi(taus: list[Tensor], steps: int, share: float) -> Peers:
    """So many steps on one matrix, as `share` of what is compared."""
    if not _installed("fusion_bench"):
        return {}
    vectors = [{"w": t} for t in taus]

    def call() -> object:
        # Imported in the first of two calls, the best of which counts: it takes seconds.
        from fusion_bench.method.wudi.wudi import wudi_merging

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return wudi_merging(vectors, "cpu", steps)

    return {"fusion_bench": (call, share)}


def fusion_bench_regmean(ws: list[Tensor], grams: list[Tensor]) -> Peers:
    if not _installed("fusion_bench"):
        return {}

    def call() -> object:
        from fusion_bench.method.regmean_plusplus.regmean_plusplus import regmean_params_merge

        return regmean_params_merge(ws, grams)

    return {"fusion_bench": (call, 1.0)}


def torch_ties(base: Tensor, xs: list[Tensor], density: float) -> Peers:
    """TIES as one writes it in torch: top-k by sort, stacked masks."""
    b, tensors = _slice(base, SORT_ELEMENTS), [_slice(x, SORT_ELEMENTS) for x in xs]
    k = int(density * b.numel())

    def call() -> object:
        kept = []
        for x in tensors:
            d = x - b
            threshold = d.abs().sort().values[-k]
            kept.append(torch.where(d.abs() >= threshold, d, 0))
        stack = torch.stack(kept)
        agree = torch.sign(stack) == torch.where(stack.sum(0) >= 0, 1, -1)
        return b + (stack * agree).sum(0) / agree.sum(0).clamp(min=1)

    return {"torch": (call, _share(base, SORT_ELEMENTS))}
