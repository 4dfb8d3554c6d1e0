"""Where a tensor may be cut, so that it need not be in memory whole.

A tensor is computed slice by slice whatever the memory: sums over it are taken in the same order,
so the result never depends on how much of it is held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SLICE = 1 << 22  # elements, of a row if it has more


def slices(shape: Sequence[int], cut: str | None, size: int | None = None) -> list[tuple[int, int]]:
    """Ranges of flat indices that make up the tensor, in order; one of an empty one.

    cut "elements": `SLICE` each. "rows": as many rows of the first axis as fit in `SLICE`, at
    least one. None: all at once. size: in place of `SLICE`.

    >>> slices([5 * SLICE // 2], "elements") == [
    ...     (0, SLICE), (SLICE, 2 * SLICE), (2 * SLICE, 5 * SLICE // 2)
    ... ]
    True
    >>> [end - begin for begin, end in slices([3, SLICE // 2 + 1], "rows")] == 3 * [SLICE // 2 + 1]
    True
    """
    total = math.prod(shape)
    size = SLICE if size is None else size
    step = total
    if cut == "elements":
        step = size
    elif cut == "rows" and shape and total:
        row = total // shape[0]
        step = max(1, size // row) * row
    if total <= step:
        return [(0, total)]
    return [(begin, min(begin + step, total)) for begin in range(0, total, step)]
