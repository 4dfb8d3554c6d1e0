"""covariance in Triton: centred rows on tensor cores, their sums promoted to float64.

Tensor cores round towards zero as they add up, so that a long sum drifts. The sum of a short run of
rows (SHALLOW_ROWS or DEEP_ROWS) is therefore added, in IEEE arithmetic and without loss, to a pair
of float32, and the pairs of all splits of the rows to float64, in order.

A feature's products are those of v = x - shift. Of 16-bit inputs whose means are small beside their
deviations the shift is 0 and v is x itself. Other rows are packed as three bfloat16 parts of v,
which hold all of its bits, and six products of parts make one of v; where all v of a panel are
bfloat16 by themselves, as 16-bit values about a large mean mostly are, one product does.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import tables
from ..torch import covariance as in_float64
from . import covariance_kernels as kernels

PACKED = 1 << 30  # bytes of the rows that are packed and multiplied at a time
PROGRAMS = 1056  # that fill 132 multiprocessors eight times, so that the last round wastes little
MEASURED = 512  # rows of a partial column sum
SMALL_MEAN = 4.0  # standard deviations up to which a mean of 16-bit values is left in
PLAIN_EXPONENT = 24  # largest magnitudes within 2**-24 .. 2**24 need no scale


def covariance(
    products: Tensor,
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    xs: list[list[Tensor]],
    rows: Tensor | None,
    zero: bool,
) -> bool:
    if xs[0][0].dtype == torch.float64:
        # cuBLAS has float64 tensor cores, and tl.dot of older versions has not.
        return in_float64.covariance(products, means, squares, count, xs, rows, zero)
    sides = [_Side(parts, rows, zero) for parts in xs]
    for side in sides:
        side.measure()
    found = torch.stack([flag for side in sides for flag in (side.finite, side.unshifted)])
    flags = found.tolist()  # the one copy to the host
    if not zero and not all(flags[::2]):
        return False
    split = not all(flags)
    total = sides[0].total
    for i, side in enumerate(sides):
        side.center(count, means[i], squares[i] if squares else None)
    step = _step(sum(side.padded for side in sides) * (2 * kernels.PARTS if split else 2))
    pairs = _Pairs(sides, products, split)
    for begin in range(0, total, step):
        pairs.add(begin, min(total, begin + step))
    return True


def _step(row: int) -> int:
    """Rows that are multiplied at a time; `row` is the size of one in bytes."""
    return max(1, PACKED // row // kernels.SHALLOW_ROWS) * kernels.SHALLOW_ROWS


def splits(tiles: int, runs: int) -> int:
    """How many programs share the runs of rows of a tile: as many as fill the GPU, if there are.

    The same on every GPU, so that bits are.
    """
    return min(triton.cdiv(PROGRAMS, tiles), runs)


class _Side:
    """Rows of one side of the products, of one tensor or several."""

    def __init__(self, parts: list[Tensor], rows: Tensor | None, zero: bool) -> None:
        self.parts, self.zero = parts, zero
        self.offsets = [_offsets(x) if rows is None else _offsets(x)[rows] for x in parts]
        self.total = len(self.offsets[0])
        self.width = sum(x.shape[-1] for x in parts)
        self.padded = triton.cdiv(self.width, kernels.TILE) * kernels.TILE
        self.device, self.dtype = parts[0].device, parts[0].dtype
        x = parts[0]
        self.direct = (
            len(parts) == 1
            and rows is None
            and x.is_contiguous()
            and self.width == self.padded
            and tables.aligned(parts)
        )

    def measure(self) -> None:
        """Moments of every feature, and how it is centred."""
        blocks = triton.cdiv(self.total, MEASURED)
        shape = 2, blocks, self.width
        sums = torch.empty(shape, dtype=torch.float64, device=self.device)
        keys = torch.empty(shape[1:], dtype=torch.int32, device=self.device)
        first = torch.empty(self.width, dtype=torch.float64, device=self.device)
        for x, offsets, at in self._each():
            columns = x.shape[-1]
            kernels.launch(
                kernels.measure_kernel,
                (triton.cdiv(columns, kernels.COLUMNS), blocks),
                x,
                offsets,
                first[at:],
                sums[0, :, at:],
                sums[1, :, at:],
                keys[:, at:],
                self.total,
                columns,
                x.stride(-1),
                self.width,
                ZERO=self.zero,
                WIDE=_wide(x),
                ROWS=MEASURED,
            )
        offset, square = sums.sum(1) / self.total
        self.mean = first + offset
        self.variance = (square - offset * offset).clamp_(min=0)
        key = keys.amax(0)
        self.finite = (key < kernels.INFINITY).all()
        _, exponent = torch.frexp(key.view(torch.float32))
        needed = exponent.abs() > PLAIN_EXPONENT
        self.exponent = torch.where(needed, exponent, 0).clamp_(-126, 126)
        small = self.mean.square() <= SMALL_MEAN**2 * self.variance
        narrow = self.dtype if self.dtype == torch.bfloat16 else torch.float32
        self.shift = self.mean.to(narrow).double()
        if self.dtype != torch.float32:
            self.shift.masked_fill_(small, 0)
        self.unshifted = ((self.shift == 0) & (self.exponent == 0)).all()
        if self.dtype == torch.float32:
            self.unshifted = torch.zeros_like(self.unshifted)

    def _each(self) -> list[tuple[Tensor, Tensor, int]]:
        """Each tensor, its rows' offsets and its first feature."""
        widths = [x.shape[-1] for x in self.parts]
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return list(zip(self.parts, self.offsets, starts, strict=True))

    def center(self, count: int, mean: Tensor, squares: Tensor | None) -> None:
        """Moves `mean` over the rows; what merges their products with those before."""
        n = self.total
        delta = self.mean - mean
        weighted = delta * (count * (n / (count + n)))
        rest = self.mean - self.shift
        if squares is not None:
            squares += self.variance * n + delta * weighted
        mean += delta * (n / (count + n))
        self.table = torch.stack([_power(self.exponent), delta, weighted, rest, rest * n])

    def packed(self, begin: int, end: int, split: bool) -> tuple[Tensor, Tensor]:
        """Rows [begin, end), in parts if `split`, and which panels and runs need them all."""
        rows = end - begin
        runs, panels = (
            triton.cdiv(rows, kernels.SHALLOW_ROWS),
            triton.cdiv(self.width, kernels.TILE),
        )
        deep = torch.zeros(runs, panels, dtype=torch.int32, device=self.device)
        if self.direct and not split:
            return self.parts[0].view(-1, self.width)[begin:end], deep
        parts, dtype = (kernels.PARTS, torch.bfloat16) if split else (1, self.dtype)
        packed = torch.empty(parts, rows, self.padded, dtype=dtype, device=self.device)
        scale = _power(-self.exponent)
        shift = (self.shift * scale).float()
        scale = scale.float()
        for x, offsets, at in self._each():
            end_of = at + x.shape[-1]
            columns = self.padded if end_of == self.width else end_of
            kernels.launch(
                kernels.pack_kernel,
                (
                    triton.cdiv(columns - at, kernels.COLUMNS),
                    triton.cdiv(rows, kernels.PACKED_ROWS),
                ),
                packed,
                deep,
                x,
                offsets[begin:],
                shift,
                scale,
                rows,
                x.shape[-1],
                at,
                columns,
                x.stride(-1),
                rows * self.padded,
                self.padded,
                panels,
                ZERO=self.zero,
                WIDE=_wide(x),
                SPLIT=split,
            )
        return packed, deep


class _Pairs:
    """The products of two sides, or of one with itself, tile by tile."""

    def __init__(self, sides: list[_Side], products: Tensor, split: bool) -> None:
        self.sides, self.products, self.split = sides, products, split
        self.first = True
        self.width = kernels.SPLIT_WIDTH if split else kernels.TILE
        height = triton.cdiv(sides[0].width, kernels.TILE)
        tiles = []
        for b in range(triton.cdiv(sides[-1].width, self.width)):
            last = (b + 1) * self.width - 1
            tiles += [(a, b) for a in range(height) if len(sides) == 2 or a * kernels.TILE <= last]
        self.count = len(tiles)
        flat = [tile[side] for side in (0, 1) for tile in tiles]
        self.tiles = tables.upload(flat, torch.int32, products.device)

    def add(self, begin: int, end: int) -> None:
        """Rows [begin, end), into `products`."""
        x, y = self.sides[0], self.sides[-1]
        operands = [side.packed(begin, end, self.split) for side in self.sides]
        (u, deep_u), (v, deep_v) = operands[0], operands[-1]
        rows = end - begin
        runs = triton.cdiv(rows, kernels.SHALLOW_ROWS)
        span = triton.cdiv(runs, splits(self.count, runs)) * kernels.SHALLOW_ROWS
        # Whether it takes six products of parts: of split 16-bit values, some runs do.
        kinds = [False, True] if self.split else [False]
        if x.dtype == torch.float32:
            kinds = [True]
        parts = triton.cdiv(rows, span)
        shape = len(kinds), parts, self.count, kernels.TILE, self.width
        sums = torch.empty(shape, dtype=torch.float64, device=self.products.device)
        for deep, to in zip(kinds, sums, strict=True):
            kernels.launch(
                kernels.multiply_kernel,
                (self.count, parts),
                to,
                self.tiles,
                u,
                v,
                deep_u,
                deep_v,
                rows,
                span,
                x.padded,
                y.padded,
                deep_u.shape[1],
                deep_v.shape[1],
                MIXED=len(kinds) == 2,
                DEEP=deep,
                WIDTH=self.width,
                UPCAST=self.products.device.type == "cpu",
                options=kernels.TENSOR_CORES,
            )
        kernels.launch(
            kernels.merge_kernel,
            (self.count, kernels.TILE // kernels.MERGED_ROWS),
            self.products,
            sums,
            self.tiles,
            x.table,
            y.table,
            len(kinds) * parts,
            x.width,
            y.width,
            WIDTH=self.width,
            TRIANGLE=len(self.sides) == 1,
            FIRST=self.first,
        )
        self.first = False


def _power(exponent: Tensor) -> Tensor:
    """2**exponent in float64, exactly, which no function of torch promises."""
    return (exponent.to(torch.int64) + 1023 << 52).view(torch.float64)


def _wide(x: Tensor) -> bool:
    """Whether all rows begin at multiples of 16 elements, features side by side."""
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
    return x.stride(-1) == 1 and all(s % 16 == 0 for s in steps) and tables.aligned([x])


def _offsets(x: Tensor) -> Tensor:
    """Where each row begins, in elements after the first, in C order of the leading axes."""
    offsets = torch.zeros(1, dtype=torch.int64, device=x.device)
    for size, stride in zip(x.shape[:-1], x.stride()):
        steps = torch.arange(size, device=x.device) * stride
        offsets = (offsets[:, None] + steps).reshape(-1)
    return offsets
