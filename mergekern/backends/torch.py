"""Plain torch, on any device: the fallback of every op, with the same bits as the kernels.

Work goes through chunks that stay in cache, so no temporary is larger than a few chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..check import accumulator
from ..keep import Bernoulli, Keep, Threshold
from . import digits

CHUNK = 1 << 18

# ---- chunks ----------------------------------------------------------------------------------


def _flat(xs: list[Tensor]) -> list[Tensor]:
    """1-d views where all inputs are contiguous, else the tensors as they are."""
    return [x.view(-1) for x in xs] if all(x.is_contiguous() for x in xs) else xs


def _rows(xs: list[Tensor]) -> Iterator[tuple[int, int, int]]:
    """(first row, last row + 1, flat index of the first element) of chunks along axis 0."""
    if not xs[0].numel():
        return
    width = xs[0][0].numel() if xs[0].ndim else 1
    step = max(1, CHUNK // width)
    for begin in range(0, xs[0].shape[0] if xs[0].ndim else 1, step):
        yield begin, begin + step, begin * width


def _part(x: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows [begin, end) in C order as one flat tensor of `dtype`."""
    return (x[begin:end] if x.ndim else x).reshape(-1).to(dtype)


def _store(out: Tensor, begin: int, end: int, values: Tensor) -> None:
    """Rounds `values` once into rows [begin, end) of `out`."""
    target = out[begin:end] if out.ndim else out
    if values.dtype == torch.float64 and out.element_size() == 2:
        values = _to_odd(values)
    target.copy_(values.view(target.shape))


def _to_odd(x: Tensor) -> Tensor:
    """float64 to float32, rounded to odd: rounding that to 16 bits rounds x only once."""
    y = x.to(torch.float32)
    back = y.to(torch.float64)
    bits = y.view(torch.int32)
    inexact = (back != x) & ~x.isnan()
    bits = torch.where(inexact & (back.abs() > x.abs()), bits - 1, bits)
    return torch.where(inexact, bits | 1, bits).view(torch.float32)


def _scalar(value: float, like: Tensor) -> Tensor:
    """A number rounded to the accumulator, on the device.

    As a tensor, since torch turns division by a Python number into a product on GPUs and refuses
    numbers beyond float32.
    """
    return torch.tensor(value, dtype=torch.float64).to(like)


# ---- ops -------------------------------------------------------------------------------------


def weighted_sum(out: Tensor, xs: list[Tensor], weights: list[float], divisor: float) -> None:
    acc = accumulator(xs[0].dtype)
    out, *xs = _flat([out, *xs])
    for begin, end, _ in _rows(xs):
        total = _part(xs[0], begin, end, acc)
        total = total * _scalar(weights[0], total)
        for x, w in zip(xs[1:], weights[1:], strict=True):
            total += _part(x, begin, end, acc) * _scalar(w, total)
        if divisor != 1.0:
            total /= _scalar(divisor, total)
        _store(out, begin, end, total)


def merge_deltas(
    out: Tensor,
    base: Tensor | None,
    xs: list[Tensor],
    weights: list[float],
    factors: list[float],
    keep: list[Keep],
    elect: str | None,
    normalize: bool,
    total: float,
    scale: float,
) -> None:
    acc = accumulator(xs[0].dtype)
    flat = _flat([out, *xs] if base is None else [out, base, *xs])
    out, base, xs = (flat[0], None, flat[1:]) if base is None else (flat[0], flat[1], flat[2:])
    for begin, end, first in _rows(xs):
        origin = None if base is None else _part(base, begin, end, acc)
        vs = []
        for x, factor, k in zip(xs, factors, keep, strict=True):
            d = _part(x, begin, end, acc)
            d = d if origin is None else d - origin
            vs.append(torch.where(_kept(k, d, first), d, 0) * _scalar(factor, d))
        m = torch.zeros_like(vs[0])
        for v in vs:
            m += v
        if elect:
            m, q = _elected(vs, m, weights, elect)
        else:
            q = _scalar(total, m)
        if normalize:
            m /= torch.where(q == 0, 1, q)
        m *= _scalar(scale, m)
        _store(out, begin, end, m if origin is None else origin + m)


def _elected(
    vs: list[Tensor], s: Tensor, weights: list[float], elect: str
) -> tuple[Tensor, Tensor]:
    """The sum of values that agree with the elected sign, and the sum of their weights."""
    votes = s
    if elect == "count":
        votes = torch.zeros_like(s)
        for v in vs:
            votes += (v > 0).to(s.dtype) - (v < 0).to(s.dtype)
    m, q = torch.zeros_like(s), torch.zeros_like(s)
    for v, w in zip(vs, weights, strict=True):
        agrees = torch.where(votes >= 0, ~(v <= 0), ~(v >= 0))
        m += torch.where(agrees, v, 0)
        q += torch.where(agrees, _scalar(w, s), _scalar(0, s))
    if elect == "sum":
        m = torch.where(s.isnan(), s, m)
    return m, q


def l1_norms(base: Tensor | None, xs: list[Tensor], keep: list[Keep]) -> list[tuple[float, float]]:
    acc = accumulator(xs[0].dtype)
    flat = _flat(xs if base is None else [base, *xs])
    base, xs = (None, flat) if base is None else (flat[0], flat[1:])
    norms = []
    for x, k in zip(xs, keep, strict=True):
        everything = kept = 0.0
        for begin, end, first in _rows([x]):
            d = _part(x, begin, end, acc)
            d = d if base is None else d - _part(base, begin, end, acc)
            everything += float(d.abs().sum(dtype=torch.float64))
            kept += float(torch.where(_kept(k, d, first), d, 0).abs().sum(dtype=torch.float64))
        norms.append((everything, kept))
    return norms


def gram(out: Tensor, xs: list[Tensor], base: Tensor | None) -> None:
    flat = _flat(xs if base is None else [base, *xs])
    base, xs = (None, flat) if base is None else (flat[0], flat[1:])
    out.zero_()
    for begin, end, _ in _rows(xs):
        rows = torch.stack([_part(x, begin, end, torch.float64) for x in xs])
        if base is not None:
            rows -= _part(base, begin, end, torch.float64)
        out += rows @ rows.T
    out.copy_(out.triu() + out.triu(1).T)


def permute(out: Tensor, x: Tensor, index: dict[int, Tensor]) -> None:
    grid = []
    for d, size in enumerate(x.shape):
        i = index[d] if d in index else torch.arange(size, device=x.device)
        grid.append(i.view([-1 if d == e else 1 for e in range(x.ndim)]))
    out.copy_(x[tuple(grid)] if grid else x)


# ---- masks -----------------------------------------------------------------------------------


def _magnitude_keys(d: Tensor) -> Tensor:
    """The bits of |d|, NaN as one key above infinity, as int64."""
    if d.dtype == torch.float64:
        return (d.view(torch.int64) & 0x7FFFFFFFFFFFFFFF).clamp_(max=digits.NAN_KEY[d.dtype])
    keys = (d.view(torch.int32) & 0x7FFFFFFF).clamp_(max=digits.NAN_KEY[d.dtype])
    return keys.to(torch.int64)


def _kept(keep: Keep, d: Tensor, first: int) -> Tensor:
    """Which of the elements from flat index `first` on survive."""
    if isinstance(keep, Threshold):
        keys = _magnitude_keys(d)
        key = digits.value_key(keep.value, d.dtype)
        ties = max(0, min(keep.cut - first, d.numel()))
        mask = keys > key
        mask[:ties] = keys[:ties] >= key
        return mask
    if isinstance(keep, Bernoulli) and keep.limit < 65536:
        return _draws(keep.key, first, d.numel(), d.device) < keep.limit
    return torch.ones((), dtype=torch.bool, device=d.device)


def _draws(key: tuple[int, int], first: int, n: int, device: torch.device) -> Tensor:
    """Philox4x32-10: the 16-bit draws of elements [first, first + n), as int64."""
    low, high = 0xFFFFFFFF, 32
    q = torch.arange(first // 8, (first + n - 1) // 8 + 1, dtype=torch.int64, device=device)
    c0, c1, c2, c3 = q & low, q >> high, torch.zeros_like(q), torch.zeros_like(q)
    k0, k1 = key
    for _ in range(10):
        # Products wrap at 64 bits; both halves are right after masking.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> high & low) ^ c1 ^ k0,
            p1 & low,
            (p0 >> high & low) ^ c3 ^ k1,
            p0 & low,
        )
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    words = torch.stack([c0, c1, c2, c3], 1)
    halves = torch.stack([words & 0xFFFF, words >> 16], 2).view(-1)
    return halves[first % 8 :][:n]


# ---- selection -------------------------------------------------------------------------------


def kth_magnitude(x: Tensor, base: Tensor | None, k: int) -> tuple[float, int, int, int]:
    """Value, count above, count equal, and one past the index of the last kept tie."""
    acc = accumulator(x.dtype)
    if base is None and x.element_size() == 2:
        counts = np.zeros(1 << 15, np.int64)
        (flat,) = _flat([x])
        for begin, end, _ in _rows([flat]):
            part = (flat[begin:end] if flat.ndim else flat).reshape(-1)
            bits = part.view(torch.int16).to(torch.int64) & 0x7FFF
            counts += torch.bincount(bits, minlength=1 << 15).cpu().numpy()
        pattern, above, equal = digits.by_patterns(counts, x.dtype, k)
        value = digits.pattern_value(pattern, x.dtype)
        key = digits.value_key(value, acc)
    else:
        key, above, equal = digits.by_digits(
            lambda prefix, shift: _histogram(x, base, prefix, shift),
            64 if acc == torch.float64 else 32,
            k,
        )
        value = digits.key_value(key, acc)
    if equal == k - above:
        return value, above, equal, x.numel()
    ties = k - above
    for keys, first in _keys(x, base):
        found = torch.nonzero(keys == key).view(-1)
        if len(found) >= ties:
            return value, above, equal, first + int(found[ties - 1]) + 1
        ties -= len(found)
    raise AssertionError("fewer ties than were counted")


def _keys(x: Tensor, base: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """Keys of |x - base| chunk by chunk, with the flat index of the first."""
    acc = accumulator(x.dtype)
    flat = _flat([x] if base is None else [x, base])
    for begin, end, first in _rows(flat):
        d = _part(flat[0], begin, end, acc)
        if base is not None:
            d = d - _part(flat[1], begin, end, acc)
        yield _magnitude_keys(d), first


def _histogram(x: Tensor, base: Tensor | None, prefix: int, shift: int) -> np.ndarray:
    counts = np.zeros(1 << 16, np.int64)
    for keys, _ in _keys(x, base):
        chosen = keys[keys >> (shift + 16) == prefix] if shift + 16 < 64 else keys
        digit = chosen >> shift & 0xFFFF
        counts += torch.bincount(digit, minlength=1 << 16).cpu().numpy()
    return counts
