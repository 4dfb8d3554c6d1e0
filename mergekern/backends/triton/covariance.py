"""covariance in Triton: centred rows on tensor cores, their sums promoted to float64.

Tensor cores round towards zero as they add up, so that a long sum drifts. The sum of a short run of
rows (SHALLOW_ROWS or DEEP_ROWS) is therefore added, in IEEE arithmetic and without loss, to a pair
of float32, and the pairs of all splits of the rows to float64, in order.

A feature's products are those of v = x - shift. With a shift of 0 (16-bit inputs whose mean is
small beside their deviation) v is x itself and needs no packing. Elsewhere the rows are packed as
three bfloat16 parts of v, which hold all of its bits, and six products of parts make one of v; where
all v of a panel are bfloat16 by themselves, one product does.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import tables
from ..torch import covariance as in_float64
from . import covariance_kernels as kernels
from .common import DTYPES

TILE = kernels.TILE
PACKED = 1 << 28  # bytes of packed rows of all sides: beside the result, all the memory there is
PROGRAMS = 1056  # that fill 132 multiprocessors eight times, so that the last round wastes little
MEASURED = 512  # rows of a partial column sum
SMALL_MEAN = 2.0  # standard deviations up to which a mean of 16-bit values is left in
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
    plain = all(flags) and all(side.direct for side in sides)
    total = sides[0].total
    for i, side in enumerate(sides):
        side.center(count, means[i], squares[i] if squares else None)
    step = total if plain else _slab(sum(side.padded for side in sides))
    pairs = _Pairs(sides, products, plain)
    for begin in range(0, total, step):
        pairs.add(begin, min(total, begin + step))
    return True


def _slab(width: int) -> int:
    """Rows that are packed at a time."""
    return max(1, PACKED // (6 * width) // kernels.SHALLOW_ROWS) * kernels.SHALLOW_ROWS


def splits(tiles: int, rows: int) -> int:
    """How many programs share the rows of a tile: as many as fill the GPU, if rows are enough.

    The same on every GPU, so that bits are.
    """
    return min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(rows, kernels.SHALLOW_ROWS))


class _Side:
    """Rows of one side of the products, of one tensor or several."""

    def __init__(self, parts: list[Tensor], rows: Tensor | None, zero: bool) -> None:
        self.parts, self.zero = parts, zero
        self.offsets = [_offsets(x) if rows is None else _offsets(x)[rows] for x in parts]
        self.total = len(self.offsets[0])
        self.width = sum(x.shape[-1] for x in parts)
        self.padded = triton.cdiv(self.width, 16) * 16  # rows of packed values begin aligned
        self.device, self.dtype = parts[0].device, parts[0].dtype
        x = parts[0]
        self.direct = (
            len(parts) == 1
            and rows is None
            and x.is_contiguous()
            and x.shape[-1] % 16 == 0
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

    def pack(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Three bfloat16 parts of rows [begin, end), and which panels and runs need them all."""
        rows = end - begin
        shape = kernels.PARTS, rows, self.padded
        packed = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        shape = triton.cdiv(rows, kernels.SHALLOW_ROWS), triton.cdiv(self.width, TILE)
        deep = torch.zeros(shape, dtype=torch.int32, device=self.device)
        scale = _power(-self.exponent)
        shift = (self.shift * scale).float()
        scale = scale.float()
        for x, offsets, at in self._each():
            columns = x.shape[-1]
            kernels.launch(
                kernels.pack_kernel,
                (triton.cdiv(columns + self.padded - self.width, kernels.COLUMNS),
                 triton.cdiv(rows, kernels.PACKED_ROWS)),
                packed,
                deep,
                x,
                offsets[begin:],
                shift,
                scale,
                rows,
                columns,
                at,
                self.padded if at + columns == self.width else at + columns,
                x.stride(-1),
                rows * self.padded,
                self.padded,
                shape[1],
                ZERO=self.zero,
            )
        return packed, deep


class _Pairs:
    """The products of two sides, or of one with itself, tile by tile."""

    def __init__(self, sides: list[_Side], products: Tensor, plain: bool) -> None:
        self.sides, self.products, self.plain = sides, products, plain
        x, y = sides[0], sides[-1]
        self.triangle = len(sides) == 1
        height, width = (triton.cdiv(side.width, TILE) for side in (x, y))
        tiles = [(a, b) for b in range(width) for a in range(b + 1 if self.triangle else height)]
        self.count = len(tiles)
        flat = [a for a, _ in tiles] + [b for _, b in tiles]
        self.tiles = tables.upload(flat, torch.int32, products.device)
        self.first = True

    def add(self, begin: int, end: int) -> None:
        """Rows [begin, end), into `products`."""
        x, y = self.sides[0], self.sides[-1]
        rows = end - begin
        if self.plain:
            operands = [side.parts[0] for side in self.sides]
            deep = [self.tiles] * len(operands)  # not read
        else:
            packed = [side.pack(begin, end) for side in self.sides]
            operands, deep = [p for p, _ in packed], [d for _, d in packed]
        runs = triton.cdiv(rows, kernels.SHALLOW_ROWS)
        span = triton.cdiv(runs, splits(self.count, rows)) * kernels.SHALLOW_ROWS
        count = triton.cdiv(rows, span)
        shape = count, self.count, TILE, TILE
        sums = torch.empty(shape, dtype=torch.float64, device=x.device)
        kernels.launch(
            kernels.multiply_kernel,
            (self.count, count),
            sums,
            self.tiles,
            operands[0],
            operands[-1],
            deep[0],
            deep[-1],
            rows,
            span,
            x.padded,
            y.padded,
            deep[0].shape[-1],
            deep[-1].shape[-1],
            SHALLOW=x.dtype != torch.float32,
            DEEP=not self.plain,
            UPCAST=x.device.type == "cpu",
            options=kernels.TENSOR_CORES,
        )
        kernels.launch(
            kernels.merge_kernel,
            (self.count, TILE // kernels.MERGED_ROWS),
            self.products,
            sums,
            self.tiles,
            x.table,
            y.table,
            count,
            x.width,
            y.width,
            TRIANGLE=self.triangle,
            FIRST=self.first,
        )
        self.first = False


def _power(exponent: Tensor) -> Tensor:
    """2**exponent in float64, exactly, which no function of torch promises."""
    return (exponent.to(torch.int64) + 1023 << 52).view(torch.float64)


def _offsets(x: Tensor) -> Tensor:
    """Where each row begins, in elements after the first, in C order of the leading axes."""
    offsets = torch.zeros(1, dtype=torch.int64, device=x.device)
    for size, stride in zip(x.shape[:-1], x.stride()):
        steps = torch.arange(size, device=x.device) * stride
        offsets = (offsets[:, None] + steps).reshape(-1)
    return offsets
