"""The kernels of covariance.py; importing this file imports triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# Triton kernels have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

from ..moments import INFINITY, SHALLOW_ROWS, TILE
from .common import narrow, widen

DEEP_ROWS = 64  # of a sum on tensor cores, where it takes six products of parts
COLUMNS = 64  # of a program that measures or packs
READ_ROWS = 32  # that it reads at a time
PACKED_ROWS = 64
MERGED_ROWS = 16

# Fusion to FMA would skip roundings.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
TENSOR_CORES = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}

_INFINITY = tl.constexpr(INFINITY)
_TILE = tl.constexpr(TILE)
_SHALLOW_ROWS = tl.constexpr(SHALLOW_ROWS)
_DEEP_ROWS = tl.constexpr(DEEP_ROWS)
_COLUMNS = tl.constexpr(COLUMNS)
_READ_ROWS = tl.constexpr(READ_ROWS)
_PACKED_ROWS = tl.constexpr(PACKED_ROWS)
_MERGED_ROWS = tl.constexpr(MERGED_ROWS)


@triton.jit
def _magnitude(x):
    """The bits of |x| of a float32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _begins(offsets, rows, n, WIDE: tl.constexpr):
    """Where rows begin. The compiler knows nothing of offsets that it reads but what WIDE says."""
    begins = tl.load(offsets + rows, mask=rows < n, other=0)
    if WIDE:
        begins = tl.multiple_of(begins, [16])
    return begins


@triton.jit
def _read(x, offsets, columns, stride, mask, ZERO: tl.constexpr):
    value = widen(tl.load(x + offsets[:, None] + columns[None, :] * stride, mask=mask, other=0.0))
    if ZERO:
        value = tl.where(_magnitude(value) < _INFINITY, value, 0.0)
    return value


@triton.jit
def measure_kernel(
    x,
    offsets,  # int64, of each row
    firsts,  # float64: the first row
    sums,  # float64 [blocks, side]: of x - first
    squares,  # float64 [blocks, side]: of its squares
    keys,  # int32 [blocks, side]: the bits of the largest magnitude
    n,
    width,
    stride,
    side,  # the width of all tensors side by side
    ZERO: tl.constexpr,
    WIDE: tl.constexpr,  # rows begin at multiples of 16 elements and of 16 bytes
    ROWS: tl.constexpr,  # of a block
):
    # Rows along the axis that has room for more than 65,535 programs.
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * _COLUMNS + tl.arange(0, _COLUMNS)
    within = column < width
    start = _begins(offsets, tl.arange(0, 1), n, WIDE)
    first = _read(x, start, column, stride, within[None, :], ZERO).to(tl.float64)
    total = tl.zeros([_READ_ROWS, _COLUMNS], tl.float64)
    square = tl.zeros([_READ_ROWS, _COLUMNS], tl.float64)
    key = tl.zeros([_READ_ROWS, _COLUMNS], tl.int32)
    for begin in range(block * ROWS, tl.minimum(block * ROWS + ROWS, n), _READ_ROWS):
        row = begin + tl.arange(0, _READ_ROWS)
        offset = _begins(offsets, row, n, WIDE)
        mask = (row < n)[:, None] & within[None, :]
        value = _read(x, offset, column, stride, mask, ZERO)
        key = tl.maximum(key, _magnitude(value))
        centred = tl.where(mask, value.to(tl.float64) - first, 0.0)
        total += centred
        square += centred * centred
    to = block * side + column
    tl.store(sums + to, tl.sum(total, 0), mask=within)
    tl.store(squares + to, tl.sum(square, 0), mask=within)
    tl.store(keys + to, tl.max(key, 0), mask=within)
    if block == 0:
        tl.store(firsts + column, tl.sum(first, 0), mask=within)


@triton.jit
def pack_kernel(
    packed,  # [n, padded]: x; or bfloat16 [PARTS, n, padded]: v = x scale - shift as a sum of parts
    deep,  # int32 [runs of SHALLOW_ROWS, panels]: 1 where a v is more than its first part
    x,
    offsets,  # int64, of each row
    shifts,  # float32, scaled
    scales,  # float32
    n,
    width,
    at,  # the first feature's place among those of all tensors
    end,  # the column that the last program fills up to, with zeros
    stride,
    part,  # elements from one part to the next
    padded,
    panels,
    ZERO: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * _PACKED_ROWS + tl.arange(0, _PACKED_ROWS)
    column = tl.program_id(1).to(tl.int64) * _COLUMNS + tl.arange(0, _COLUMNS)
    within = column < width
    mask = (row < n)[:, None] & within[None, :]
    offset = _begins(offsets, row, n, WIDE)
    value = _read(x, offset, column, stride, mask, ZERO)
    filled = (row < n)[:, None] & (at + column < end)[None, :]
    to = packed + row[:, None] * padded + (at + column)[None, :]
    if SPLIT:
        scale = tl.load(scales + at + column, mask=within, other=0.0)
        shift = tl.load(shifts + at + column, mask=within, other=0.0)
        value = tl.where(mask, value * scale[None, :] - shift[None, :], 0.0)
        high = _upper(value)
        rest = value - high
        middle = _upper(rest)
        tl.store(to, narrow(high, tl.bfloat16), mask=filled)
        tl.store(to + part, narrow(middle, tl.bfloat16), mask=filled)
        tl.store(to + 2 * part, narrow(rest - middle, tl.bfloat16), mask=filled)
        more = tl.max((rest != 0).to(tl.int32), 0)
        run = tl.program_id(0).to(tl.int64) * _PACKED_ROWS // _SHALLOW_ROWS
        # A maximum of integers does not depend on the order.
        tl.atomic_max(deep + run * panels + (at + column) // _TILE, more, mask=within & (more > 0))
    else:
        tl.store(to, narrow(value, packed.dtype.element_ty), mask=filled)


@triton.jit
def _upper(x):
    """A float32 whose lower 16 bits are cut off: exact in bfloat16, and x - _upper(x) is exact."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _add(high, low, x):
    """(high, low) + x: Knuth's sum without loss, its error added to `low`."""
    total = high + x
    back = total - high
    error = (high - (total - back)) + (x - back)
    return total, low + error


@triton.jit
def _panel(x, k, stop, column, padded, UPCAST: tl.constexpr):
    """DEEP_ROWS rows of a panel as an operand; 0 from row `stop` on. All columns are there."""
    row = k + tl.arange(0, _DEEP_ROWS)
    to = x + row[:, None] * padded + column[None, :]
    value = tl.load(to, mask=(row < stop)[:, None], other=0.0)
    if UPCAST:  # the interpreter multiplies the bits of bfloat16
        value = widen(value)
    return value


@triton.jit
def _dot(x, y, total):
    # Products of 16-bit values are exact; the precision is that of operands of 32 bits.
    return tl.dot(tl.trans(x), y, total, input_precision="ieee")


@triton.jit
def multiply_kernel(
    sums,  # float64 [splits, tiles, TILE, WIDTH]
    tiles,  # int32 [2, tiles]: which TILE features of x, and which WIDTH of y
    x,  # [n, padded_x], or of three parts; padded is a multiple of TILE
    y,
    deep_x,  # int32 [runs, panels_x]
    deep_y,
    n,
    span,  # rows of a split, a multiple of SHALLOW_ROWS
    padded_x,
    padded_y,
    panels_x,
    panels_y,
    MIXED: tl.constexpr,  # only runs whose panels need DEEP, or do not; else all
    DEEP: tl.constexpr,  # six products of parts, not one
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, count = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    split = tl.program_id(1).to(tl.int64)
    a = tl.load(tiles + tile).to(tl.int64)
    b = tl.load(tiles + count + tile).to(tl.int64)
    i, j = a * _TILE + tl.arange(0, _TILE), b * WIDTH + tl.arange(0, WIDTH)
    begin = split * span
    stop = tl.minimum(begin + span, n)
    part_x = tl.cast(n, tl.int64) * padded_x
    part_y = tl.cast(n, tl.int64) * padded_y
    high = tl.zeros([_TILE, WIDTH], tl.float32)
    low = tl.zeros([_TILE, WIDTH], tl.float32)
    for start in range(begin, stop, _SHALLOW_ROWS):
        end = tl.minimum(start + _SHALLOW_ROWS, stop)
        taken = True
        if MIXED:
            run = start // _SHALLOW_ROWS
            deep = tl.load(deep_x + run * panels_x + a)
            deep += tl.load(deep_y + run * panels_y + b * WIDTH // _TILE)
            taken = (deep > 0) == DEEP
        if taken:
            if DEEP:
                for k in range(start, end, _DEEP_ROWS):
                    u0 = _panel(x, k, stop, i, padded_x, UPCAST)
                    v0 = _panel(y, k, stop, j, padded_y, UPCAST)
                    u1 = _panel(x + part_x, k, stop, i, padded_x, UPCAST)
                    v1 = _panel(y + part_y, k, stop, j, padded_y, UPCAST)
                    u2 = _panel(x + 2 * part_x, k, stop, i, padded_x, UPCAST)
                    v2 = _panel(y + 2 * part_y, k, stop, j, padded_y, UPCAST)
                    # Small products first, which are cut off less beside a small sum.
                    total = _dot(u0, v2, tl.zeros([_TILE, WIDTH], tl.float32))
                    total = _dot(u2, v0, total)
                    total = _dot(u1, v1, total)
                    total = _dot(u0, v1, total)
                    total = _dot(u1, v0, total)
                    total = _dot(u0, v0, total)
                    high, low = _add(high, low, total)
            else:
                total = tl.zeros([_TILE, WIDTH], tl.float32)
                for k in range(start, end, _DEEP_ROWS):
                    u = _panel(x, k, stop, i, padded_x, UPCAST)
                    v = _panel(y, k, stop, j, padded_y, UPCAST)
                    total = _dot(u, v, total)
                high, low = _add(high, low, total)
    cell = tl.arange(0, _TILE)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    to = sums + (split * count + tile) * _TILE * WIDTH + cell
    tl.store(to, high.to(tl.float64) + low.to(tl.float64))


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    products,  # float64 [width_x, width_y]
    sums,  # float64 [splits, tiles, TILE, WIDTH]
    tiles,
    center_x,  # float64 [5, width_x]: unscale, delta, weighted, rest, weighted rest
    center_y,
    splits,
    width_x,
    width_y,
    WIDTH: tl.constexpr,
    TRIANGLE: tl.constexpr,  # only i <= j
    FIRST: tl.constexpr,  # the rows merge with those before, by Chan's formula
):
    tile, count = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row = tl.program_id(1) * _MERGED_ROWS + tl.arange(0, _MERGED_ROWS)
    column = tl.arange(0, WIDTH)
    i = tl.load(tiles + tile).to(tl.int64) * _TILE + row
    j = tl.load(tiles + count + tile).to(tl.int64) * WIDTH + column
    of = sums + tile * _TILE * WIDTH + row[:, None] * WIDTH + column[None, :]
    total = tl.zeros([_MERGED_ROWS, WIDTH], tl.float64)
    for split in range(splits):
        total += tl.load(of + tl.cast(split, tl.int64) * count * _TILE * WIDTH)
    in_x, in_y = i < width_x, j < width_y
    unscale = tl.load(center_x + i, mask=in_x, other=0.0)
    total = total * unscale[:, None] * tl.load(center_y + j, mask=in_y, other=0.0)[None, :]
    if FIRST:
        weighted = tl.load(center_x + 2 * width_x + i, mask=in_x, other=0.0)
        delta = tl.load(center_y + width_y + j, mask=in_y, other=0.0)
        weighted_rest = tl.load(center_x + 4 * width_x + i, mask=in_x, other=0.0)
        rest = tl.load(center_y + 3 * width_y + j, mask=in_y, other=0.0)
        total += weighted[:, None] * delta[None, :] - weighted_rest[:, None] * rest[None, :]
    mask = in_x[:, None] & in_y[None, :]
    if TRIANGLE:
        mask = mask & (i[:, None] <= j[None, :])
    to = products + i[:, None] * width_y + j[None, :]
    tl.store(to, tl.load(to, mask=mask, other=0.0) + total, mask=mask)
