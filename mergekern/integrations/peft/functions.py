"""PEFT's functions, by their own names and signatures."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ... import bits
from ...keep import NOTHING, Keep
from ...ops.kth_magnitude import kth_magnitude
from ...ops.merge_deltas import merge_deltas
from .._pieces import pieces
from .fallback import (
    ELECT,
    UTILS,
    mean_dtype,
    product_dtype,
    served,
    theirs,
    why_not,
    why_not_drawn,
)


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """out = sum_i w_i x_i.

    Source: PEFT `task_arithmetic`.
    """
    reason = why_not(task_tensors, weights)
    if reason:
        return theirs("task_arithmetic", reason)(task_tensors, weights)
    served["task_arithmetic"] += 1
    return _weighted(task_tensors, weights)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """out = sum_i w_i trim_i(x_i), a trim keeping the int(density * numel) largest magnitudes.

    Source: PEFT `magnitude_prune`.
    """
    reason = why_not(task_tensors, weights, density)
    if reason:
        return theirs("magnitude_prune", reason)(task_tensors, weights, density)
    served["magnitude_prune"] += 1
    return _weighted(task_tensors, weights, _trims(task_tensors, density))


def ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Tensor:
    """out = sum of w_i trim_i(x_i) over the models of the elected sign, over their number.

    Votes are the trimmed x_i, before weights; a vote of 0 elects +.
    Source: PEFT `ties`.
    """
    reason = why_not(task_tensors, weights, density, majority_sign_method)
    if reason:
        return theirs("ties", reason)(task_tensors, weights, density, majority_sign_method)
    served["ties"] += 1
    return _elected(task_tensors, weights, majority_sign_method, _trims(task_tensors, density))


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """out = sum_i w_i drop_i(x_i) / density, drawn from torch's global generator as PEFT draws.

    Source: PEFT `dare_linear`.
    """
    reason = why_not(task_tensors, weights, density) or why_not_drawn(task_tensors, density)
    if reason:
        return theirs("dare_linear", reason)(task_tensors, weights, density)
    served["dare_linear"] += 1
    merge = functools.partial(_weighted, weights=weights)
    return _dropped(task_tensors, density, product_dtype(task_tensors[0], weights), merge)


def dare_ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Tensor:
    """`ties` of drop_i(x_i) / density, drawn from torch's global generator as PEFT draws.

    Source: PEFT `dare_ties`.
    """
    reason = why_not(task_tensors, weights, density, majority_sign_method)
    reason = reason or why_not_drawn(task_tensors, density)
    if reason:
        return theirs("dare_ties", reason)(task_tensors, weights, density, majority_sign_method)
    served["dare_ties"] += 1
    merge = functools.partial(_elected, weights=weights, method=majority_sign_method)
    return _dropped(task_tensors, density, mean_dtype(task_tensors[0], weights), merge)


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """The int(density * numel) largest magnitudes of `tensor`, 0 elsewhere (PEFT: -0 or 0).

    Source: PEFT `magnitude_based_pruning`.
    """
    reason = why_not([tensor], None, density)
    if reason is None and density > 1:
        reason = "a density above 1"
    if reason:
        return theirs("magnitude_based_pruning", reason)(tensor, density)
    served["magnitude_based_pruning"] += 1
    return merge_deltas(None, [tensor], [1.0], keep=[_trim(tensor, density)])


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        task_arithmetic,
        magnitude_prune,
        ties,
        dare_linear,
        dare_ties,
        magnitude_based_pruning,
    )
}


# ---- how it is computed ----------------------------------------------------------------------


def _trim(x: Tensor, density: float) -> Keep:
    k = int(density * x.numel())
    if k == x.numel():
        return None
    return kth_magnitude(x, k) if k else NOTHING


def _trims(xs: list[Tensor], density: float) -> list[Keep]:
    return [None] * len(xs) if _unpruned(xs, density) else [_trim(x, density) for x in xs]


def _unpruned(xs: list[Tensor], density: float) -> bool:
    """Whether nothing is pruned; PEFT's own `prune` warns of it then, once per tensor."""
    if density < 1:
        return False
    prune = importlib.import_module(UTILS).prune
    for x in xs:
        prune(x, density, method="magnitude")
    return True


def _weighted(
    xs: list[Tensor],
    weights: Tensor,
    keep: list[Keep] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    dtype = product_dtype(xs[0], weights)
    return merge_deltas(None, xs, weights.tolist(), keep=keep, out_dtype=dtype, out=out)


def _elected(
    xs: list[Tensor],
    weights: Tensor,
    method: str,
    keep: list[Keep] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    return merge_deltas(
        None,
        xs,
        weights.tolist(),
        keep=keep,
        elect=ELECT[method],
        zero="positive",
        weigh="after",
        normalize="count",
        out_dtype=mean_dtype(xs[0], weights),
        out=out,
    )


def _dropped(
    xs: list[Tensor], density: float, dtype: torch.dtype, merge: Callable[..., Tensor]
) -> Tensor:
    """`merge` of what PEFT's draws leave of each tensor, piece by piece, in PEFT's arithmetic.

    All draws of a tensor come before those of the next, so they are stored, a bit per element.
    """
    out = torch.empty(xs[0].shape, dtype=dtype)
    if _unpruned(xs, density):
        return merge(xs, out=out)
    parts = pieces(xs)
    chance = torch.full((max(p.size for p in parts),), density, dtype=xs[0].dtype)
    masks = [[bits.pack(torch.bernoulli(chance[: p.size]).bool()) for p in parts] for _ in xs]
    for i, p in enumerate(parts):
        kept = [p.of(x) * bits.unpack(m[i], 0, p.size).to(x.dtype) for x, m in zip(xs, masks)]
        merge([x / density for x in kept], out=p.of(out))
    return out
