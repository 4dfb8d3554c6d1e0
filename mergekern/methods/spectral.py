"""tsv_m, iso_c, iso_cts, svc: methods on the singular values and vectors of task vectors.

Each works on matrices by themselves, in float64, and adds the result to the base with one rounding.
Singular vectors are right to 2**-23 (2**-42 for float64 tensors) but for what a small gap between
their values does, so that what is merged errs by less than its rounding to float32; and singular
values up to that share of the largest count as 0. Within that error bits depend on the BLAS and on
its number of threads. Where the tools take arbitrary vectors for values
of 0, as of sums of a few task vectors of low rank, nothing is put here: polar factors are partial
isometries. A task vector of low rank that was added to a base and rounded with it has full rank, of
noise, which Iso-C and Iso-CTS raise, here as in the tools: merge such models as adapters
(`core_iso_c`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from ..ops.merge_deltas import merge_deltas
from . import directions
from .chunked import Part, chunks_for, elementwise
from .directions import Matrices
from .registry import Inputs, Method, Parameter

_QKV = ("qkv", "in_proj_weight", "c_attn")
Recipe = Callable[[Matrices], Tensor]


def _by_matrix(
    op: str, inputs: Inputs, weight: Sequence[float], split: bool, recipe: Recipe
) -> Tensor:
    """recipe(matrices) in float64; with `split` of each matrix of a fused qkv by itself."""
    base, name = inputs.base, inputs.name or "the tensor"
    assert base is not None
    chunks_for(op, inputs.backend)  # refuses other backends before the work
    count, axis = _thirds(op, name, base.shape) if split else (1, 0)
    names = [name] if count == 1 else [f"third {i} of {name}" for i in range(count)]
    parts = zip(*(torch.chunk(x, count, axis) for x in (base, *inputs.xs)), strict=True)
    each = [
        recipe(Matrices(op, of, xs, part, weight, inputs.host, inputs.backend))
        for of, (part, *xs) in zip(names, parts, strict=True)
    ]
    merged = each[0] if count == 1 else torch.cat(each, axis)
    check.finite(op, f"the merged {name}", merged)
    return merged


def _added(op: str, inputs: Inputs, merged: Tensor, scale: float) -> Tensor:
    """base + scale * merged, rounded once."""

    def step(part: Part) -> Tensor:
        return part(0) + scale * part(1)

    return elementwise(
        op,
        [inputs.base],
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
        # The points of a sweep that differ in lambda only share what is merged.
        about = (weight, split_qkv, given)
        if inputs.shared.get("about") != about:
            inputs.shared.pop("merged", None)  # before the next is there
            merged = _by_matrix(op, inputs, weight, split_qkv, lambda m: recipe(m, **given))
            inputs.shared.update(about=about, merged=merged)
        return _added(op, inputs, inputs.shared["merged"], lambda_)

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
        return directions.svc(matrices, lambda_, alpha, least)

    return _added("svc", inputs, _by_matrix("svc", inputs, weight, split_qkv, recipe), 1.0)


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
    _merge("tsv_m", directions.tsv_m),
    parity={"fusion_bench": "matrices of fewer than T rows or columns stay the base's"},
)
ISO_C = _method(
    "iso_c",
    "base + lambda * mean(s) U V^T, U diag(s) V^T the SVD of the sum of task vectors: all of its "
    "directions as long as they are on average, over min(shape) (Marczak et al., 2502.04959). "
    f"{_MATRICES}",
    _merge("iso_c", directions.iso_c),
)
ISO_CTS = _method(
    "iso_cts",
    "base + lambda * mean(s) P Q^T: of the sum of task vectors the largest singular values, for a "
    "share `common` of all; of what each task vector has beside the columns of these, the largest "
    "for its part of the rest. P and Q are the nearest matrices with orthonormal columns to their "
    f"vectors side by side (Marczak et al., 2502.04959). {_MATRICES}",
    _merge("iso_cts", directions.iso_cts),
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
