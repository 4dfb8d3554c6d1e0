"""zip_match: groups of features to merge, within and across models."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ._cost import Cost

OP = "zip_match"


@overload
def zip_match(
    correlation: Tensor | np.ndarray,
    sizes: Sequence[int],
    *,
    out_dim: int | Sequence[int] | None = ...,
    alpha: float = ...,
    beta: float = ...,
    budgets: Sequence[int] | None = ...,
    groups: Any = ...,
    host: str | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def zip_match(
    correlation: Sequence[Tensor | np.ndarray],
    sizes: Sequence[Sequence[int]],
    *,
    out_dim: Sequence[int | Sequence[int] | None] | None = ...,
    alpha: float = ...,
    beta: float = ...,
    budgets: Sequence[Sequence[int] | None] | None = ...,
    groups: Sequence[Any] | None = ...,
    host: str | None = ...,
    backend: str = ...,
) -> list[Tensor]: ...
def zip_match(
    correlation: Any,
    sizes: Any,
    *,
    out_dim: Any = None,
    alpha: float = 0.3,
    beta: float = 0.125,
    budgets: Any = None,
    groups: Any = None,
    host: str | None = None,
    backend: str = "auto",
) -> Tensor | list[Tensor]:
    """labels[i] = the group that feature i is merged into, by greedy matching as in ZipIt.

    The two most similar groups become one until `out_dim` are left. The similarity of a merged
    group to another is alpha times the smaller one of its two parts, also where that is negative;
    for alpha = 0 it is the smaller one itself, and the group takes no further partner from the
    models it contains. Each model has a budget of merges of its own features with each other
    (groups count as of the model of their first feature); when it is used up, no two of them are
    merged any more.

    Shapes: correlation [S, S] for S = sum(sizes) features of len(sizes) models one after another;
    labels int64 [S], groups counted from 0 in the order of their first features. A list of
    matrices, with a list of sizes (and of whatever of out_dim, budgets and groups is given), gives
    a list of labels; these are worked on in parallel.
    out_dim: max(sizes) by default, which for equal sizes is ZipIt's width.
    budgets: one number of merges for each model; 0 forbids them. By default each is
    max(1, int((S - out_dim) // len(sizes) * beta + 1e-4)), as in ZipIt, whose beta = 0 still lets
    one merge in each model happen.
    groups: int64 [S]; only features of the same group are merged (heads that were matched before,
    or groups of a norm), as if each group were a matrix of its own: out_dim is then one width for
    each group, in the order of their numbers, and budgets hold within each.
    Result: exact, the same on every backend: float32 similarities (float64 ones of a float64
    matrix; 16-bit values widened), each product rounded once. Of equal similarities that of the
    lowest row comes first, then of the lowest column. Labels are those of ZipIt's code wherever
    that loses no feature and alpha > 0. Where nothing may be merged any more (three models, small
    budgets) the code of ZipIt drops features; here everything forbidden is allowed from there on,
    with the similarities it would have had, and no feature is lost. A matrix that is not symmetric
    is read as it is: a pair has two similarities.
    host="zipit": the code's own result. For alpha = 0 its ranges of forbidden partners shift as
    features are merged. Lost features get the label -1, and a warning says how many.
    Cost: one read of the matrix, one write of a copy, which is all the memory needed; after that
    about S operations for each of the S - out_dim merges. No kernel runs on a GPU: matrices there
    are copied to the host, once, and matched there.
    Raises: ArgumentError for NaN or infinite correlations, sizes that do not add up, alpha or beta
    outside 0 to 1, a width that is not 1 to S.
    Source: ZipIt! (Stoica et al., 2305.03053), `match_tensors_zipit`.

    >>> import torch
    >>> c = torch.tensor([[1, 0.2, 0.1, 0.9], [0.2, 1, 0.3, 0], [0.1, 0.3, 1, 0], [0.9, 0, 0, 1]])
    >>> zip_match(c, [2, 2])
    tensor([0, 1, 1, 0])
    >>> zip_match([c, c], [[2, 2], [1, 3]], out_dim=[2, 1])
    [tensor([0, 1, 1, 0]), tensor([0, 0, 0, 0])]
    """
    check.choice(OP, "host", host, (None, "zipit"))
    alpha, beta = _share("alpha", alpha), _share("beta", beta)
    if alpha and not np.float32(alpha):
        raise ArgumentError.of(OP, "alpha is 0 in float32", alpha, "0, or 1e-45 to 1")
    several = isinstance(correlation, Sequence)
    given = {"sizes": sizes, "out_dim": out_dim, "budgets": budgets, "groups": groups}
    if several:
        n = len(correlation)
        rows = [_each(name, values, n) for name, values in given.items()]
        names = [f"correlation[{i}]" for i in range(n)]
    else:
        correlation, names = [correlation], ["correlation"]
        rows = [[values] for values in given.values()]
    if not correlation:
        raise ArgumentError.of(OP, "correlation is empty", "no matrix", "at least one")
    checked = [_matrix(name, x) for name, x in zip(names, correlation, strict=True)]
    for name, x in zip(names[1:], checked[1:], strict=True):
        check.same(OP, name, x, names[0], checked[0], shape=False)
    device = checked[0].device
    checked = [x.cpu() for x in checked]
    problems = [_tasks(x, host, beta, *row) for x, *row in zip(checked, *rows, strict=True)]
    tasks = list(itertools.chain.from_iterable(problems))
    out = [torch.empty(len(t.correlation), dtype=torch.int64) for t in tasks]
    chosen = dispatch.select(backend, OP, checked[0].device, checked[0].dtype)
    dispatch.load(chosen, OP)(
        out,
        [t.correlation for t in tasks],
        [t.offsets for t in tasks],
        [t.width for t in tasks],
        [t.budgets for t in tasks],
        alpha,
        host == "zipit",
    )
    found = iter(out)
    labels = [_together(x, p, found) for x, p in zip(checked, problems, strict=True)]
    lost = sum(int((x == -1).sum()) for x in labels)
    if lost:
        warnings.warn(f"{OP}: ZipIt's code loses {lost} features", RuntimeWarning, stacklevel=2)
    labels = [x.to(device) for x in labels]
    return labels if several else labels[0]


class _Task(NamedTuple):
    """One matching, of a whole matrix or of the features of a group."""

    correlation: Tensor
    features: Tensor | None
    offsets: list[int]
    width: int
    budgets: list[int]


def _tasks(
    x: Tensor,
    host: str | None,
    beta: float,
    sizes: Any,
    out_dim: Any,
    budgets: Any,
    groups: Any,
) -> list[_Task]:
    counts = _integers("sizes", sizes, least=0)
    if not counts:
        raise ArgumentError.of(OP, "sizes is empty", "no model", "the size of at least one")
    if sum(counts) != len(x):
        raise ArgumentError.of(OP, "sizes do not add up", f"{counts}", f"a sum of {len(x)}")
    if host is not None:
        _only_sizes(counts, out_dim=out_dim, budgets=budgets, groups=groups)
    if budgets is not None:
        budgets = _integers("budgets", budgets, least=0)
        if len(budgets) != len(counts):
            raise ArgumentError.of(OP, "budgets has the wrong length", len(budgets), len(counts))
    if groups is None:
        return [_task(x, None, counts, beta, out_dim, budgets)]
    numbers = check.tensor(OP, groups, "groups", floating=False).cpu()
    if numbers.shape != x.shape[:1] or numbers.dtype not in (torch.int64, torch.int32):
        got = f"{check.name_of(numbers.dtype)} {list(numbers.shape)}"
        raise ArgumentError.of(OP, "groups does not fit", got, f"int64 [{len(x)}]")
    which = torch.unique(numbers)
    widths = [None] * len(which) if out_dim is None else _integers("out_dim", out_dim, least=1)
    if len(widths) != len(which):
        raise ArgumentError.of(
            OP, "out_dim has the wrong length", len(widths), f"{len(which)}, one for each group"
        )
    model = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    tasks = []
    for number, width in zip(which, widths, strict=True):
        features = torch.nonzero(numbers == number)[:, 0]
        part = x.index_select(0, features).index_select(1, features)
        inside = torch.bincount(model[features], minlength=len(counts)).tolist()
        tasks.append(_task(part, features, inside, beta, width, budgets))
    return tasks


def _task(
    x: Tensor,
    features: Tensor | None,
    sizes: list[int],
    beta: float,
    out_dim: Any,
    budgets: list[int] | None,
) -> _Task:
    offsets = [0, *itertools.accumulate(sizes)]
    width = max(sizes) if out_dim is None else _integers("out_dim", [out_dim], least=0)[0]
    if not min(len(x), 1) <= width <= len(x):
        raise ArgumentError.of(OP, "out_dim is out of range", width, f"1 to {len(x)}")
    if budgets is None:
        allowed = int((len(x) - width) // len(sizes) * beta + 1e-4)
        budgets = [max(1, allowed)] * len(sizes)
    return _Task(x, features, offsets, max(1, width), budgets)


def _together(x: Tensor, tasks: list[_Task], found: Iterator[Tensor]) -> Tensor:
    """Labels of all features from those of each task, counted by their lowest features."""
    if any(task.features is None for task in tasks):
        return next(found)
    size = len(x)
    labels = torch.empty(size, dtype=torch.int64)
    count = 0
    for task in tasks:
        labels[task.features] = next(found) + count
        count += task.width
    first = torch.full((count,), size)
    first.scatter_reduce_(0, labels, torch.arange(size), "amin")
    return first.argsort().argsort()[labels]


def _matrix(name: str, x: Any) -> Tensor:
    x = check.tensor(OP, x, name)
    if x.ndim != 2 or x.shape[0] != x.shape[1]:
        raise ArgumentError.of(OP, f"{name} is no square matrix", list(x.shape), "[S, S]")
    check.finite(OP, name, x)
    return x


def _only_sizes(sizes: list[int], **others: Any) -> None:
    """ZipIt's code knows equal sizes, and none of the others."""
    for name, value in others.items():
        if value is not None:
            raise ArgumentError.of(OP, f"{name} is unknown to host='zipit'", repr(value), None)
    if len(sizes) < 2 or len(set(sizes)) > 1:
        raise ArgumentError.of(
            OP, "sizes do not suit host='zipit'", sizes, "two or more of one size"
        )


def _share(name: str, value: Any) -> float:
    number = check.number(OP, name, value)
    if not 0 <= number <= 1:
        raise ArgumentError.of(OP, f"{name} is out of range", number, "0 to 1")
    return number


def _integers(name: str, values: Any, *, least: int) -> list[int]:
    if isinstance(values, Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ArgumentError.of(OP, f"{name} is no list", repr(values), "a sequence of integers")
    for v in values:
        if not hasattr(v, "__index__") or isinstance(v, bool) or v < least:
            raise ArgumentError.of(
                OP, f"{name} holds no such number", repr(v), f"integers of at least {least}"
            )
    return [operator.index(v) for v in values]


def _each(name: str, values: Any, n: int) -> list[Any]:
    """One of it for each matrix of a list."""
    if values is None:
        return [None] * n
    if not isinstance(values, Sequence) or len(values) != n:
        got = len(values) if isinstance(values, Sequence) else repr(values)
        raise ArgumentError.of(OP, f"{name} is no list of one for each matrix", got, n)
    return list(values)


def cost(size: int, width: int, itemsize: int) -> Cost:
    """One read of the matrix and one write of the copy; a minimum and a product for each slot."""
    copy = size * size * max(4, itemsize)
    merged = size - width
    return Cost(size * size * itemsize + copy, merged * (size + width + 1))
