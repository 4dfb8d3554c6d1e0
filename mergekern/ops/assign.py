"""assign, assign_heads: one-to-one matching of rows to columns, by scipy's solver."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from ._prices import priced

_GLANCE = 256  # rows from which on it is worth a look whether all have columns of their own
_LARGE = 1024  # rows from which on prices pay: of 768 the search is as short without
_EASY = 0.9  # share of the columns that are best for some row, from which on few rows compete

Item = TypeVar("Item")
Result = TypeVar("Result")


def assign(
    score: Any, *, maximize: bool = True, workers: int | None = None
) -> Tensor | list[Tensor]:
    """index = argmax (argmin) of sum_i score[i, index[i]] over one-to-one matchings.

    Shapes: score [n, m] with n <= m, any floating dtype; index int64 [n] on its device, with
    score[i, index[i]] matched. A list of matrices, of any sizes, or one tensor [B, n, m] gives a
    list, solved side by side.
    Result: an optimal matching of the scores in float64; which of several, scipy decides for
    float64 scores, and is left open for others.
    workers: threads that solve, by default MERGEKERN_THREADS or torch's number. scipy's solver
    releases the GIL.
    Cost: O(n^2 m) at worst; each worker holds a float64 copy of its matrix. Square matrices of
    1024 rows and more, other than float64, are searched from prices of their columns, which leave
    the optimum where it is: the scores of random layers of 3072 take a quarter of the time.
    Raises: ArgumentError for more rows than columns, NaN or infinities.
    Source: `scipy.optimize.linear_sum_assignment` (Crouse, 2016), prices by the auction of
    Bertsekas (1988); Permute of ZipIt and Git Re-Basin.

    >>> import torch
    >>> assign(torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.8, 0.0]]))
    tensor([1, 0])
    """
    op = "assign"
    several, scores = _matrices(op, score)
    for name, x in scores.items():
        if x.shape[0] > x.shape[1]:
            raise ArgumentError.of(
                op, f"{name} has more rows than columns", list(x.shape), "[n, m] with n <= m"
            )

    def solve(x: Tensor) -> Tensor:
        return _match(x.cpu(), maximize).to(x.device)

    found = _side_by_side(op, solve, [*scores.values()], workers)
    return found if several else found[0]


def assign_heads(
    score: Any, heads: int, *, maximize: bool = True, workers: int | None = None
) -> Tensor | list[Tensor]:
    """The best of the matchings that take every head, as a whole, to one head.

    Features of a head stay together: index[p * s + i] = q * s + j for heads p and q of s features.
    Each pair of heads has its own best matching of features; heads are matched by the totals of
    these, which gives the optimum, since features of one pair do not bear on another pair.

    Shapes: score [d, d] with d = heads * s; index int64 [d]. A list of matrices or one tensor
    [B, d, d] gives a list.
    Result, workers: as in `assign`; totals are float64.
    Cost: heads**2 assignments of s x s, one of heads x heads.
    Raises: ArgumentError for a matrix that is not square, heads that do not divide it, NaN or
    infinities.
    Source: group matching of attention heads in MuDSC (2403.01753).

    >>> import torch
    >>> score = torch.eye(4)[[3, 2, 0, 1]]
    >>> assign_heads(score, 2)
    tensor([3, 2, 0, 1])
    """
    op = "assign_heads"
    several, scores = _matrices(op, score)
    if not hasattr(heads, "__index__") or isinstance(heads, bool) or heads < 1:
        raise ArgumentError.of(op, "heads is no number of heads", repr(heads), "at least 1")
    heads = operator.index(heads)
    for name, x in scores.items():
        if x.shape[0] != x.shape[1] or x.shape[0] % heads:
            expected = f"[d, d] with d a multiple of {heads}"
            raise ArgumentError.of(
                op, f"{name} does not divide into heads", list(x.shape), expected
            )

    def match_features(blocks: Tensor) -> tuple[list[np.ndarray], list[float]]:
        """Of one head with each head."""
        pairs = _float64(blocks)
        matched = [_solve(x, maximize) for x in pairs]
        totals = [math.fsum(x[range(len(i)), i]) for x, i in zip(pairs, matched, strict=True)]
        return matched, totals

    rows = []
    for x in scores.values():
        size = len(x) // heads
        rows += [*x.reshape(heads, size, heads, size).transpose(1, 2)]
    found = iter(_side_by_side(op, match_features, rows, workers))
    result = []
    for x in scores.values():
        matched, totals = zip(*itertools.islice(found, heads), strict=True)
        partner = _solve(np.array(totals), maximize)
        size = len(x) // heads
        index = [matched[p][q] + q * size for p, q in enumerate(partner)]
        result.append(torch.from_numpy(np.concatenate(index)).to(x.device))
    return result if several else result[0]


def _matrices(op: str, score: Any) -> tuple[bool, dict[str, Tensor]]:
    """Whether several are given, and each with its name."""
    if isinstance(score, Sequence):
        scores = {f"score[{i}]": check.tensor(op, x, f"score[{i}]") for i, x in enumerate(score)}
    else:
        x = check.tensor(op, score, "score")
        scores = {f"score[{i}]": part for i, part in enumerate(x)} if x.ndim == 3 else {"score": x}
    for name, x in scores.items():
        if x.ndim != 2:
            raise ArgumentError.of(op, f"{name} is no matrix", list(x.shape), "[n, m]")
        check.finite(op, name, x)
    return "score" not in scores, scores


def _match(x: Tensor, maximize: bool) -> Tensor:
    """The best matching: found by a glance, with prices, or by the solver alone.

    float64 scores go to the solver as they are: their differences from prices may round.
    """
    rows, columns = x.shape
    if rows >= _GLANCE and x.dtype != torch.float64:
        favourite = x.argmax(1) if maximize else x.argmin(1)
        wanted = int((torch.bincount(favourite, minlength=columns) > 0).sum())
        if wanted == rows:
            return favourite
        if _LARGE <= rows == columns and wanted < _EASY * rows:
            return torch.from_numpy(_solve(priced(x, maximize), False))
    return torch.from_numpy(_solve(_float64(x), maximize))


def _float64(x: Tensor) -> np.ndarray:
    return x.to("cpu", torch.float64).numpy()


def _solve(score: np.ndarray, maximize: bool) -> np.ndarray:
    return linear_sum_assignment(score, maximize=maximize)[1]


def _side_by_side(
    op: str, task: Callable[[Item], Result], items: Sequence[Item], workers: int | None
) -> list[Result]:
    workers = check.threads() if workers is None else workers
    if not hasattr(workers, "__index__") or isinstance(workers, bool) or workers < 1:
        raise ArgumentError.of(op, "workers is no number of threads", repr(workers), "at least 1")
    if min(workers, len(items)) <= 1:
        return [task(x) for x in items]
    with ThreadPoolExecutor(min(workers, len(items)), "mergekern-assign") as pool:
        return list(pool.map(task, items))
