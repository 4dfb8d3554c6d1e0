"""kth_magnitude: the exact threshold of a trim, of a tensor or a whole model, without a sort."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import check, digits, dispatch
from ..digits import Gather, alone
from ..errors import ArgumentError
from ..keep import NOTHING, Threshold
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
    cpu, 16-bit x without base: a histogram of its 32768 bit patterns. Otherwise a sample brackets
    the rank and one pass counts above, at and inside the bracket (torch: 16-bit digits). A
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
    """The thresholds of a vector that is seen piece by piece, once per pass, for several ranks.

    Each of `ranks` gives a k from the number of elements, 0 to keep nothing. While `unfinished`:
    `update` with every piece, then `end_pass`. Where `splits_ties`, one more pass: `rules` of every
    piece, in the same order for all who count. Several processes have pieces of one vector:
    `gather` gives what each has counted.
    """

    _op = _OP

    def __init__(
        self,
        ranks: Sequence[Callable[[int], int]],
        backend: str = "auto",
        *,
        rounded: bool = False,
        nonzero: bool = False,
    ) -> None:
        self._descent = digits.Descent(ranks, nonzero=nonzero)
        self._backend, self._rounded = backend, rounded
        self._passed = [0] * len(ranks)  # ties in the pieces before

    @property
    def unfinished(self) -> bool:
        return self._descent.unfinished

    def update(
        self, xs: Sequence[Tensor], base: Tensor | None = None, shared: dict | None = None
    ) -> None:
        """One tensor, in a list; of a variance, one of each model. shared: what others counted."""
        bits = 64 if xs[0].dtype == torch.float64 else 32
        if self._descent.bits not in (0, bits):
            got = check.name_of(xs[0].dtype)
            raise ArgumentError.of(_OP, "float64 mixed with narrower types", got, "one of both")
        chosen = dispatch.select(self._backend, self._op, xs[0].device, xs[0].dtype)
        count = dispatch.load(chosen, self._op, "digit_histogram")
        known: dict = {} if shared is None else shared

        def histogram(prefix: int, shift: int) -> np.ndarray:
            key = (self._op, id(xs[0]), prefix, shift, self._rounded)
            if key not in known:
                known[key] = count(list(xs), base, prefix, shift, self._rounded)
            return known[key]

        self._descent.add(bits, histogram)

    def end_pass(self, gather: Gather = alone) -> None:
        self._descent.end_pass(gather)

    @property
    def thresholds(self) -> list[Threshold]:
        """One per rank; keeps every tie: `cut` is past the end."""
        d = self._descent
        acc = torch.float64 if d.bits == 64 else torch.float32
        return [
            Threshold(digits.key_value(key, acc), above, equal, d.total) if k else NOTHING
            for k, key, above, equal in d.found
        ]

    @property
    def ties(self) -> list[int]:
        """How many of the equal ones are within each k."""
        return [k - above for k, _, above, _ in self._descent.found]

    @property
    def splits_ties(self) -> bool:
        """Whether some of the equal ones are not kept, for any rank."""
        return any(t.equal > ties for t, ties in zip(self.thresholds, self.ties, strict=True))

    def count_ties(self, xs: Sequence[Tensor], base: Tensor | None = None) -> list[int]:
        """How many magnitudes of a piece equal each value."""
        n = xs[0].numel()
        return [self._place(xs, base, t.value, n + 1)[0] if n else 0 for t in self.thresholds]

    def rules(
        self,
        xs: Sequence[Tensor],
        base: Tensor | None = None,
        before: Sequence[int] | None = None,
    ) -> list[Threshold]:
        """The thresholds for the next piece: of the equal ones, the first in the vector stay.

        before: ties in the pieces before this one, where others hold some of them.
        """
        n, result = xs[0].numel(), []
        passed = self._passed if before is None else before
        for i, (found, ties) in enumerate(zip(self.thresholds, self.ties, strict=True)):
            left = max(0, ties - passed[i])
            there, cut = 0, 0
            if left and n:
                there, index = self._place(xs, base, found.value, left)
                cut = n if there < left else index + 1
            self._passed[i] += min(there, left)
            result.append(found._replace(cut=cut))
        return result

    def _place(
        self, xs: Sequence[Tensor], base: Tensor | None, value: float, rank: int
    ) -> tuple[int, int]:
        chosen = dispatch.select(self._backend, self._op, xs[0].device, xs[0].dtype)
        place = dispatch.load(chosen, self._op, "place_of_tie")
        found: tuple[int, int] = place(list(xs), base, value, rank, self._rounded)
        return found


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
    whole = WholeModel([lambda total: _rank(k, total)], backend)
    while whole.unfinished:
        for x, origin in pairs:
            whole.update([x], origin)
        whole.end_pass()
    (found,) = whole.thresholds
    if not whole.splits_ties:
        return found
    first = cut = 0
    for x, origin in pairs:
        (rule,) = whole.rules([x], origin)
        cut = max(cut, first + rule.cut if rule.cut else 0)
        first += x.numel()
    return found._replace(cut=cut)


def cost(numel: int, itemsize: int, *, base: bool = False) -> Cost:
    """One read."""
    return Cost(numel * itemsize * (2 if base else 1), numel)
