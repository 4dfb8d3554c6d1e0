"""wudi and wudi_exact: one task vector per matrix that disturbs none of the models' own.

The loss sum_i |(W - tau_i) tau_i^T|^2 / |tau_i|^2 is a quadratic of W: its gradient is
2 (W G - C) with G = sum_i tau_i^T tau_i / |tau_i|^2 and C = sum_i tau_i tau_i^T tau_i / |tau_i|^2.
G [in, in] and R = S G - C at the start S = sum_i tau_i are summed once, in float64. With W = S + D
the gradient is 2 (D G + R): a step needs no more, so its time does not depend on how many models
there are. Steps are float32, but D is small, and every 20 of them S and R take it over in float64:
near the minimum, where R is nearly 0 and Adam looks at signs, W G - C would be rounding alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from .. import check
from ..ops.merge_deltas import merge_deltas
from .chunked import chunks_for, rounded
from .registry import Inputs, Method, Parameter

PERIOD = 20  # steps between float64 products, each of which takes the time of two
_LAMBDA = Parameter("lambda", float, "tensor", 1.0, "factor on the merged task vector")


class Quadratic(NamedTuple):
    """S, G and R of one matrix, in float64."""

    total: Tensor
    gram: Tensor
    residual: Tensor


def quadratic(op: str, inputs: Inputs) -> Quadratic:
    """R as sum_i (S - tau_i) tau_i^T tau_i / |tau_i|^2: exactly 0 where one model is all there is.

    A task vector of length 0 has nothing to be disturbed, and adds nothing.
    """
    assert inputs.base is not None
    chunks_for(op, inputs.backend)  # refuses other backends before the work
    total = torch.zeros_like(inputs.base, dtype=torch.float64)
    for i, x in enumerate(inputs.xs):
        vector = x.double() - inputs.base
        check.finite(op, f"task vector {i} of {inputs.name or 'the matrix'}", vector)
        total += vector
    gram = total.new_zeros(total.shape[1], total.shape[1])
    residual = torch.zeros_like(total)
    for x in inputs.xs:
        unit = x.double() - inputs.base
        others = total - unit
        length = torch.linalg.vector_norm(unit)
        if length > 0:
            unit /= length
            own = unit.T @ unit
            gram += own
            residual.addmm_(others, own)
    return Quadratic(total, gram, residual)


def descend(q: Quadratic, steps: int, rate: float, acc: torch.dtype) -> None:
    """Moves S by so many steps of Adam, in `acc`: every few of them S and R follow in float64."""
    gram = (2 * q.gram).to(acc)
    moved, mean, square = (torch.zeros_like(q.total, dtype=acc) for _ in range(3))
    residual, gradient = torch.empty_like(moved), torch.empty_like(moved)
    count = torch.zeros((), device=moved.device)
    for begin in range(0, steps, PERIOD):
        residual.copy_(q.residual).mul_(2)
        for _ in range(begin, min(begin + PERIOD, steps)):
            torch.addmm(residual, moved, gram, out=gradient)
            adam(
                [moved],
                [gradient],
                [mean],
                [square],
                [],
                [count],
                fused=True,  # one pass over its tensors
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )
        wide = moved.double()
        q.total.add_(wide)
        q.residual.addmm_(wide, q.gram)
        moved.zero_()


def _is_matrix(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and min(shape) > 0


def _cut(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> str | None:
    return None if _is_matrix(shape) else "elements"


def _average(inputs: Inputs, lambda_: float) -> Tensor:
    return merge_deltas(
        inputs.base,
        inputs.xs,
        [1.0] * len(inputs.xs),
        normalize=True,
        scale=lambda_,
        out_dtype=inputs.out_dtype,
        backend=inputs.backend,
    )


def _added(op: str, inputs: Inputs, lambda_: float, vector: Tensor) -> Tensor:
    """base + lambda times the merged task vector, rounded once."""
    assert inputs.base is not None
    return rounded(op, vector.mul_(lambda_).add_(inputs.base), inputs.out_dtype, inputs.backend)


@torch.no_grad()
def wudi(inputs: Inputs, *, steps: int, rate: float, lambda_: float) -> Tensor:
    if inputs.shape is not None or not _is_matrix(inputs.xs[0].shape):
        return _average(inputs, lambda_)
    q = quadratic("wudi", inputs)
    descend(q, steps, rate, check.accumulator(inputs.xs[0].dtype))
    return _added("wudi", inputs, lambda_, q.total)


@torch.no_grad()
def wudi_exact(inputs: Inputs, *, lambda_: float) -> Tensor:
    if inputs.shape is not None or not _is_matrix(inputs.xs[0].shape):
        return _average(inputs, lambda_)
    q = quadratic("wudi_exact", inputs)
    inverse = torch.linalg.pinv(q.gram, rtol=len(q.gram) * 2.0**-52, hermitian=True)
    q.total.addmm_(q.residual, inverse, alpha=-1)
    return _added("wudi_exact", inputs, lambda_, q.total)


def _scratch(arguments: Mapping[str, Any], shape: Sequence[int]) -> int:
    """Of [out, in] S, R, D twice, its residual, gradient and moments; of [in, in] G twice."""
    return 8 * (8 * shape[0] * shape[1] + 2 * shape[1] ** 2) if _is_matrix(shape) else 0


def _exact_scratch(arguments: Mapping[str, Any], shape: Sequence[int]) -> int:
    """Of [out, in] S, R and what they are summed from; of [in, in] G and an eigendecomposition."""
    return 8 * (6 * shape[0] * shape[1] + 5 * shape[1] ** 2) if _is_matrix(shape) else 0


WUDI = Method(
    "wudi",
    "base + lambda W, W found by `steps` steps of Adam (torch's defaults but `rate`) from sum_i "
    "tau_i on sum_i |(W - tau_i) tau_i^T|^2 / |tau_i|^2, tau_i = x_i - base (2503.08099). Of "
    "matrices; other tensors, convolutions too, are base + lambda mean tau_i. The sums that a "
    "step needs are float64, steps float32 (float64 of such models): within 1e-6 of the task "
    "vector of FusionBench, and closer to float64. A task vector of length 0 adds nothing (there: "
    "NaN); NaN and infinities are refused. A step is one product [out, in] x [in, in] and one pass "
    "of Adam for any number of models, which cost 4 float64 products each before the first step.",
    base="required",
    models=(1, None),
    parameters=(
        Parameter("steps", int, "tensor", 300, "of Adam", bounds=(0, 2**31)),
        Parameter("rate", float, "tensor", 1e-5, "learning rate", bounds=(0, 1)),
        _LAMBDA,
    ),
    merge=wudi,
    cut=_cut,
    scratch=_scratch,
)

WUDI_EXACT = Method(
    "wudi_exact",
    "base + lambda W, W the minimum of the loss of `wudi`: W = S - R G^+, another model than its "
    "300 steps give. A singular G is one that no task vector reaches in some direction of the "
    "inputs; W is 0 there, as all of them are, so that the least W and the one nearest to S are "
    "the same. Eigenvalues of G up to in 2**-52 of the largest count as 0. float64, so the error "
    "of W is that condition number times 2**-53. Other tensors, NaN and task vectors of length 0 "
    "as in `wudi`.",
    base="required",
    models=(1, None),
    parameters=(_LAMBDA,),
    merge=wudi_exact,
    cut=_cut,
    scratch=_exact_scratch,
)
