"""tsv_m, iso_c, iso_cts, svc: methods on the singular values and vectors of task vectors.

Each works on matrices by themselves, in float64, and adds the result to the base with one rounding.
Singular vectors are right to 2**-23 (2**-42 for float64 tensors) but for what a small gap between
their values does, so that what is merged errs by less than its rounding to float32; and singular
values up to that share of the largest count as 0. Where the tools take arbitrary vectors for values
of 0, as of sums of a few task vectors of low rank, nothing is put here: polar factors are partial
isometries. A task vector of low rank that was added to a base and rounded with it has full rank, of
noise, which Iso-C and Iso-CTS raise, here as in the tools: merge such models as adapters
(`core_iso_c`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from ..ops.merge_deltas import merge_deltas
from .chunked import Part, elementwise
from .registry import Inputs, Method, Parameter
from .singular import Spectrum, spectrum

_QKV = ("qkv", "in_proj_weight", "c_attn")


@dataclass(frozen=True)
class Matrices:
    """One matrix of every model; iterating gives the task vectors in float64, one at a time."""

    op: str
    name: str
    xs: Sequence[Tensor]
    base: Tensor
    weight: Sequence[float]
    host: str | None

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.vector, range(len(self.xs)))

    def vector(self, i: int) -> Tensor:
        vector = self.xs[i].to(torch.float64, copy=True).sub_(self.base)
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
        return functools.reduce(Tensor.add_, self)

    def upright(self, a: Tensor) -> Tensor:
        """Transposed where a task vector is wide, so that it is tall; and back."""
        return a if self.tall else a.T

    def spectrum(self, a: Tensor, k: int | None = None) -> Spectrum:
        return spectrum(self.upright(a), self.tolerance, k)

    def polar(self, columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return spectrum(torch.cat(list(columns), 1), self.tolerance).polar


def tsv_m(matrices: Matrices) -> Tensor:
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
    found = matrices.spectrum(matrices.total())
    left, right = found.polar
    mean = found.s.sum() / max(1, matrices.rank)
    return matrices.upright(left @ (right * mean))


def shares(rank: int, n: int, common: float) -> tuple[int, int]:
    """Directions of the common space, and of each task: all of `rank`, rounded as in the tools.

    >>> shares(768, 8, 0.8), shares(4, 8, 0.0)
    ((616, 19), (4, 0))
    """
    each = min(round((rank - int(rank * common)) / n), rank // n)
    return rank - n * each, each


def iso_cts(matrices: Matrices, common: float) -> Tensor:
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
    found = matrices.spectrum(matrices.total().mul_(scale))
    u, v = (found.u, found.v) if matrices.tall else (found.v, found.u)
    total = torch.zeros_like(found.s)
    for a in matrices:
        response = u.T @ a
        square = response.square().sum(1).clamp_(min=least)
        along = found.s * torch.linalg.vecdot(response, v.T)
        total += torch.where(square > 0, along / square, alpha).clamp_(min=alpha)
    return (u * (found.s * len(matrices) / total)) @ v.T


# ---- one tensor ------------------------------------------------------------------------------

Recipe = Callable[[Matrices], Tensor]


def _by_matrix(
    op: str, inputs: Inputs, weight: Sequence[float], scale: float, split: bool, recipe: Recipe
) -> Tensor:
    """base + scale * recipe(matrices); with `split` of each matrix of a fused qkv by itself."""
    base, name = inputs.base, inputs.name or "the tensor"
    assert base is not None
    count, axis = _thirds(op, name, base.shape) if split else (1, 0)
    parts = zip(*(torch.chunk(x, count, axis) for x in (base, *inputs.xs)), strict=True)
    each = [recipe(Matrices(op, name, xs, part, weight, inputs.host)) for part, *xs in parts]
    merged = each[0] if count == 1 else torch.cat(each, axis)
    check.finite(op, f"the merged {name}", merged)

    def step(part: Part) -> Tensor:
        return part(1).mul_(scale).add_(part(0))

    return elementwise(
        op,
        [base],
        step,
        beside=[merged],
        out_dtype=inputs.out_dtype,
        backend=inputs.backend,
        acc=torch.float64,
    )


def _thirds(op: str, name: str, shape: Sequence[int]) -> tuple[int, int]:
    """How many matrices a tensor is, and along which axis they lie."""
    if not any(fused in name for fused in _QKV):
        return 1, 0
    rows, columns = shape
    if rows != 3 * columns and columns != 3 * rows:
        raise ArgumentError.of(
            op, f"{name} is not a fused qkv of three squares", list(shape), "[3 d, d] or [d, 3 d]"
        )
    return 3, 0 if rows > columns else 1


def _plain(inputs: Inputs, weight: Sequence[float], scale: float) -> Tensor:
    return merge_deltas(
        inputs.base,
        inputs.xs,
        weight,
        scale=scale,
        out_dtype=inputs.out_dtype,
        backend=inputs.backend,
    )


def _is_matrix(inputs: Inputs, spectral: bool) -> bool:
    shape = inputs.xs[0].shape if inputs.shape is None else inputs.shape
    return spectral and len(shape) == 2


def _merge(op: str, recipe: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def merge(
        inputs: Inputs,
        *,
        weight: list[float],
        lambda_: float,
        spectral: bool,
        split_qkv: bool,
        **given: Any,
    ) -> Tensor:
        if not _is_matrix(inputs, spectral):
            return _plain(inputs, weight, lambda_ / len(weight))
        return _by_matrix(op, inputs, weight, lambda_, split_qkv, lambda m: recipe(m, **given))

    return merge


def _merge_svc(
    inputs: Inputs, *, lambda_: float, alpha: float, spectral: bool, split_qkv: bool
) -> Tensor:
    weight = [1.0] * len(inputs.xs)
    if not _is_matrix(inputs, spectral):
        return _plain(inputs, weight, lambda_)
    if alpha <= 0:
        raise ArgumentError.of("svc", "alpha is not positive", alpha, "above 0")
    least = 1e-12 if inputs.host == "fusion_bench" else 0.0

    def recipe(matrices: Matrices) -> Tensor:
        return svc(matrices, lambda_, alpha, least)

    return _by_matrix("svc", inputs, weight, 1.0, split_qkv, recipe)


def _cut(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> str | None:
    return None if arguments["spectral"] and len(shape) == 2 else "elements"


def _scratch(arguments: Mapping[str, Any], shape: Sequence[int]) -> int:
    """At most 8 matrices of the tensor's size and 10 squares of its shorter side, in float64."""
    if _cut(arguments, shape, None) is not None:
        return 0
    rows, columns = shape
    return 8 * (8 * rows * columns + 10 * min(rows, columns) ** 2)


def _method(
    name: str,
    doc: str,
    merge: Callable[..., Tensor],
    *special: Parameter,
    weighted: bool = True,
    parity: Mapping[str, str] | None = None,
) -> Method:
    weight = Parameter("weight", float, "model", 1.0, "factor on the model's task vector")
    return Method(
        name,
        doc,
        base="required",
        models=(1, None),
        parameters=(
            *([weight] if weighted else []),
            Parameter("lambda", float, "tensor", 1.0, "factor on the merged task vector"),
            *special,
            Parameter("spectral", bool, "tensor", True, "off: matrices are merged as the rest is"),
            Parameter("split_qkv", bool, "tensor", False, "a fused qkv counts as three matrices"),
        ),
        merge=merge,
        cut=_cut,
        scratch=_scratch,
        parity=parity or {},
    )


_MATRICES = (
    "Matrices only: other tensors, and matrices with `spectral` off (a filter on their names, such "
    "as those of embeddings), get lambda times the mean of the task vectors, as in the tools. "
    "With split_qkv a tensor [3 d, d] or [d, 3 d] named qkv, in_proj_weight or c_attn counts as "
    "three matrices; the tools take it as one. NaN or infinity in a matrix is an error."
)
TSV_M = _method(
    "tsv_m",
    "base + lambda * P diag(s) Q^T: of each of T task vectors the r // T largest singular values s "
    "and vectors, r the rank of a full matrix; P and Q are the nearest matrices with orthonormal "
    "columns to those of all tasks side by side (Gargiulo et al., 2412.00081). Matrices of fewer "
    f"than T rows or columns, where r // T is 0, get the mean of the task vectors. {_MATRICES}",
    _merge("tsv_m", tsv_m),
    parity={"fusion_bench": "matrices of fewer than T rows or columns stay the base's"},
)
ISO_C = _method(
    "iso_c",
    "base + lambda * mean(s) U V^T, U diag(s) V^T the SVD of the sum of task vectors: all of its "
    "directions as long as they are on average, over min(shape) (Marczak et al., 2502.04959). "
    f"{_MATRICES}",
    _merge("iso_c", iso_c),
)
ISO_CTS = _method(
    "iso_cts",
    "base + lambda * mean(s) P Q^T: of the sum of task vectors the largest singular values, for a "
    "share `common` of all; of what each task vector has beside the columns of these, the largest "
    "for its part of the rest. P and Q are the nearest matrices with orthonormal columns to their "
    f"vectors side by side (Marczak et al., 2502.04959). {_MATRICES}",
    _merge("iso_cts", iso_cts),
    Parameter("common", float, "tensor", 0.8, "share of the common space", bounds=(0, 1)),
)
SVC = _method(
    "svc",
    "Task arithmetic of factor lambda, U diag(s) V^T, with calibrated singular values: s_r becomes "
    "s_r T / sum_i max(alpha, c_ri), where c_ri = <s_r v_r, a_ri> / |a_ri|^2 says how often the "
    "response a_ri = u_r^T (x_i - base) of task i is counted, alpha where there is none "
    "(2602.05536). Matrices only: other tensors, and matrices with `spectral` off, are those of "
    "task arithmetic. split_qkv, NaN and infinity: as in iso_c.",
    _merge_svc,
    Parameter("alpha", float, "tensor", 1.0, "least count of a response, above 0"),
    weighted=False,
    parity={"fusion_bench": "squares |a_ri|^2 below 1e-12 count as that; within rounding"},
)
