"""One catalogue of shapes, dtypes, layouts and values, for tests and benchmarks.

Everything is a function of its arguments: the same case gives the same tensors in every process.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from mergekern.check import FLOATS, name_of

DTYPES = FLOATS
SENTINEL = 77.0  # surrounds data; exact in every dtype, far from the values of most cases

# ---- sizes -----------------------------------------------------------------------------------

BLOCKS = (256, 512, 1024)  # of csrc: sums and gram, merge_deltas, the rest
CHUNK = 1 << 18  # elements of one task of the C++ and torch backends
SIZES = (0, 1, 2, 7, 8, 9, *(b + d for b in BLOCKS for d in (-1, 0, 1)), 1031)
SHAPES = (
    (),
    (0,),
    (3, 0, 5),
    (1, 1, 1),
    (31, 33),
    (2, 3, 5, 7),
    (1, 67, 1),
    (5, 1, 13),
    (257, 1, 2, 2),
)
MODELS = tuple(range(1, 18))
CHUNKED = (CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17)


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


# ---- values ----------------------------------------------------------------------------------


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g, dtype=torch.float64)


def _signs(n: int, g: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=g).double() * 2 - 1


def _huge(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Within a factor of four of the largest number: sums overflow, differences cancel."""
    share = torch.rand(n, generator=g, dtype=torch.float64) * 0.75 + 0.25
    return share * torch.finfo(dtype).max * _signs(n, g)


def _tiny(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Around the smallest normal number: products fall below it."""
    share = torch.rand(n, generator=g, dtype=torch.float64) * 3.5 + 0.5
    return share * torch.finfo(dtype).smallest_normal * _signs(n, g)


def _subnormal(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Small multiples of the smallest number there is."""
    info = torch.finfo(dtype)
    steps = torch.randint(0, 20, (n,), generator=g).double()
    return steps * (info.smallest_normal * info.eps) * _signs(n, g)


def _zeros(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Zeros of both signs, and a few ones."""
    share = torch.randint(0, 8, (n,), generator=g)
    return (share == 0).double() * _signs(n, g)


def _ties(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Seven magnitudes in all, as quantised weights have."""
    return torch.randint(-6, 7, (n,), generator=g).double() / 4


def _equal(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.full((n,), 0.75, dtype=torch.float64)


def _specials(n: int, dtype: torch.dtype, g: torch.Generator, special: list[float]) -> Tensor:
    x = _normal(n, dtype, g)
    which = torch.randint(0, 8 * len(special), (n,), generator=g)
    for i, v in enumerate(special):
        x[which == i] = v
    return x


def _infinite(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return _specials(n, dtype, g, [math.inf, -math.inf])


def _nan(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return _specials(n, dtype, g, [math.nan])


def _mixed(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """All of the above in one tensor."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, info.max, -info.max, least, -least]
    return _specials(n, dtype, g, special)


VALUES: dict[str, Callable[[int, torch.dtype, torch.Generator], Tensor]] = {
    "normal": _normal,
    "huge": _huge,
    "tiny": _tiny,
    "subnormal": _subnormal,
    "zeros": _zeros,
    "ties": _ties,
    "equal": _equal,
    "infinite": _infinite,
    "nan": _nan,
    "mixed": _mixed,
}
FINITE_VALUES = ("normal", "tiny", "subnormal", "zeros", "ties", "equal")


def values(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str = "normal", seed: int = 0
) -> Tensor:
    """A contiguous tensor on the CPU."""
    salt = zlib.crc32(f"{kind} {shape}".encode())
    return VALUES[kind](math.prod(shape), dtype, _generator(salt + seed)).to(dtype).reshape(shape)


# ---- layouts ---------------------------------------------------------------------------------


def _contiguous(x: Tensor) -> Tensor:
    return x.clone()


def _transposed(x: Tensor) -> Tensor:
    """The last axis first in memory; a column of a matrix where there is one axis."""
    if x.ndim < 2:
        return torch.stack([x, torch.full_like(x, SENTINEL)], -1)[..., 0]
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _sliced(x: Tensor) -> Tensor:
    """Every third element of a buffer of sentinels."""
    if not x.ndim:
        return _sliced(x[None])[0]
    buffer = x.new_full((*x.shape[:-1], 3 * x.shape[-1] + 1), SENTINEL)
    view = buffer[..., 1::3]
    return view.copy_(x)


def _expanded(x: Tensor) -> Tensor:
    """The first entry of the first axis everywhere: stride 0. The values change."""
    return x[:1].expand(x.shape) if x.ndim and x.shape[0] else x.clone()


def _misaligned(x: Tensor) -> Tensor:
    """Elements 3, 4, ... of a buffer of sentinels: aligned to its element and to no more."""
    buffer = x.new_full((x.numel() + 8,), SENTINEL)
    return buffer[3 : 3 + x.numel()].view(x.shape).copy_(x)


def _odd(x: Tensor) -> Tensor:
    """Starts at an odd byte, as tensors of a memory-mapped file may."""
    if not x.numel() or x.device.type != "cpu":
        return x.clone()
    data = (
        x.clone(memory_format=torch.contiguous_format)
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )
    buffer = bytearray(b"\xa5" + data)
    return torch.frombuffer(buffer, dtype=x.dtype, offset=1).view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "sliced": _sliced,
    "expanded": _expanded,
    "misaligned": _misaligned,
    "odd": _odd,
}


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", step: int = 1):
    """(buffer of sentinels, a view of `shape` inside it with `step` between elements)."""
    numel = math.prod(shape)
    buffer = torch.full((numel * step + 10,), SENTINEL, dtype=dtype, device=device)
    strides, reach = [], step
    for size in reversed(shape):
        strides.insert(0, reach)
        reach *= max(size, 1)
    return buffer, torch.as_strided(buffer, shape, strides, 5)


def untouched(buffer: Tensor, view: Tensor) -> bool:
    """Whether everything of `buffer` outside `view` still holds the sentinel."""
    inside = torch.zeros(buffer.shape, dtype=torch.bool, device=buffer.device)
    torch.as_strided(inside, view.shape, view.stride(), view.storage_offset()).fill_(True)
    return bool((buffer[~inside] == SENTINEL).all())


# ---- cases -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """`n` tensors of one shape, dtype, layout and kind of values."""

    shape: tuple[int, ...] = (1031,)
    dtype: torch.dtype = torch.float32
    n: int = 3
    layout: str = "contiguous"
    values: str = "normal"
    mixed_layouts: bool = False  # the first tensor as `layout`, the others contiguous

    def __str__(self) -> str:
        layout = self.layout + ("+contiguous" if self.mixed_layouts else "")
        return "-".join(
            [name_of(self.dtype), shape_id(self.shape), f"n{self.n}", layout, self.values]
        )

    def tensors(self, device: str = "cpu", seed: int = 0) -> list[Tensor]:
        made = []
        for i in range(self.n):
            x = values(self.shape, self.dtype, self.values, 1000 * seed + i).to(device)
            kind = "contiguous" if self.mixed_layouts and i else self.layout
            made.append(LAYOUTS[kind](x))
        return made

    def weights(self) -> list[float]:
        """Of both signs, none exact in 16 bits, summing to neither 0 nor 1."""
        return [(-1) ** (i // 2) * (0.3 + 0.1 * i) + 0.7 for i in range(self.n)]


def _catalogue() -> tuple[Case, ...]:
    cases = [Case(shape=(size,), dtype=d) for size in SIZES for d in DTYPES]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cases += [Case(shape=s, dtype=dtype, layout=k) for s in SHAPES for k in LAYOUTS]
    cases += [Case(shape=(31, 33), dtype=torch.float16, layout=k) for k in LAYOUTS]
    cases += [Case(shape=(31, 33), layout=k, mixed_layouts=True) for k in LAYOUTS]
    cases += [Case(dtype=d, values=v) for d in DTYPES for v in VALUES]
    cases += [Case(shape=(1025,), n=n, dtype=d) for n in MODELS for d in (DTYPES[0], DTYPES[2])]
    return tuple(dict.fromkeys(cases))


CATALOGUE = _catalogue()
LARGE = tuple(Case(shape=(n,), dtype=d, n=2) for n in CHUNKED for d in DTYPES[:3:2])
