"""covariance by csrc/covariance.cpp and covariance_pack.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from . import runtime

_PACKED = 1 << 24  # bytes of a packed chunk at most, but for so wide ones as need more for
_LONGEST = 1024  # rows of a chunk: two panels of this length stay in the second-level cache
_PAIRS = 16  # of panels, in one task at most: enough work against the call, and for all threads


def covariance(
    products: Tensor,
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    xs: list[list[Tensor]],
    rows: Tensor | None,
    zero: bool,
) -> bool:
    sides = [_Side(parts, rows, zero) for parts in xs]
    total = len(sides[0].offsets[0])
    step = _chunk_rows(sum(side.panels for side in sides))
    if not all(side.measure(total, step) for side in sides):
        return False
    for k, begin in enumerate(range(0, total, step)):
        n = min(step, total - begin)
        for i, side in enumerate(sides):
            side.pack(k, begin, n, count, means[i], squares[i] if squares else None)
        _multiply(sides[0], sides[-1], n, products)
        count += n
    return True


def _chunk_rows(panels: int) -> int:
    partial: int = runtime._cpu.PARTIAL_ROWS
    fitting = _PACKED // (panels * runtime._cpu.PANEL_BYTES) // partial * partial
    return min(_LONGEST, max(partial, fitting))


class _Side:
    """Rows of one side of the products, of one tensor or several, and their packed chunk."""

    def __init__(self, parts: list[Tensor], rows: Tensor | None, zero: bool) -> None:
        self.width = sum(x.shape[-1] for x in parts)
        self.offsets = [_offsets(x) if rows is None else _offsets(x)[rows] for x in parts]
        self.dtype = runtime._DTYPES[parts[0].dtype]
        self.panels = runtime._cpu.panel_count(self.dtype, self.width)
        self.center = torch.empty(runtime._cpu.CENTER_ARRAYS, self.width, dtype=torch.float64)
        self.parts, first = [], 0
        for x, offsets in zip(parts, self.offsets, strict=True):
            part = runtime._cpu.Rows(
                data=x.data_ptr(),
                dtype=self.dtype,
                offsets=offsets.data_ptr(),
                width=x.shape[-1],
                stride=x.stride(-1),
                first=first,
                side=self.width,
                zero=zero,
            )
            self.parts.append(part)
            first += x.shape[-1]

    def measure(self, total: int, step: int) -> bool:
        """Means and largest magnitudes of each chunk; False where a value is not finite."""
        chunks = -(-total // step)
        self.means = torch.empty(chunks, self.width, dtype=torch.float64)
        self.largest = torch.empty_like(self.means)
        shape = self.panels, min(step, total), runtime._cpu.PANEL_BYTES
        self.packed = torch.empty(shape, dtype=torch.uint8)
        finite = [True] * chunks

        def kernel(begin: int, end: int) -> None:
            k = begin // step
            for part in self.parts:
                finite[k] &= runtime._cpu.column_means(
                    x=part,
                    mean=self.means[k].data_ptr(),
                    largest=self.largest[k].data_ptr(),
                    begin=begin,
                    end=end,
                )

        runtime.chunks(kernel, total, step)
        return all(finite)

    def pack(
        self, k: int, first: int, n: int, count: int, mean: Tensor, squares: Tensor | None
    ) -> None:
        """Chunk k, which has n rows from `first` on; moves `mean` over them."""
        runtime._cpu.center(
            dtype=self.dtype,
            width=self.width,
            n=n,
            chunk_mean=self.means[k].data_ptr(),
            largest=self.largest[k].data_ptr(),
            count=count,
            mean=mean.data_ptr(),
            out=self.center.data_ptr(),
        )

        def kernel(begin: int, end: int) -> None:
            for part in self.parts:
                runtime._cpu.pack(
                    x=part,
                    first_row=first,
                    last_row=first + n,
                    center=self.center.data_ptr(),
                    panels=self.packed.data_ptr(),
                    squares=0 if squares is None else squares.data_ptr(),
                    begin=begin,
                    end=end,
                )

        runtime.chunks(kernel, self.panels, -(-self.panels // (2 * runtime.threads())))


def _offsets(x: Tensor) -> Tensor:
    """Where each row begins, in elements after the first, in C order of the leading axes."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(x.shape[:-1], x.stride()):
        offsets = (offsets[:, None] + torch.arange(size) * stride).reshape(-1)
    return offsets


def _multiply(x: _Side, y: _Side, rows: int, products: Tensor) -> None:
    pairs = runtime._cpu.Pairs(
        dtype=x.dtype,
        rows=rows,
        x=x.packed.data_ptr(),
        y=y.packed.data_ptr(),
        width_x=x.width,
        width_y=y.width,
        center_x=x.center.data_ptr(),
        center_y=y.center.data_ptr(),
        products=products.data_ptr(),
    )

    def kernel(begin: int, end: int) -> None:
        runtime._cpu.add_products(pairs=pairs, begin=begin, end=end)

    threads = runtime.threads()  # a single one needs a single call
    together = pairs.count if threads == 1 else min(_PAIRS, -(-pairs.count // (8 * threads)))
    runtime.chunks(kernel, pairs.count, together)
