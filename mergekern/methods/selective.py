"""nearswap and arcee_fusion: take from one model what lies near the base, or far from it."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked import Part, elementwise, number
from .fusion import fuse, fuse_as_mergekit
from .registry import REQUIRED, Inputs, Method, Parameter, anywhere

_LEAST = 1e-6  # mergekit's floor of |base - x|, below which the step shrinks with it


def nearswap(inputs: Inputs, *, t: float) -> Tensor:
    """x clamped to [base - t, base + t]; for t below 1e-6, base + clamp(x - base, -1e-6, 1e-6)
    t / 1e-6. Either is weight x + (1 - weight) base, without its division and cancellation.
    (Of a zero x at a bound that is zero as well, the sign may be that of either.)"""
    share = max(t, 0.0) / _LEAST  # of the difference, where that is least

    def step(part: Part) -> Tensor:
        base, x = part(0), part(1)
        if share < 1:
            least = number(_LEAST, base)
            merged = base + (x - base).clamp(-least, least) * number(share, base)
        else:
            most = number(t, base)
            merged = torch.minimum(torch.maximum(x, base - most), base + most)
        # The weight of an infinite x is 0, and 0 times infinity is no number; else x - x is 0.
        return merged - (x - x)

    def as_mergekit(part: Part) -> Tensor:
        base, x = part(0), part(1)
        weight = (t / (base - x).abs().clamp(min=_LEAST)).clamp(0, 1)
        return weight * x + (1 - weight) * base

    assert inputs.base is not None
    return elementwise(
        "nearswap",
        [inputs.base, *inputs.xs],
        as_mergekit if inputs.host else step,
        out_dtype=inputs.out_dtype,
        backend=inputs.backend,
        acc=inputs.base.dtype if inputs.host else None,
    )


NEARSWAP = Method(
    "nearswap",
    "w x + (1 - w) base, w = clamp(t / max(|base - x|, 1e-6), 0, 1): each element moves to the "
    "model by t at most, and becomes the model's where it is nearer (alchemonaut, "
    "QuartetAnemoi-70B). In float32 one rounding of base + t or base - t, for t below 1e-6 four, "
    "and one to the result. NaN in either, and an infinite x, give NaN; an infinite base stays.",
    base="required",
    models=(1, 1),
    parameters=(Parameter("t", float, "tensor", REQUIRED, "the most an element may move"),),
    merge=nearswap,
    cut=anywhere,
    parity={"mergekit": "the same bits: every step rounded to the tensors' dtype"},
)


def arcee_fusion(inputs: Inputs) -> Tensor:
    assert inputs.base is not None
    merge = fuse_as_mergekit if inputs.host else fuse
    return merge(inputs.base, inputs.xs[0], inputs.out_dtype, inputs.backend)


ARCEE_FUSION = Method(
    "arcee_fusion",
    "x where |x - base| times KL(softmax(x) || softmax(base)) of its row is at least median + 1.5 "
    "(q3 - q1) of all of them, else base (Arcee Fusion). Exact quantiles of all elements, without "
    "a sort or a sample; KL in float64; every element is one of the two inputs, rounded once to "
    "the result. A row with NaN, +infinity or nothing but -infinity has no KL: it ranks above all "
    "numbers and nothing of it is taken. NaN where base is not finite, and where x is not finite "
    "and not taken. Tensors are merged whole: quantiles of importances in slices would take the "
    "softmax of every row anew in each of four passes.",
    base="required",
    models=(1, 1),
    parameters=(),
    merge=arcee_fusion,
    parity={
        "mergekit": "the same elements under the same torch seed, which it takes its sample with; "
        "of 16-bit tensors its float32 result rounded to their dtype"
    },
    draws=frozenset({"mergekit"}),
)
