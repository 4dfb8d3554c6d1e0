"""magmax and consensus, and the masks by which one task vector serves many models.

tau_i = x_i - base in float32 (float64 for float64); with base None the xs are task vectors. Sums
run in input order, every step rounded; masks are numpy.packbits bytes (`Mask`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import check
from ..bits import unpack
from ..errors import ArgumentError
from ..keep import Mask
from .bits import Packer
from .chunked import Part, chunks_for, number, select
from .deltas import SCALE, checked, deltas, merge_chunks, total_of
from .registry import REQUIRED, Inputs, Method, Parameter, anywhere

# ---- MagMax ----------------------------------------------------------------------------------


def magmax(inputs: Inputs, *, scale: float) -> Tensor:
    n, host = len(inputs.xs), inputs.host

    def step(part: Part) -> Tensor:
        each = deltas(part, n, True)
        best = next(each)
        for d in each:
            larger = d.abs() >= best.abs() if host else (d.abs() > best.abs()) | d.isnan()
            best = select(larger, d, best)
        return part(n) + best * (scale if host else number(scale, best))

    return merge_chunks("magmax", inputs, step, inputs.xs[0].dtype if host else None)


MAGMAX = Method(
    "magmax",
    "base + scale * the task vector of largest magnitude at each element, its sign kept; of equal "
    "ones the first model's (Marczak et al., 2407.06322). NaN ranks above infinity. At most 4 "
    "roundings.",
    base="required",
    models=(1, None),
    parameters=(SCALE,),
    merge=magmax,
    cut=anywhere,
    parity={
        "fusion_bench": "the same bits: of equal magnitudes the last model's, a NaN wins only if "
        "the first model has it, every step rounded to the tensors' dtype"
    },
)


# ---- TALL masks ------------------------------------------------------------------------------


def tall_masks(
    base: Tensor | None,
    xs: Sequence[Tensor],
    merged: Tensor | None = None,
    lambda_: float | Sequence[float] = 1.0,
    *,
    backend: str = "auto",
) -> list[Mask]:
    """mask_i = |tau_i| > lambda_i |merged - x_i|.

    merged: the multi-task model; None: base + sum_i tau_i, of which only sum_j tau_j - tau_i is
    formed. With base None, `merged` is a task vector as the xs are.
    lambda_: one number, or one per model.

    Shapes: all of one shape, any strides. Dtypes: floating, one for all.
    Result: the same bits on every device and split. NaN on either side of > gives 0.
    Cost: one read of base, xs and merged; a bit per element and model.
    Raises: ArgumentError for unequal inputs and other than finite numbers.
    Source: TALL masks (Wang et al., 2405.07813); tall_masks `generate_task_masks`.

    >>> import torch
    >>> a, b = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0])
    >>> [m.bits.tolist() for m in tall_masks(torch.zeros(2), [a, b])]
    [[192], [0]]
    """
    op = "tall_masks"
    chunks = chunks_for(op, backend)
    tensors = checked(op, base, xs)
    n = len(xs)
    values = lambda_ if isinstance(lambda_, Sequence) else [lambda_] * n
    factors = check.numbers(op, "lambda_", values, n)
    if merged is not None:
        merged = check.tensor(op, merged, "merged")
        check.same(op, "merged", merged, "xs[0]", tensors[0])
        tensors = [*tensors, merged]
    acc = check.accumulator(tensors[0].dtype)
    packers = [Packer(tensors[0].numel(), tensors[0].device) for _ in range(n)]
    flat = chunks.flat(tensors)
    for begin, end, _ in chunks.rows(flat):

        def part(i: int, begin: int = begin, end: int = end) -> Tensor:
            return chunks.part(flat[i], begin, end, acc)

        masks = _localize(part, n, base is not None, factors, merged is not None)
        for packer, mask in zip(packers, masks, strict=True):
            packer.add(mask)
    return [packer.mask() for packer in packers]


def _localize(
    part: Part, n: int, base: bool, factors: list[float], merged: bool = False
) -> Iterator[Tensor]:
    """The masks of a chunk, one at a time; `merged` is the last tensor if it is given."""
    total = None if merged else total_of(part, n, base)
    for i, d in enumerate(deltas(part, n, base)):
        rest = part(n + base) - part(i) if total is None else total - d
        yield d.abs() > rest.abs() * number(factors[i], d)


def masked(
    base: Tensor, delta: Tensor, mask: Mask, scale: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """base + scale * delta where the mask is set, base elsewhere.

    Shapes: all of one; the mask a bit per element. Result: in the dtype of base, one rounding
    after float32 arithmetic (float64 for float64).
    Raises: ArgumentError where they do not fit.
    Source: the per-model weights of EMR (2405.17461) and TALL masks (2405.07813).

    >>> import torch
    >>> mask = Mask(torch.tensor([128], dtype=torch.uint8))
    >>> masked(torch.ones(2), torch.ones(2), mask, 0.5)
    tensor([1.5000, 1.0000])
    """
    chunks = chunks_for("masked", backend)
    base, delta = check.tensors("masked", [base, delta])
    check.mask("masked", mask.bits, base.numel(), base.device)
    acc = check.accumulator(base.dtype)
    result = check.output("masked", None, base)
    out, origin, d = chunks.flat([result, base, delta])
    for begin, end, first in chunks.rows([origin]):
        b = chunks.part(origin, begin, end, acc)
        moved = b + chunks.part(d, begin, end, acc) * number(scale, b)
        chunks.store(out, begin, end, select(unpack(mask.bits, first, len(b)), moved, b))
    return result


def consensus_mask(masks: Sequence[Mask], k: int, numel: int) -> Mask:
    """Set where at least k of the masks are.

    Shapes: masks of `numel` elements each. k 0 sets all, k above their number none.
    Raises: ArgumentError where they do not fit.
    Source: tall_masks `construct_consensus_mask` (its prun_thre_k is k).

    >>> import torch
    >>> a, b = (Mask(torch.tensor([v], dtype=torch.uint8)) for v in (0b11000000, 0b10100000))
    >>> [consensus_mask([a, b], k, 3).bits.tolist() for k in (0, 1, 2, 3)]
    [[224], [224], [128], [0]]
    """
    if not masks:
        raise ArgumentError.of("consensus_mask", "masks is empty", "no mask", "at least one")
    device = masks[0].bits.device
    for mask in masks:
        check.mask("consensus_mask", mask.bits, numel, device)
    packer = Packer(numel, device)
    step = 1 << 18
    for first in range(0, numel, step):
        count = torch.zeros(min(step, numel - first), dtype=torch.int32, device=device)
        for mask in masks:
            count += unpack(mask.bits, first, len(count))
        packer.add(count >= k)
    return packer.mask()


def consensus(inputs: Inputs, *, scale: float, lambda_: list[float], k: int) -> Tensor:
    n = len(inputs.xs)

    def step(part: Part) -> Tensor:
        total = total_of(part, n, True)
        count = torch.zeros_like(total, dtype=torch.int32)
        for mask in _localize(part, n, True, lambda_):
            count += mask
        base = part(n)
        # Where the sum is no number no mask is set; hiding that would be worse than passing it on.
        kept = (count >= k) | ~total.isfinite()
        return select(kept, base + total * number(scale, total), base)

    return merge_chunks("consensus", inputs, step)


CONSENSUS = Method(
    "consensus",
    "base + scale * sum_i tau_i where at least k models need it by their TALL masks, |tau_i| > "
    "lambda_i |sum_j tau_j - tau_i|; base elsewhere (Wang et al., 2405.07813). k 1 drops what no "
    "model needs, 2 also what one alone does. Where the sum is not finite it is taken as it is.",
    base="required",
    models=(1, None),
    parameters=(
        SCALE,
        Parameter("lambda", float, "model", REQUIRED, "factor in the model's TALL mask"),
        Parameter("k", int, "tensor", 2, "fewest masks that must be set", bounds=(0, math.inf)),
    ),
    merge=consensus,
    cut=anywhere,
)
