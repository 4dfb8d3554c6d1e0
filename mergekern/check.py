"""Argument checks shared by all ops: what the user passed becomes checked tensors and numbers."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import operator
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What files may hold and no op computes with; float32 holds all of their values.
FLOATS8 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)


@functools.cache
def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type differences are held in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type weighted sums are held in: float32 for 16-bit inputs, else float64."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def unsupported_dtype(op: str, name: str, got: object) -> ArgumentError:
    known = f"one of {', '.join(map(name_of, FLOATS))}"
    return ArgumentError.of(op, f"{name} has an unsupported dtype", got, known)


def tensor(op: str, x: Any, name: str, *, floating: bool = True) -> Tensor:
    """A detached strided tensor of `x`: a Tensor, a numpy array or any DLPack producer."""
    if isinstance(x, np.ndarray):
        x = _from_numpy(op, name, x)
    elif not isinstance(x, Tensor):
        if not hasattr(x, "__dlpack__"):
            kinds = "a torch.Tensor, a numpy array or a DLPack producer"
            raise ArgumentError.of(op, f"{name} is no tensor", type(x).__name__, kinds)
        x = torch.utils.dlpack.from_dlpack(x)
    if x.requires_grad or type(x) is not Tensor:  # a model has thousands that are plain
        x = x.detach()
    if x.layout != torch.strided or x.is_meta or x.is_quantized:
        kind = "meta" if x.is_meta else "quantized" if x.is_quantized else str(x.layout)
        raise ArgumentError.of(op, f"{name} holds no plain data", kind, "strided")
    if floating and x.dtype not in FLOATS:
        raise unsupported_dtype(op, name, name_of(x.dtype))
    x = x.resolve_conj().resolve_neg()
    if x.numel() and x.data_ptr() % x.element_size():
        x = x.clone()  # e.g. a buffer with an odd offset: kernels need aligned elements
    return x


def _from_numpy(op: str, name: str, x: np.ndarray) -> Tensor:
    """The array's memory; a copy where it runs backwards, which torch cannot express."""
    if any(stride < 0 for stride in x.strides):
        x = x.copy()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # read-only arrays: inputs are never written
            return torch.from_numpy(x)
    except TypeError:
        raise unsupported_dtype(op, name, x.dtype) from None


def tensors(op: str, xs: Sequence[Any], name: str = "xs", *, shape: bool = True) -> list[Tensor]:
    """At least one floating tensor, all of one dtype and device, and of one `shape`."""
    if isinstance(xs, Tensor):
        raise ArgumentError.of(op, f"{name} is no list", "one tensor", "a sequence of tensors")
    checked = [tensor(op, x, f"{name}[{i}]") for i, x in enumerate(xs)]
    if not checked:
        raise ArgumentError.of(op, f"{name} is empty", "no tensor", "at least one")
    for i, x in enumerate(checked[1:], start=1):
        same(op, f"{name}[{i}]", x, f"{name}[0]", checked[0], shape=shape)
    return checked


def same(op: str, name: str, x: Tensor, other: str, y: Tensor, *, shape: bool = True) -> None:
    """x and y agree in dtype and device, and in `shape`."""
    if x.dtype == y.dtype and x.device == y.device and (x.shape == y.shape or not shape):
        return  # nearly always: a model has thousands of tensors
    for what, got, expected in (
        ("shape", tuple(x.shape), tuple(y.shape)),
        ("dtype", name_of(x.dtype), name_of(y.dtype)),
        ("device", str(x.device), str(y.device)),
    ):
        if got != expected and (shape or what != "shape"):
            raise ArgumentError.of(op, f"{name} differs from {other} in {what}", got, expected)


def number(op: str, name: str, value: Any, *, finite: bool = True) -> float:
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise ArgumentError.of(op, f"{name} is no number", repr(value), "a number") from None
    if finite and not math.isfinite(result):
        raise ArgumentError.of(op, f"{name} is not finite", result, "a finite number")
    return result


def numbers(op: str, name: str, values: Any, n: int, *, finite: bool = True) -> list[float]:
    """n floats."""
    if isinstance(values, Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ArgumentError.of(op, f"{name} is no list", repr(values), "a sequence of numbers")
    if len(values) != n:
        raise ArgumentError.of(op, f"{name} has the wrong length", len(values), n)
    return [number(op, f"{name}[{i}]", v, finite=finite) for i, v in enumerate(values)]


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def integers(op: str, name: str, values: Any) -> Tensor:
    """A contiguous 1-d int64 tensor, on the device where `values` are if they are a tensor."""
    if isinstance(values, Sequence) and all(map(_is_integer, values)):
        return torch.tensor([operator.index(v) for v in values], dtype=torch.int64)
    i = tensor(op, values, name, floating=False)
    if i.ndim != 1 or i.is_floating_point() or i.is_complex() or i.dtype == torch.bool:
        got = f"{name_of(i.dtype)} of shape {list(i.shape)}"
        raise ArgumentError.of(op, f"{name} is no list", got, "integers, 1-d")
    return i.to(torch.int64).contiguous()


def mask(op: str, bits: Any, numel: int, device: torch.device) -> None:
    """Bits of a stored mask of `numel` elements, packed as numpy.packbits does."""
    expected = f"uint8 [{(numel + 7) // 8}] on {device}, contiguous"
    if not isinstance(bits, Tensor):
        raise ArgumentError.of(op, "mask is no tensor", type(bits).__name__, expected)
    got = f"{name_of(bits.dtype)} {list(bits.shape)} on {bits.device}"
    got += ", contiguous" if bits.is_contiguous() else ""
    if got != expected:
        raise ArgumentError.of(op, "mask does not fit", got, expected)


def parse_size(name: str, size: int | str) -> int:
    """Bytes in a number or a text such as "4GiB", "500MB", "4G" (as 4GiB).

    >>> parse_size("memory", "1.5GiB"), parse_size("memory", "2MB")
    (1610612736, 2000000)
    """
    found = re.fullmatch(r"([0-9.]+)\s*([kKmMgGtT]?)(i?)([bB]?)", str(size).strip())
    try:
        number = float(found.group(1)) if found else -1.0
    except ValueError:
        number = -1.0
    if not found or number <= 0:
        raise ArgumentError(f"{name}: no size; got {size!r}; expected such as 4GiB or 500MB")
    decimal = found.group(4) and not found.group(3)
    power = " kmgt".index(found.group(2).lower() or " ")
    return int(number * (1000 if decimal else 1024) ** power)


def threads() -> int:
    """MERGEKERN_THREADS, or torch's number of threads."""
    text = os.environ.get("MERGEKERN_THREADS")
    if text is None:
        return torch.get_num_threads()
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentError.of("MERGEKERN_THREADS", "no number", repr(text), "1 or more")
    return int(text)


def is_finite(x: Tensor) -> bool:
    """No NaN and no infinity: a sum without either says so, and costs less than a look at each."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def finite(op: str, name: str, x: Tensor) -> None:
    """No NaN and no infinity in a matrix."""
    if not is_finite(x):
        i, j = torch.nonzero(~x.isfinite())[0].tolist()
        raise ArgumentError.of(
            op, f"{name}[{i}, {j}] is not finite", float(x[i, j]), "a finite number"
        )


def choice(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        known = ", ".join(map(str, allowed))
        raise ArgumentError.of(op, f"{name} is unknown", repr(value), f"one of {known}")


def _span(x: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that x touches."""
    first = x.data_ptr()
    if x.is_contiguous():  # nearly always, and a model has hundreds of tensors
        return first, first + x.nbytes
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return first, first + (reach + 1) * x.element_size()


def _overlaps(x: Tensor, y: Tensor) -> bool:
    if not x.numel() or not y.numel() or x.device != y.device:
        return False
    (x0, x1), (y0, y1) = _span(x), _span(y)
    return x0 < y1 and y0 < x1


def names(
    op: str,
    xs: Mapping[str, Any],
    given: Mapping[str, Any],
    out: Mapping[str, Any] | None,
    name: str,
) -> None:
    """Mappings by name: `given` has names of xs, `out` all of them."""
    for what, value in (("xs", xs), (name, given), ("out", {} if out is None else out)):
        if not isinstance(value, Mapping):
            got, expected = type(value).__name__, "a mapping of names"
            raise ArgumentError.of(op, f"{what} is no mapping", got, expected)
    for key in given:
        if key not in xs:
            raise ArgumentError.of(op, f"{name} of no tensor", repr(key), "a name of xs")
    if out is not None and set(out) != set(xs):
        odd = min(set(out) ^ set(xs))
        raise ArgumentError.of(op, "out and xs differ in names", repr(odd), "the names of xs")


def apart(op: str, outs: Mapping[str, Tensor], xs: Mapping[str, Tensor]) -> None:
    """No tensor of `outs` shares memory with another or with one of `xs`."""
    spans = [(*_span(x), True, name) for name, x in outs.items() if x.numel()]
    spans += [(*_span(x), False, name) for name, x in xs.items() if x.numel()]
    written = read = 0  # where memory ends that begins before
    for first, last, output, name in sorted(spans):
        if first < (max(written, read) if output else written):
            which = "out" if output else "xs"
            what = f"{which}[{name!r}] overlaps another tensor"
            raise ArgumentError.of(op, what, "shared memory", "out with memory of its own")
        written, read = (max(written, last), read) if output else (written, max(read, last))


_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def _ask_for_huge_pages(x: Tensor) -> Tensor:
    """Advice to Linux about a large new tensor, whose first touch costs more than the kernel.

    A page of 4 KiB is handed out at a time otherwise: filling a new 256 MB tensor took four times
    as long. Advice only: a system that does not know it goes on as before.
    """
    if x.device.type == "cpu" and x.nbytes >= 2 * _HUGE_PAGE and sys.platform == "linux":
        first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (x.data_ptr() + x.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return x


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two elements may share memory: a stride does not step over the smaller ones."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return x.numel() > 0
            reach += (size - 1) * stride
    return False


def result_dtype(op: str, wanted: torch.dtype | None, out: Any, like: Tensor) -> torch.dtype:
    """`wanted`, else the dtype of `out`, else that of the inputs; one of FLOATS."""
    if wanted is None:
        floating = isinstance(out, Tensor) and out.dtype in FLOATS
        return out.dtype if floating else like.dtype
    if wanted not in FLOATS:
        raise unsupported_dtype(op, "out_dtype", name_of(wanted))
    return wanted


def output(
    op: str,
    out: Tensor | None,
    like: Tensor,
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    inputs: Sequence[Tensor] = (),
    in_place: bool = True,
) -> Tensor:
    """`out` checked, or a new contiguous tensor.

    `out` may be one of the inputs itself if `in_place`; any other overlap is refused.
    """
    shape = tuple(like.shape if shape is None else shape)
    dtype = like.dtype if dtype is None else dtype
    if out is None:
        return _ask_for_huge_pages(torch.empty(shape, dtype=dtype, device=like.device))
    expected = (shape, dtype, like.device)
    if not isinstance(out, Tensor) or (tuple(out.shape), out.dtype, out.device) != expected:
        got = (
            f"{name_of(out.dtype)}{list(out.shape)} on {out.device}"
            if isinstance(out, Tensor)
            else type(out).__name__
        )
        wanted = f"{name_of(dtype)}{list(shape)} on {like.device}"
        raise ArgumentError.of(op, "out does not fit the result", got, wanted)
    if _overlaps_itself(out):
        raise ArgumentError.of(op, "out overlaps itself", "an expanded tensor", "separate elements")
    if out.numel() and out.data_ptr() % out.element_size():
        raise ArgumentError.of(
            op, "out is misaligned", f"address {out.data_ptr():#x}", "aligned elements"
        )
    for x in inputs:
        itself = (
            in_place
            and x.data_ptr() == out.data_ptr()
            and x.dtype == out.dtype
            and x.stride() == out.stride()
        )
        if not itself and _overlaps(out, x):
            raise ArgumentError.of(
                op, "out overlaps an input", "shared memory", "memory of its own"
            )
    return out.detach()
