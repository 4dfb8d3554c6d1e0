"""zip_match on the CPU in numpy, wherever the matrices are: each merge depends on the last."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ... import check


def zip_match(
    out: list[Tensor],
    correlations: list[Tensor],
    offsets: list[list[int]],
    widths: list[int],
    budgets: list[list[int]],
    alpha: float,
    zipit: bool,
) -> None:
    for labels, x, ends, width, allowed in zip(
        out, correlations, offsets, widths, budgets, strict=True
    ):
        given = x.to("cpu", check.accumulator(x.dtype)).numpy()
        matching = _Matching(given, ends, allowed, alpha, zipit)
        labels.copy_(torch.from_numpy(matching.labels(width)))


class _Matching:
    """Similarities between slots, and the largest of every row with its first place."""

    def __init__(
        self, given: np.ndarray, offsets: list[int], budgets: list[int], alpha: float, zipit: bool
    ) -> None:
        self.given, self.budgets, self.zipit = given, [*budgets], zipit
        self.exclusive, self.factor = alpha == 0, given.dtype.type(alpha or 1)
        self.models = list(map(slice, offsets[:-1], offsets[1:]))
        self.model = np.repeat(np.arange(len(budgets)), np.diff(offsets))
        self.merges: list[tuple[int, int]] = []
        self.lost: list[int] = []
        self.begin()
        for m, allowed in enumerate(budgets):
            if allowed == 0:
                self.forbid_within(m)

    def begin(self) -> None:
        """Similarities as they were given, and all slots."""
        self.s = self.given.copy()
        np.fill_diagonal(self.s, -np.inf)
        self.left = np.arange(len(self.s))
        self.top, self.first = np.zeros(len(self.s), self.s.dtype), np.zeros_like(self.left)
        self.look(self.left)

    def look(self, rows: np.ndarray) -> None:
        for k in rows:
            self.first[k] = self.s[k].argmax()
            self.top[k] = self.s[k, self.first[k]]

    def labels(self, width: int) -> np.ndarray:
        while len(self.left) > width:
            k = int(self.top.argmax())
            if self.top[k] > -np.inf:
                r, c = sorted((k, int(self.first[k])))
                self.merge(r, c)
                self.spend(r, c)
            elif self.zipit:
                self.lost.append(int(self.left[0]))
                self.remove(self.lost[-1])
            else:
                self.exclusive, self.budgets = False, [len(self.s)] * len(self.budgets)
                self.begin()
                merges, self.merges = self.merges, []
                for r, c in merges:
                    self.merge(r, c)
        return self.numbers()

    def merge(self, r: int, c: int) -> None:
        s, before = self.s, self.left
        self.merges.append((r, c))
        s[:, r] = np.minimum(s[:, r], s[:, c]) * self.factor
        s[r] = np.minimum(s[r], s[c]) * self.factor
        self.remove(c)
        if self.exclusive:
            for m in (self.model[r], self.model[c]):
                slots = self.models[m]
                s[before[slots] if self.zipit else slots, r] = -np.inf
                s[r, self.left[slots] if self.zipit else slots] = -np.inf
        old = self.left[self.left != r]
        changed = np.isin(self.first[old], (r, c)) | (s[old, r] >= self.top[old])
        self.look(np.append(old[changed], r))

    def remove(self, c: int) -> None:
        self.left = self.left[self.left != c]
        self.s[c] = self.s[:, c] = self.top[c] = -np.inf

    def spend(self, r: int, c: int) -> None:
        m = self.model[r]
        if m == self.model[c]:
            self.budgets[m] -= 1
            if self.budgets[m] == 0:
                self.forbid_within(m)

    def forbid_within(self, m: int) -> None:
        slots = self.models[m]
        self.s[slots, slots] = -np.inf
        self.look(self.left[self.model[self.left] == m])

    def numbers(self) -> np.ndarray:
        lowest = np.arange(len(self.s))
        for r, c in self.merges:
            lowest[c] = r
        labels = np.full(len(self.s), -1)
        groups = 0
        for k, low in enumerate(lowest.tolist()):
            if low != k:
                labels[k] = labels[low]
            elif k not in self.lost:
                labels[k] = groups
                groups += 1
        return labels
