"""The selection of arcee_fusion: importances streamed row by row, thresholds by counting digits.

An importance is |x - base| (in the accumulator) times the KL of its row (float64), rounded once to
the accumulator. KL is sum p log(p / q) - p + q, which is sum p log(p / q), as p and q have one sum:
so written, rounding of the softmax cancels, and it is never below 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from .. import check, digits
from .chunked import chunks_for, select

_EPS = 1e-8  # mergekit's addition to each probability
_STORED_ROWS = 1 << 21  # the KL of so many rows is kept (16 MB); of more it is taken anew
_SAMPLE = 1_000_000  # mergekit's, for quantiles of larger tensors


def fuse(base: Tensor, x: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    """x where its importance reaches the threshold, else base."""
    chunks = chunks_for("arcee_fusion", backend)
    check.same("arcee_fusion", "tensors[0]", x, "base", base)
    result = check.output("arcee_fusion", None, x, dtype=out_dtype)
    if not x.numel():
        return result
    acc = check.accumulator(x.dtype)
    stored = None
    if x.numel() <= _STORED_ROWS * _width(x):
        # One tensor, filled: many small ones that stay would cut up the memory between them.
        stored = torch.empty(x.numel() // _width(x), dtype=torch.float64, device=x.device)
        row = 0
        for _, (b, v) in _rows([base, x], chunks.CHUNK):
            stored[row : row + len(b)] = _kl(b, v, chunks.CHUNK)
            row += len(b)

    def parts() -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """(flat index of the first, base, x, importance), flat and in the accumulator."""
        row = 0
        for first, (b, v) in _rows([base, x], chunks.CHUNK):
            kl = _kl(b, v, chunks.CHUNK) if stored is None else stored[row : row + len(b)]
            row += len(b)
            for column, (p, q) in _columns([b, v], chunks.CHUNK):
                p, q = p.to(acc), q.to(acc)
                importance = ((q - p).abs() * kl[:, None]).to(acc)
                yield first + column, p.reshape(-1), q.reshape(-1), importance.reshape(-1)

    def keys() -> Iterator[Tensor]:
        return (chunks.magnitude_keys(importance) for *_, importance in parts())

    threshold = _threshold(keys, x.numel(), acc)
    out = result.view(-1)
    for first, p, q, importance in parts():
        taken = importance >= threshold
        # v - v is 0 or, where v is not finite, NaN, as in base + (x - base) * mask.
        none = p - p
        merged = select(taken, q - none, p - none - (q - q))
        chunks.store(out, first, first + len(p), merged)
    return result


def fuse_as_mergekit(base: Tensor, x: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    """The same with every step in the tensors' dtype, quantiles of large tensors from a sample."""
    chunks = chunks_for("arcee_fusion", backend)
    check.same("arcee_fusion", "tensors[0]", x, "base", base)
    result = check.output("arcee_fusion", None, x, dtype=out_dtype)
    if not x.numel():
        return result

    def parts() -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        for first, (b, v) in _rows([base, x], chunks.CHUNK):
            p, q = torch.softmax(v, -1) + _EPS, torch.softmax(b, -1) + _EPS
            kl = (p * (p / q).log()).sum(-1, keepdim=True)
            yield first, b.reshape(-1), v.reshape(-1), ((v - b).abs() * kl).reshape(-1)

    sample = _sampled(parts, x.numel(), x).sort().values
    q1, median, q3 = (sample[i * (len(sample) - 1) // 4] for i in (1, 2, 3))
    threshold = median + 1.5 * (q3 - q1)
    out = result.view(-1)
    for first, b, v, importance in parts():
        mask = (importance >= threshold).to(torch.float32)
        chunks.store(out, first, first + len(b), b + (v - b) * mask)
    return result


def _sampled(
    parts: Callable[[], Iterable[tuple[int, Tensor, Tensor, Tensor]]], n: int, like: Tensor
) -> Tensor:
    """All importances or, of more than a million, a million at places that torch draws."""
    if n <= _SAMPLE:
        return torch.cat([importance for *_, importance in parts()])
    index = torch.randint(n, (_SAMPLE,), device=like.device).sort().values
    sample = torch.empty(_SAMPLE, dtype=like.dtype, device=like.device)
    for first, *_, importance in parts():
        bounds = torch.tensor([first, first + len(importance)], device=like.device)
        low, high = torch.searchsorted(index, bounds).tolist()
        sample[low:high] = importance[index[low:high] - first]
    return sample


def _width(x: Tensor) -> int:
    return x.shape[-1] if x.ndim else 1


def _rows(xs: list[Tensor], most: int) -> Iterator[tuple[int, list[Tensor]]]:
    """(flat index of the first element, the tensors as matrices) of about `most` elements."""
    width = _width(xs[0])
    if all(x.is_contiguous() for x in xs) or xs[0].ndim < 2:
        xs = [x.reshape(-1, width) for x in xs]
    each = xs[0][0].numel()
    step = max(1, most // each)
    for begin in range(0, len(xs[0]), step):
        yield begin * each, [x[begin : begin + step].reshape(-1, width) for x in xs]


def _columns(xs: list[Tensor], most: int) -> Iterator[tuple[int, list[Tensor]]]:
    """(first column, the columns): all of a matrix that is no larger than `most`."""
    step = max(1, most // len(xs[0]))
    for begin in range(0, xs[0].shape[1], step):
        yield begin, [x[:, begin : begin + step] for x in xs]


def _kl(base: Tensor, x: Tensor, most: int) -> Tensor:
    """KL(softmax(x) + eps || softmax(base) + eps) of every row, in float64."""
    softmax = [_softmax(v, most) for v in (x, base)]
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _, (v, b) in _columns([x, base], most):
        p, q = (f(part) + _EPS for f, part in zip(softmax, (v, b), strict=True))
        d = p - q
        total += (p * (p / q).log_()).sub_(d).sum(1)
    return total.clamp_(min=0)


def _softmax(x: Tensor, most: int) -> Callable[[Tensor], Tensor]:
    """The function that turns columns of x into their share of the softmax of each whole row."""
    top = torch.full((len(x), 1), -math.inf, dtype=torch.float64, device=x.device)
    for _, (part,) in _columns([x], most):
        top = torch.maximum(top, part.amax(1, keepdim=True).to(torch.float64))
    total = torch.zeros_like(top)
    for _, (part,) in _columns([x], most):
        total += (part.to(torch.float64) - top).exp_().sum(1, keepdim=True)
    return lambda part: (part.to(torch.float64) - top).exp_().div_(total)


def _threshold(keys: Callable[[], Iterable[Tensor]], n: int, acc: torch.dtype) -> float:
    """median + 1.5 (q3 - q1), rounded up to `acc`: what reaches the one reaches the other."""
    ranks = [n - i * (n - 1) // 4 for i in (1, 2, 3)]
    bits = 64 if acc == torch.float64 else 32
    q1, median, q3 = (digits.key_value(k, acc) for k in _select(keys, ranks, bits))
    exact = torch.tensor(median + 1.5 * (q3 - q1), dtype=torch.float64)
    rounded = exact.to(acc)
    up = torch.nextafter(rounded, torch.tensor(math.inf, dtype=acc))
    return float(up if rounded < exact else rounded)


def _select(keys: Callable[[], Iterable[Tensor]], ranks: list[int], bits: int) -> list[int]:
    """The keys of those ranks (1 the largest), with one read per 16-bit digit for all of them."""
    found = [(0, k) for k in ranks]  # digits so far, rank among the keys that begin with them
    for shift in range(bits - 16, -1, -16):
        counts = {prefix: np.zeros(1 << 16, np.int64) for prefix, _ in found}
        for chunk in keys():
            for prefix, count in counts.items():
                # Keys that begin otherwise are counted in a last bin; choosing would cost more.
                digit = ((chunk >> shift) ^ (prefix << 16)).clamp_(max=1 << 16)
                count += torch.bincount(digit, minlength=(1 << 16) + 1)[:-1].cpu().numpy()
        for i, (prefix, k) in enumerate(found):
            last, above, _ = digits.in_histogram(counts[prefix], k)
            found[i] = (prefix << 16 | last, k - above)
    return [key for key, _ in found]
