"""PEFT's combinations: first and second factors merged apart, or whole task vectors, truncated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from ..methods.merge import merge_tensors
from .adapter import Factors
from .fit import OP
from .truncation import best_of_rank

# PEFT's names of what merges factors, and the method that merges them.
FACTORED = {
    "linear": "task_arithmetic",
    "ties": "ties",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
    "magnitude_prune": "magnitude_prune",
}

Given = Mapping[str, Sequence[Factors]]  # of each module, the factors of every adapter
Pairs = dict[str, tuple[Tensor, Tensor]]  # of each module, the merged (b, a) in float64


def factored(
    given: Given,
    inner: str,
    weights: Sequence[float],
    dtype: torch.dtype,
    arguments: Mapping[str, Any],
) -> Pairs:
    """a = merged sqrt|w_i| a_i, with the sign of w_i, and b = merged sqrt|w_i| b_i.

    The scale of a task vector is part of its weight under host="peft"; else its root is on both
    factors, where a method that divides by the sum of weights keeps it. lambda is shared
    out as the weights are.
    Raises: ArgumentError for unequal ranks.
    """
    _require_equal_ranks(given)
    arguments = {name.removesuffix("_"): value for name, value in arguments.items()}
    factor = check.number(OP, "lambda", arguments.pop("lambda", 1.0))
    root = math.sqrt(abs(factor))
    pairs: Pairs = {}
    for name, fs in given.items():
        first: list[Tensor] = []
        second: list[Tensor] = []
        rank, roots, signed = max(f.rank for f in fs), [], []
        for f, weight in zip(fs, weights, strict=True):
            on, of = (1.0, weight * f.scale) if arguments["host"] else (abs(f.scale), weight)
            a, b = f.a, f.b
            if not f.rank:  # a module that this adapter leaves as it is
                a, b = a.new_zeros(rank, a.shape[1]), b.new_zeros(len(b), rank)
            first.append((math.sqrt(on) * a.double()).to(dtype))
            second.append((math.sqrt(on) * b.double()).to(dtype))
            roots.append(math.sqrt(abs(of)))
            signed.append(math.copysign(roots[-1], weight * f.scale))
        a = _merged(f"{name}.a", first, inner, {**arguments, "weight": signed})
        b = _merged(f"{name}.b", second, inner, {**arguments, "weight": roots})
        pairs[name] = root * b.double(), math.copysign(root, factor) * a.double()
    return pairs


def dense(
    given: Given, inner: str, rank: int, dtype: torch.dtype, arguments: Mapping[str, Any]
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The best factors of the merged task vectors and what these lose, a module at a time."""
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name, fs in given.items():
        deltas = [((f.scale * f.b.double()) @ f.a.double()).to(dtype) for f in fs]
        merged = _merged(name, deltas, inner, arguments)
        check.finite(OP, f"the merged {name}", merged)
        found[name] = best_of_rank(merged, rank)
    return found


def _merged(name: str, xs: list[Tensor], inner: str, arguments: Mapping[str, Any]) -> Tensor:
    return merge_tensors(xs, inner, base=torch.zeros_like(xs[0]), name=name, **arguments)


def _require_equal_ranks(given: Given) -> None:
    ranks = {name: sorted({f.rank for f in fs if f.rank}) for name, fs in given.items()}
    unequal = [f"{name} of ranks {', '.join(map(str, of))}" for name, of in ranks.items() if of[1:]]
    if unequal:
        raise ArgumentError.of(
            OP,
            "factors of other ranks cannot be merged apart",
            ", ".join(unequal),
            "equal ranks, or the method with _svd",
        )
