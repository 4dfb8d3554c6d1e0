"""Prices of columns: they leave the best matchings as they are and shorten the search for one."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .. import check

_CANDIDATES = 32  # columns that a row bids for
_STEPS = (2.0**-5, 2.0**-7, 2.0**-9)  # what a bid adds, in spreads of the candidates of a row
_ROUNDS = 100  # of one step; a few rows of thousands may still wait then
_BLOCK = 1 << 14  # elements that are converted at once: they stay in cache, in one thread


def priced(score: Tensor, maximize: bool) -> np.ndarray:
    """cost[i, j] = price[j] - score[i, j], or + to minimize: to be matched at least cost.

    Every matching of a square matrix pays the sum of all prices, so the best ones stay the best.
    A solver that starts near prices at which each row has a column to itself seldom has to move
    rows that it has placed.

    Shapes: score [n, n] on the CPU, not float64; the costs are float64.
    Result: prices are float32 numbers times a power of two, so a cost is exact where its price and
    its score of up to 24 bits lie within 2**28 of each other; others round as the solver's sums do.
    Cost: the 32 best of each row, some milliseconds of bids, a float64 copy.
    """
    sign = -1 if maximize else 1
    price = _prices(score, maximize)
    cost = check.output("assign", None, score, dtype=torch.float64)
    step = max(1, _BLOCK // len(score))
    for i in range(0, len(score), step):
        torch.add(price, score[i : i + step].double(), alpha=sign, out=cost[i : i + step])
    return cost.numpy()


def _prices(score: Tensor, maximize: bool) -> Tensor:
    """float64 [n]; zeros where rows compete for so few columns that candidates say little."""
    best, column = score.topk(_CANDIDATES, largest=maximize)
    value = best.double() - best[:, :1].double()
    value = value if maximize else -value
    scale = 2.0 ** math.frexp(-float(value[:, -1].mean()))[1]
    price = _auction((value / scale).float().numpy(), column.numpy())
    return torch.from_numpy(price).double() * scale


def _auction(value: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Prices at which nearly every row has a column that is its best one to a last step.

    Bertsekas' auction, all rows at once, with steps that become smaller.
    """
    n = len(value)
    price = np.zeros(n, np.float32)
    for step in _STEPS:
        owner, waiting = np.full(n, -1), np.arange(n)
        for _ in range(_ROUNDS):
            if not len(waiting):
                break
            waiting = _bid(value, column, price, owner, waiting, np.float32(step))
        if len(waiting) > n // 2:
            return np.zeros_like(price)
    return price


def _bid(
    value: np.ndarray,
    column: np.ndarray,
    price: np.ndarray,
    owner: np.ndarray,
    waiting: np.ndarray,
    step: np.float32,
) -> np.ndarray:
    """Waiting rows offer for their best column what makes it worth the second best, and a step.

    The highest bid gets the column. Returns the rows that wait then.
    """
    net = value[waiting] - price[column[waiting]]
    rows = np.arange(len(waiting))
    best = net.argmax(1)
    top = net[rows, best]
    net[rows, best] = -np.inf
    wanted = column[waiting, best]
    bid = price[wanted] + (top - net.max(1)) + step
    order = bid.argsort(kind="stable")  # of several values for one place numpy keeps the last
    waiting, wanted = waiting[order], wanted[order]
    before = owner[wanted]
    owner[wanted], price[wanted] = waiting, bid[order]
    return np.concatenate([waiting[owner[wanted] != waiting], np.unique(before[before >= 0])])
