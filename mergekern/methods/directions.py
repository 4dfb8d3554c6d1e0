"""Task vectors of one matrix merged by their singular values and vectors, in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import check
from ..ops.weighted_sum import weighted_sum
from .chunked import Part, elementwise
from .singular import Spectrum, product_in_place, spectrum

DIRECT = (torch.float32, torch.float64)  # of which a weighted sum is held in float64


@dataclass(frozen=True)
class Matrices:
    """One matrix of every model; iterating gives the task vectors in float64, one at a time."""

    op: str
    name: str
    xs: Sequence[Tensor]
    base: Tensor
    weight: Sequence[float]
    host: str | None
    backend: str = "auto"

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.vector, range(len(self.xs)))

    def vector(self, i: int) -> Tensor:
        x = self.xs[i]
        if x.dtype in DIRECT:  # one rounding, as below, and a pass
            vector = self._sum([x, self.base], [1.0, -1.0])
        else:
            vector = x.to(torch.float64, copy=True).sub_(self.base)
        check.finite(self.op, f"task vector {i} of {self.name}", vector)
        return vector if self.weight[i] == 1 else vector.mul_(self.weight[i])

    def __len__(self) -> int:
        return len(self.xs)

    @property
    def rank(self) -> int:
        return min(self.base.shape)

    @property
    def tall(self) -> bool:
        return self.base.shape[0] >= self.base.shape[1]

    @property
    def tolerance(self) -> float:
        return 2.0**-42 if self.base.dtype == torch.float64 else 2.0**-23

    def total(self) -> Tensor:
        """The sum of the task vectors."""
        n = len(self)
        if self.base.dtype == torch.float32 and all(w == 1 for w in self.weight):
            # Exact, unless an x is beyond 2**26 times another or the base: then its task vector is
            # so long that it is right to n 2**-52 of that.
            total = self._sum([self.base, *self.xs], [-float(n), *self.weight])
        else:
            total = self._chunked()
        if not check.is_finite(total):
            for _ in self:  # says which task vector it is
                pass
            check.finite(self.op, f"the sum of task vectors of {self.name}", total)
        return total

    def _sum(self, xs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return weighted_sum(xs, weights, out_dtype=torch.float64, backend=self.backend)

    def _chunked(self) -> Tensor:
        of = range(1, len(self) + 1)

        def step(part: Part) -> Tensor:
            base = part(0)
            terms = (part(i) - base for i in of)
            weighted = (x if w == 1 else x.mul_(w) for x, w in zip(terms, self.weight, strict=True))
            return functools.reduce(Tensor.add_, weighted)

        both, kind = [self.base, *self.xs], torch.float64
        return elementwise(self.op, both, step, out_dtype=kind, acc=kind, backend=self.backend)

    def upright(self, a: Tensor) -> Tensor:
        """Transposed where a task vector is wide, so that it is tall; and back."""
        return a if self.tall else a.T

    def spectrum(self, a: Tensor, k: int | None = None) -> Spectrum:
        return spectrum(self.upright(a), self.tolerance, k)

    def polar(self, columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return spectrum(torch.cat(list(columns), 1), self.tolerance).polar


def tsv_m(matrices: Matrices) -> Tensor:
    """polar([u_1 ... u_T]) diag(s_1 ... s_T) polar([v_1 ... v_T])^T of the first r // T of each."""
    k = matrices.rank // len(matrices)
    if not k and matrices.host is None:
        return matrices.total().div_(len(matrices))
    us, ss, vs = [], [], []
    for vector in matrices:
        found = matrices.spectrum(vector, k)
        us.append(found.u)
        ss.append(found.s)
        vs.append(found.v)
        del vector, found  # before the next
    right, other = matrices.polar(vs)
    left, inner = matrices.polar(us)
    return matrices.upright(left @ ((inner * torch.cat(ss)) @ (right @ other).T))


def iso_c(matrices: Matrices) -> Tensor:
    """mean(s) u v^T of the sum."""
    found = matrices.spectrum(matrices.total())
    left, right = found.polar
    mean = found.s.sum() / max(1, matrices.rank)
    return matrices.upright(product_in_place(left, right * mean))


def shares(rank: int, n: int, common: float) -> tuple[int, int]:
    """Directions of the common space, and of each task: all of `rank`, rounded as in the tools.

    >>> shares(768, 8, 0.8), shares(4, 8, 0.0)
    ((616, 19), (4, 0))
    """
    each = min(round((rank - int(rank * common)) / n), rank // n)
    return rank - n * each, each


def iso_cts(matrices: Matrices, common: float) -> Tensor:
    """mean(s) polar([u_1 ... u_T u]) polar([v_1 ... v_T v])^T: u, s, v are the first of the sum,
    and u_i, s_i, v_i of task vector i less u u^T times it."""
    size, each = shares(matrices.rank, len(matrices), common)
    found = matrices.spectrum(matrices.total(), size)
    u, v = (found.u, found.v) if matrices.tall else (found.v, found.u)
    us, ss, vs = [], [found.s], []
    del found
    # What lies in the common space, on the side of the rows, is taken out of each task vector.
    rest = None if matrices.tall else torch.linalg.qr(u, "complete").Q[:, u.shape[1] :]
    tolerance = matrices.tolerance
    for vector in matrices if each else ():
        least = tolerance * float(torch.linalg.vector_norm(vector))
        if rest is None:
            own = spectrum(vector, tolerance, each, beside=u, least=least)
            us.append(own.u - u @ (u.T @ own.u))
            vs.append(own.v)
        else:
            own = spectrum(vector.T @ rest, tolerance, each, least=least)
            us.append(rest @ own.v)
            vs.append(own.u)
        ss.append(own.s)
        del vector, own  # before the next
    # The two groups of columns on that side are orthogonal, and the second is so in itself.
    tasks = [torch.matmul(*matrices.polar(us))] if us else []
    left = torch.cat([*tasks, u], 1)
    right, inner = matrices.polar([*vs, v])
    mean = torch.cat(ss).sum() / max(1, matrices.rank)
    return (left * mean) @ (right @ inner).T


def svc(matrices: Matrices, scale: float, alpha: float, least: float) -> Tensor:
    """u diag(s T / sum_i max(alpha, count_i)) v^T of the scaled sum; squares count as `least`."""
    found = matrices.spectrum(matrices.total().mul_(scale))
    u, v = (found.u, found.v) if matrices.tall else (found.v, found.u)
    total = torch.zeros_like(found.s)
    for a in matrices:
        response = u.T @ a
        square = response.square().sum(1).clamp_(min=least)
        along = found.s * torch.linalg.vecdot(response, v.T)
        total += torch.where(square > 0, along / square, alpha).clamp_(min=alpha)
    return (u * (found.s * len(matrices) / total)) @ v.T
