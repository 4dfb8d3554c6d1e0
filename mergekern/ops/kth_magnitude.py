"""kth_magnitude: the exact threshold of a trim, of a tensor or a whole model, without a sort."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import check, digits, dispatch
from ..errors import ArgumentError
from ..keep import Threshold
from ._cost import Cost

_OP = "kth_magnitude"


def kth_magnitude(
    x: Tensor | Sequence[Tensor],
    k: int,
    *,
    base: Tensor | Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Threshold:
    """The k-th largest |x|, or |x - base|, with the counts that keep exactly k elements.

    Shapes: any, any strides; `base` as x. 1 <= k <= x.numel(). A sequence of tensors (and of as
    many bases) is one vector, end to end: the threshold of a whole model without a flat copy.
    Result: exact. Differences are rounded to float32 (float64 for float64), as `merge_deltas`
    takes them. `above` counts larger magnitudes, `equal` those equal to `value`; kept are the
    larger ones and, among the equal, those at a flat index below `cut` (lowest first;
    `Threshold.from_index` gives the rule of one tensor of a sequence). Every NaN ranks above
    infinity and equals every other NaN.

    Cost: one read of x (and base), plus one more where the sample misleads; never a sort of x.
    16-bit x without base: a histogram of its 32768 bit patterns. Otherwise a sample brackets the
    rank and one pass counts above, at and inside the bracket (torch backend: 16-bit digits). A
    sequence: one read per 16 bits of the keys, and one of the tensors up to the cut.
    Raises: ArgumentError if k is out of range or base differs in shape, dtype or device.
    Source: the trim of TIES (Yadav et al., 2306.01708); mergekit `sparsify.magnitude`.

    >>> import torch
    >>> kth_magnitude(torch.tensor([1.0, -3.0, 2.0, 2.0]), 2)
    Threshold(value=2.0, above=1, equal=2, cut=3)
    >>> kth_magnitude([torch.tensor([1.0, -3.0]), torch.tensor([2.0, 2.0])], 2)
    Threshold(value=2.0, above=1, equal=2, cut=3)
    """
    if not isinstance(x, Tensor) and isinstance(x, Sequence):
        return _of_sequence(x, k, base, backend)
    x = check.tensor(_OP, x, "x")
    if base is not None:
        base = check.tensor(_OP, base, "base")
        check.same(_OP, "base", base, "x", x)
    return kth_magnitudes([x], [[_rank(k, x.numel())]], base=base, backend=backend)[0][0]


def _rank(k: Any, total: int) -> int:
    if not hasattr(k, "__index__") or isinstance(k, bool) or not 1 <= k <= total:
        raise ArgumentError.of(_OP, "k is out of range", k, f"1 to {total}")
    return operator.index(k)


def kth_magnitudes(
    xs: Sequence[Tensor],
    ranks: Sequence[Sequence[int]],
    *,
    base: Tensor | None = None,
    rounded: bool = False,
    backend: str = "auto",
) -> list[list[Threshold]]:
    """Several ranks of each of several task vectors in one pass: base is read once.

    rounded: differences are rounded to the dtype of x first, as tools do that compute in it.
    xs and base have been checked; ranks lie within 1 to numel.
    """
    chosen = dispatch.select(backend, _OP, xs[0].device, xs[0].dtype)
    found = dispatch.load(chosen, _OP)(list(xs), base, [list(r) for r in ranks], rounded)
    return [[Threshold(*one) for one in of_x] for of_x in found]


class WholeModel:
    """The threshold of a vector that is seen piece by piece, once per pass.

    `rank` gives k from the number of elements. While `unfinished`: `update` with every piece, in
    the same order in every pass, then `end_pass`.
    """

    def __init__(self, rank: Callable[[int], int], backend: str = "auto") -> None:
        self._rank, self._backend = rank, backend
        self._histogram = np.zeros(1 << 16, np.int64)
        self._prefix = self._above = 0
        self._equal, self._total, self._k = 0, 0, 0
        self._bits = self._shift = 0
        self._acc = torch.float32
        self.unfinished = True

    def update(self, x: Tensor, base: Tensor | None = None) -> None:
        if not self._bits:
            self._acc = torch.float64 if x.dtype == torch.float64 else torch.float32
            self._bits = 64 if x.dtype == torch.float64 else 32
            self._shift = self._bits - 16
        elif (x.dtype == torch.float64) != (self._bits == 64):
            got = check.name_of(x.dtype)
            raise ArgumentError.of(_OP, "float64 mixed with narrower types", got, "one of both")
        chosen = dispatch.select(self._backend, _OP, x.device, x.dtype)
        count = dispatch.load(chosen, _OP, "digit_histogram")
        self._histogram += count(x, base, self._prefix, self._shift)

    def end_pass(self) -> None:
        if not self._k:
            self._total = int(self._histogram.sum())
            self._k = _rank(self._rank(self._total), self._total)
        digit, above, self._equal = digits.in_histogram(self._histogram, self._k - self._above)
        self._prefix = self._prefix << 16 | digit
        self._above += above
        self._histogram[:] = 0
        self._shift -= 16
        self.unfinished = self._shift >= 0

    @property
    def threshold(self) -> Threshold:
        """Keeps every tie: `cut` is past the end."""
        value = digits.key_value(self._prefix, self._acc)
        return Threshold(value, self._above, self._equal, self._total)

    @property
    def ties(self) -> int:
        """How many of the equal ones are within the k."""
        return self._k - self._above


def _of_sequence(given: Sequence[Tensor], k: int, base: Any, backend: str) -> Threshold:
    xs = [check.tensor(_OP, x, f"x[{i}]") for i, x in enumerate(given)]
    bases: list[Tensor | None] = [None] * len(xs)
    if base is not None:
        if isinstance(base, Tensor) or len(base) != len(xs):
            got = "a tensor" if isinstance(base, Tensor) else len(base)
            raise ArgumentError.of(_OP, "base has the wrong length", got, len(xs))
        for i, x in enumerate(xs):
            b = check.tensor(_OP, base[i], f"base[{i}]")
            check.same(_OP, f"base[{i}]", b, f"x[{i}]", x)
            bases[i] = b
    pairs: list[tuple[Tensor, Tensor | None]] = list(zip(xs, bases, strict=True))
    whole = WholeModel(lambda total: _rank(k, total), backend)
    while whole.unfinished:
        for x, origin in pairs:
            whole.update(x, origin)
        whole.end_pass()
    found, left, first = whole.threshold, whole.ties, 0
    if found.equal == left:
        return found
    for x, origin in pairs:
        ties, cut = ties_of(x, found.value, left, origin, backend)
        if ties >= left:
            return found._replace(cut=first + cut)
        left -= ties
        first += x.numel()
    raise AssertionError("fewer ties than were counted")


def ties_of(
    x: Tensor, value: float, left: int, base: Tensor | None = None, backend: str = "auto"
) -> tuple[int, int]:
    """How many magnitudes equal `value`, at most `left`, and the cut that keeps so many."""
    if not left or not x.numel():
        return 0, 0
    chosen = dispatch.select(backend, _OP, x.device, x.dtype)
    ties, index = dispatch.load(chosen, _OP, "place_of_tie")(x, base, value, left)
    return min(ties, left), x.numel() if ties < left else index + 1


def cost(numel: int, itemsize: int, *, base: bool = False) -> Cost:
    """One read."""
    return Cost(numel * itemsize * (2 if base else 1), numel)
