"""covariance on tensor cores, of which Triton and CUDA C++ have four kernels each.

Tensor cores round towards zero as they add up, so that a long sum drifts. The sum of a short run of
rows (SHALLOW_ROWS, or fewer of parts) is therefore added, in IEEE arithmetic and without loss, to a
pair of float32, and the pairs of all splits of the rows to float64, in order.

A feature's products are those of v = x - shift. Of 16-bit inputs whose means are small beside their
deviations the shift is 0 and v is x itself. Other rows are packed as three bfloat16 parts of v,
which hold all of its bits, and six products of parts make one of v; where all v of a panel are
bfloat16 by themselves, as 16-bit values about a large mean mostly are, one product does.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import tables
from .torch import covariance as in_float64

TILE = 128  # features of a panel
SPLIT_WIDTH = 64  # of y that a program takes where values have parts, whose loads need registers
SHALLOW_ROWS = 512  # of a sum on tensor cores, where one product of parts is enough
PARTS = 3
INFINITY = 0x7F800000  # its bits as float32; those of NaN are above
MEASURED = 512  # rows of a partial column sum
SMALL_MEAN = 4.0  # standard deviations up to which a mean of 16-bit values is left in

_PACKED = 1 << 30  # bytes of the rows that are packed and multiplied at a time
_PROGRAMS = 1056  # that fill 132 multiprocessors eight times, so that the last round wastes little
_PLAIN_EXPONENT = 24  # largest magnitudes within 2**-24 .. 2**24 need no scale


class Rows(NamedTuple):
    """Rows of one tensor, as kernels read them."""

    x: Tensor
    offsets: Tensor  # int64, of each row
    at: int  # the first feature's place among those of all tensors side by side
    zero: bool  # NaN and infinities count as 0

    @property
    def width(self) -> int:
        return self.x.shape[-1]

    def wide(self) -> bool:
        """Whether all rows begin at multiples of 16 elements, features side by side."""
        x = self.x
        steps = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
        return x.stride(-1) == 1 and all(s % 16 == 0 for s in steps) and tables.aligned([x])


class Operand(NamedTuple):
    """Rows as tensor cores take them: [parts, rows, padded], or [rows, padded] of one part."""

    values: Tensor
    deep: (
        Tensor  # int32 [runs of SHALLOW_ROWS, panels]: 1 where a value is more than its first part
    )

    @property
    def padded(self) -> int:
        return self.values.shape[-1]


class Kernels(Protocol):
    @staticmethod
    def measure(rows: Rows, first: Tensor, sums: Tensor, keys: Tensor) -> None:
        """Of MEASURED rows each: the first row as float64 [side], sums of x - first and of its
        squares as float64 [2, blocks, side], and the bits of the largest magnitudes, int32."""

    @staticmethod
    def pack(operand: Operand, rows: Rows, end: int, shift: Tensor, scale: Tensor) -> None:
        """x, or the parts of x scale - shift, with zeros up to column `end`; marks `deep`."""

    @staticmethod
    def multiply(
        sums: Tensor, tiles: Tensor, x: Operand, y: Operand, span: int, mixed: bool, deep: bool
    ) -> None:
        """float64 [splits, tiles, TILE, width], of splits of `span` rows; if mixed only of runs
        where parts are needed, or not, as `deep` says."""

    @staticmethod
    def merge(
        products: Tensor, sums: Tensor, tiles: Tensor, x: Tensor, y: Tensor, first: bool
    ) -> None:
        """The splits' sums into products, with the tables that `Side.center` makes; on or above the
        diagonal where x is y; `first`: the rows merge with those before, by Chan's formula."""


def covariance(
    kernels: Kernels,
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
    sides = [_Side(kernels, parts, rows, zero) for parts in xs]
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
    step = _step(sum(side.padded for side in sides) * (2 * PARTS if split else 2))
    pairs = _Pairs(kernels, sides, products, split)
    for begin in range(0, total, step):
        pairs.add(begin, min(total, begin + step))
    return True


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _step(row: int) -> int:
    """Rows that are multiplied at a time; `row` is the size of one in bytes."""
    return max(1, _PACKED // row // SHALLOW_ROWS) * SHALLOW_ROWS


def _splits(tiles: int, runs: int) -> int:
    """How many programs share the runs of rows of a tile: as many as fill the GPU, if there are.

    The same on every GPU, so that bits are.
    """
    return min(cdiv(_PROGRAMS, tiles), runs)


class _Side:
    """Rows of one side of the products, of one tensor or several."""

    def __init__(
        self, kernels: Kernels, parts: list[Tensor], rows: Tensor | None, zero: bool
    ) -> None:
        self.kernels, self.parts, self.zero = kernels, parts, zero
        self.offsets = [_offsets(x) if rows is None else _offsets(x)[rows] for x in parts]
        self.total = len(self.offsets[0])
        self.width = sum(x.shape[-1] for x in parts)
        self.padded = cdiv(self.width, TILE) * TILE
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
        shape = 2, cdiv(self.total, MEASURED), self.width
        sums = torch.empty(shape, dtype=torch.float64, device=self.device)
        keys = torch.empty(shape[1:], dtype=torch.int32, device=self.device)
        first = torch.empty(self.width, dtype=torch.float64, device=self.device)
        for rows in self._each(0, self.total):
            self.kernels.measure(rows, first, sums, keys)
        offset, square = sums.sum(1) / self.total
        self.mean = first + offset
        self.variance = (square - offset * offset).clamp_(min=0)
        key = keys.amax(0)
        self.finite = (key < INFINITY).all()
        _, exponent = torch.frexp(key.view(torch.float32))
        needed = exponent.abs() > _PLAIN_EXPONENT
        self.exponent = torch.where(needed, exponent, 0).clamp_(-126, 126)
        small = self.mean.square() <= SMALL_MEAN**2 * self.variance
        narrow = self.dtype if self.dtype == torch.bfloat16 else torch.float32
        self.shift = self.mean.to(narrow).double()
        if self.dtype != torch.float32:
            self.shift.masked_fill_(small, 0)
        self.unshifted = ((self.shift == 0) & (self.exponent == 0)).all()
        if self.dtype == torch.float32:
            self.unshifted = torch.zeros_like(self.unshifted)

    def _each(self, begin: int, end: int) -> list[Rows]:
        """Rows [begin, end) of each tensor."""
        widths = [x.shape[-1] for x in self.parts]
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return [
            Rows(x, offsets[begin:end], at, self.zero)
            for x, offsets, at in zip(self.parts, self.offsets, starts, strict=True)
        ]

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

    def packed(self, begin: int, end: int, split: bool) -> Operand:
        """Rows [begin, end), in parts if `split`."""
        rows = end - begin
        shape = cdiv(rows, SHALLOW_ROWS), cdiv(self.width, TILE)
        deep = torch.zeros(shape, dtype=torch.int32, device=self.device)
        if self.direct and not split:
            return Operand(self.parts[0].view(-1, self.width)[begin:end], deep)
        parts, dtype = (PARTS, torch.bfloat16) if split else (1, self.dtype)
        packed = torch.empty(parts, rows, self.padded, dtype=dtype, device=self.device)
        scale = _power(-self.exponent)
        shift = (self.shift * scale).float()
        for some in self._each(begin, end):
            end_of = some.at + some.width
            columns = self.padded if end_of == self.width else end_of
            self.kernels.pack(Operand(packed, deep), some, columns, shift, scale.float())
        return Operand(packed, deep)


class _Pairs:
    """The products of two sides, or of one with itself, tile by tile."""

    def __init__(self, kernels: Kernels, sides: list[_Side], products: Tensor, split: bool) -> None:
        self.kernels, self.sides, self.products, self.split = kernels, sides, products, split
        self.first = True
        self.width = SPLIT_WIDTH if split else TILE
        height = cdiv(sides[0].width, TILE)
        tiles = []
        for b in range(cdiv(sides[-1].width, self.width)):
            last = (b + 1) * self.width - 1
            tiles += [(a, b) for a in range(height) if len(sides) == 2 or a * TILE <= last]
        self.count = len(tiles)
        flat = [tile[side] for side in (0, 1) for tile in tiles]
        self.tiles = tables.upload(flat, torch.int32, products.device).view(2, -1)

    def add(self, begin: int, end: int) -> None:
        """Rows [begin, end), into `products`."""
        x, y = self.sides[0], self.sides[-1]
        operands = [side.packed(begin, end, self.split) for side in self.sides]
        runs = cdiv(end - begin, SHALLOW_ROWS)
        span = cdiv(runs, _splits(self.count, runs)) * SHALLOW_ROWS
        # Whether it takes six products of parts: of split 16-bit values, some runs do.
        kinds = [False, True] if self.split else [False]
        if x.dtype == torch.float32:
            kinds = [True]
        shape = len(kinds), cdiv(end - begin, span), self.count, TILE, self.width
        sums = torch.empty(shape, dtype=torch.float64, device=self.products.device)
        for deep, to in zip(kinds, sums, strict=True):
            self.kernels.multiply(
                to, self.tiles, operands[0], operands[-1], span, len(kinds) == 2, deep
            )
        self.kernels.merge(
            self.products, sums.flatten(0, 1), self.tiles, x.table, y.table, self.first
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
