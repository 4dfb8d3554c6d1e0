"""emr: one task vector for many models, by elected sign and largest magnitude, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from ..keep import Mask
from .bits import Packer
from .chunked import Part, chunks_for, number, select
from .compat import require_fit
from .deltas import SCALE, checked, deltas, merge_chunks, total_of
from .masks import masked
from .registry import Inputs, Method, anywhere


class EMR(NamedTuple):
    """What EMR merging leaves of N models: base + rescale[i] * unified where masks[i] is model i.

    >>> import torch
    >>> e = emr(None, [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])])
    >>> e.unified.tolist(), [m.bits.tolist() for m in e.masks], e.rescale
    ([3.0, -2.0], [[192], [128]], [0.6, 1.3333333333333333])
    """

    unified: Tensor
    masks: list[Mask]
    rescale: list[float]

    def model(self, base: Tensor, i: int) -> Tensor:
        """The approximation of model i: `masked` of the unified task vector."""
        return masked(base, self.unified, self.masks[i], self.rescale[i])


def _unify(part: Part, n: int, base: bool) -> tuple[Tensor, list[Tensor]]:
    """Of a chunk: the unified task vector, and who agrees with its sign."""
    sign = (total_of(part, n, base) > 0).to(part(0).dtype) * 2 - 1
    unified = torch.zeros_like(sign)
    masks = []
    for d in deltas(part, n, base):
        along = d * sign
        torch.maximum(unified, along, out=unified)  # at least 0; NaN stays
        masks.append(~(along <= 0))
    return unified.add_(0.0) * sign, masks  # maxima of +0 and -0 are either


def _emr(
    op: str, base: Any, xs: Sequence[Any], backend: str
) -> tuple[Tensor, list[Mask], list[float], list[float]]:
    """Unified vector, masks, and per model the means of |tau_i| and of |mask_i * unified|."""
    chunks = chunks_for(op, backend)
    tensors = checked(op, base, xs)
    n, first = len(xs), tensors[0]
    acc = check.accumulator(first.dtype)
    unified = check.output(op, None, first)
    packers = [Packer(first.numel(), first.device) for _ in range(n)]
    before, after = [0.0] * n, [0.0] * n
    out, *flat = chunks.flat([unified, *tensors])
    for begin, end, _ in chunks.rows(flat):

        def part(i: int, begin: int = begin, end: int = end) -> Tensor:
            return chunks.part(flat[i], begin, end, acc)

        values, agreeing = _unify(part, n, base is not None)
        chunks.store(out, begin, end, values)
        size = chunks.part(out, begin, end, acc).abs()  # as it is stored, and will be used
        for i, (d, mask) in enumerate(zip(deltas(part, n, base is not None), agreeing)):
            packers[i].add(mask)
            before[i] += float(d.abs().sum(dtype=torch.float64))
            after[i] += float(select(mask, size, torch.zeros_like(size)).sum(dtype=torch.float64))
    numel = max(1, first.numel())
    masks = [p.mask() for p in packers]
    return unified, masks, [v / numel for v in before], [v / numel for v in after]


def _rescale(before: list[float], after: list[float]) -> list[float]:
    return [1.0 if a == 0 else b / a for b, a in zip(before, after, strict=True)]


def emr(base: Tensor | None, xs: Sequence[Tensor], *, backend: str = "auto") -> EMR:
    """unified = gamma max_i |tau_i| over the tau_i of sign gamma, the sign of sum_i tau_i.

    masks[i] = tau_i has the sign gamma; rescale[i] = mean |tau_i| / mean |masks[i] * unified|, of
    this one tensor (`emr_state_dicts`: of the model).
    A sum of 0 elects -, as in EMR's own code. unified is -0 where no model agrees.

    Shapes: all of one shape, any strides. Dtypes: floating, one for all.
    Result: unified and masks the same bits on every device and split; unified rounded once to the
    dtype of the xs. rescale from float64 sums; 1 where nothing of a model is left.
    NaN: unified is NaN where a tau_i is, and that model's mask is set and its rescale NaN: such a
    model is lost, visibly. Infinities of both signs elect -.
    Cost: one read of base and xs from memory, one write, and a bit per element and model.
    Raises: ArgumentError for unequal inputs.
    Source: EMR-Merging (Huang et al., 2405.17461); FusionBench `emr_merge`.

    >>> import torch
    >>> base, a, b = torch.zeros(2), torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])
    >>> emr(base, [a, b]).model(base, 1)
    tensor([4., 0.])
    """
    unified, masks, before, after = _emr("emr", base, xs, backend)
    return EMR(unified, masks, _rescale(before, after))


def emr_state_dicts(
    base: Mapping[str, Tensor] | None,
    state_dicts: Sequence[Mapping[str, Tensor]],
    *,
    backend: str = "auto",
) -> dict[str, EMR]:
    """`emr` of every floating tensor, with one rescale per model for all of them.

    rescale[i] = sum over tensors of mean |tau_i| / sum over tensors of mean |masks[i] * unified|.
    Integer and boolean buffers must be equal in all models; they have no entry.
    Raises: ArgumentError as `merge_state_dicts`.
    Source: FusionBench `emr_merge`.

    >>> import torch
    >>> a, b = {"w": torch.ones(1), "v": torch.ones(2)}, {"w": torch.ones(1), "v": -torch.ones(2)}
    >>> merged = emr_state_dicts(None, [a, b])
    >>> merged["w"].rescale, merged["v"].rescale
    ([2.0, 1.0], [2.0, 1.0])
    """
    models: dict[str, Mapping[str, Tensor]] = {} if base is None else {"base": base}
    models.update({f"state_dicts[{i}]": d for i, d in enumerate(state_dicts)})
    if not state_dicts:
        raise ArgumentError.of("emr_state_dicts", "no models", 0, "at least one state dict")
    require_fit("emr_state_dicts", models)
    parts = {}
    before, after = [0.0] * len(state_dicts), [0.0] * len(state_dicts)
    for key, x in state_dicts[0].items():
        if x.dtype in check.FLOATS:
            origin = None if base is None else base[key]
            xs = [d[key] for d in state_dicts]
            unified, masks, b, a = _emr(f"emr_state_dicts: {key}", origin, xs, backend)
            parts[key] = (unified, masks)
            before = [p + q for p, q in zip(before, b, strict=True)]
            after = [p + q for p, q in zip(after, a, strict=True)]
    rescale = _rescale(before, after)
    return {key: EMR(unified, masks, rescale) for key, (unified, masks) in parts.items()}


def _merge_emr(inputs: Inputs, *, scale: float) -> Tensor:
    n = len(inputs.xs)

    def step(part: Part) -> Tensor:
        unified, _ = _unify(part, n, True)
        return part(n) + unified * number(scale, unified)

    return merge_chunks("emr", inputs, step)


EMR_MERGING = Method(
    "emr",
    "base + scale * gamma max_i |tau_i| over the task vectors of the elected sign gamma (that of "
    "their sum, - for 0): the unified model of EMR-Merging (Huang et al., 2405.17461). Its masks "
    "and rescalers: mergekern.emr_state_dicts. NaN where a task vector is.",
    base="required",
    models=(1, None),
    parameters=(SCALE,),
    merge=_merge_emr,
    cut=anywhere,
)
