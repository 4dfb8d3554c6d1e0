"""ZipIt's `matching_functions` on `zip_match` and `assign`: the same names and signatures.

Each takes a metric (a dict with the covariance of the features of N models one after another) and
the share r = 1 - 1 / N to reduce it by, and returns merge [G, N C] and unmerge [N C, G].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.assign import assign
from ...ops.zip_match import zip_match
from .metric_calculators import compute_correlation

Matrices = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]

exact = {"host": False}  # set by install(host=True)


def add_bias_to_mats(mats: list[Tensor]) -> list[Tensor]:
    """Each with one more row and column, zeros but for a 1 where they meet."""
    padded = [torch.nn.functional.pad(mat, (0, 1, 0, 1)) for mat in mats]
    for mat in padded:
        mat[-1, -1] = 1
    return padded


def match_tensors_zipit(
    metric: dict[str, Tensor],
    r: float = 0.5,
    a: float = 0.3,
    b: float = 0.125,
    print_merges: bool = False,
    get_merge_value: bool = False,
    add_bias: bool = False,
    **kwargs: Any,
) -> Matrices:
    """Greedy matching within and across models (`zip_match`), as matrices.

    The groups of the original. It loses features where, for three models or more, nothing may be
    merged any more, and for a <= 0 forbids the wrong pairs; here neither happens unless
    install(host=True) asks for it. `get_merge_value` gives the mean similarity of each merged
    feature to the first one of its group, where the original averages entries of a matrix of zeros
    and ones.
    """
    sims = compute_correlation(metric["covariance"]) if "covariance" in metric else metric["cossim"]
    total, models = len(sims), _models(r)
    labels = zip_match(
        sims.cpu(),
        [total // models] * models,
        out_dim=None if exact["host"] else int(total * (1 - r) + 1e-4),
        alpha=max(0.0, a),
        beta=b,
        host="zipit" if exact["host"] else None,
    )
    groups = int(labels.max()) + 1
    unmerge = torch.zeros(total, groups)
    kept = torch.nonzero(labels >= 0)[:, 0]
    unmerge[kept, labels[kept]] = 1
    merge = _averaging(unmerge).to(sims.device)
    if print_merges:
        several = (torch.stack(unmerge.chunk(models)).sum(1) > 0).sum(0) > 1
        print(f"groups of one model: {int((~several).sum())} | of several: {int(several.sum())}")
    parts = add_bias_to_mats([*unmerge.chunk(models)]) if add_bias else [unmerge]
    unmerge = torch.cat(parts).to(sims.device)
    if not get_merge_value:
        return merge, unmerge
    return merge, unmerge, _similarity(sims.cpu(), labels, groups)


def match_tensors_permute(
    metric: dict[str, Tensor],
    r: float = 0.5,
    get_merge_value: bool = False,
    add_bias: bool = False,
    **kwargs: Any,
) -> Matrices:
    """Every model's features in the order of the first model's, by the best assignment (`assign`).

    `get_merge_value` gives the mean correlation of the last model's pairs, as the original.
    """
    correlation = compute_correlation(metric["covariance"])
    models = _models(r)
    size = len(correlation) // models
    scores = [correlation[:size, size * i : size * (i + 1)] for i in range(1, models)]
    found = assign([x.double() for x in scores])  # of several best ones the original's
    eye = torch.eye(size, device=correlation.device)
    matrices = _identical([eye, *(eye[:, i] for i in found)], add_bias)
    if not get_merge_value:
        return matrices
    return (*matrices, scores[-1][range(size), found[-1]].mean())


def match_tensors_identity(
    metric: dict[str, Tensor], r: float = 0.5, add_bias: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Feature i of every model is one feature: plain averages."""
    covariance, models = metric["covariance"], _models(r)
    eye = torch.eye(len(covariance) // models, device=covariance.device)
    return _identical([eye] * models, add_bias)


def _models(r: float) -> int:
    return int(1 / (1 - r) + 0.5)


def _averaging(unmerge: Tensor) -> Tensor:
    return (unmerge / (unmerge.sum(0) + 1e-5)).T


def _identical(mats: list[Tensor], add_bias: bool) -> tuple[Tensor, Tensor]:
    merge = _averaging(torch.cat(mats))
    return merge, torch.cat(add_bias_to_mats(mats) if add_bias else mats)


def _similarity(sims: Tensor, labels: Tensor, groups: int) -> Tensor:
    first = torch.full((groups,), len(labels)).scatter_reduce(
        0, labels.clamp(min=0), torch.arange(len(labels)), "amin"
    )
    others = torch.ones(len(labels), dtype=torch.bool)
    others[first] = False
    others &= labels >= 0
    return sims[others, first[labels[others]]].mean()
