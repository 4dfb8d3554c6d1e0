"""DELLA: masks whose chances follow the rank of each magnitude in its row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..keep import NOTHING, Keep, MagPrune
from ..ops.merge_deltas import l1_factor, merge_deltas
from ..ops.rank_mask import rank_mask
from . import host_masks
from .registry import Inputs, Method, Parameter
from .task_vectors import combine, host_factors, parameters

_MASKS = 48 << 20  # bytes of masks held at a time


def _recipe(elect: str | None) -> Callable[..., Tensor]:
    def merge(
        inputs: Inputs,
        *,
        weight: list[float],
        density: list[float],
        epsilon: list[float],
        normalize: bool,
        rescale: bool,
        lambda_: float,
        int8_mask: bool,
    ) -> Tensor:
        for d, e in zip(density, epsilon, strict=True):
            if 0 < d < 1 and not (d - e >= 0 and d + e <= 1):
                got = f"{d:g} -+ {e:g}"
                raise ArgumentError.of("della", "density -+ epsilon is out of range", got, "0 to 1")
        chances = list(zip(density, epsilon, strict=True))
        base = inputs.base
        assert base is not None  # base="required"
        if inputs.host == "mergekit":
            keep = [
                host_masks.magprune(x, base, d, e) if 0 < d < 1 else _certain(d)
                for x, (d, e) in zip(inputs.xs, chances, strict=True)
            ]
            restored = host_factors(inputs, keep) if rescale else None
            return combine(inputs, weight, keep, restored, elect, normalize, lambda_)

        slabs = _slabs(base, len(inputs.xs))
        drawn = [_masks(inputs, chances, slab) for slab in slabs[:1]]
        factors = [1.0] * len(inputs.xs)
        if rescale:
            norms = torch.zeros(len(inputs.xs), 2, dtype=torch.float64)
            for i, slab in enumerate(slabs):  # only the first is held: one is enough as a rule
                of_slab = (drawn[0] if i == 0 else _masks(inputs, chances, slab))[1]
                norms += torch.tensor(of_slab, dtype=torch.float64)
            factors = [l1_factor(everything, kept) for everything, kept in norms.tolist()]
        out = torch.empty(base.shape, dtype=inputs.out_dtype, device=base.device)
        for i, slab in enumerate(slabs):
            merge_deltas(
                base[slab],
                [x[slab] for x in inputs.xs],
                weight,
                keep=(drawn[0] if i == 0 else _masks(inputs, chances, slab))[0],
                rescale=factors,
                elect=elect,
                normalize=normalize,
                scale=lambda_,
                out=out[slab],
                backend=inputs.backend,
            )
        return out

    return merge


def _certain(density: float) -> Keep:
    return None if density >= 1 else NOTHING


def _slabs(x: Tensor, models: int) -> list[tuple[slice, ...]]:
    """Parts of x along its first axis whose masks fit the memory; rows lie along the second."""
    if x.ndim < 2:
        return [()]
    needed = models * x.numel() // 8
    step = max(1, x.shape[0] // -(-needed // _MASKS)) if needed else max(1, x.shape[0])
    return [(slice(at, at + step),) for at in range(0, x.shape[0], step)] or [()]


def _masks(
    inputs: Inputs, chances: list[tuple[float, float]], slab: tuple[slice, ...]
) -> tuple[list[Keep], list[tuple[float, float]]]:
    """What is kept of each model in a slab, and the L1 norms before and after."""
    base = inputs.base
    assert base is not None
    first = slab[0].start * base[:1].numel() if slab else 0
    keep: list[Keep] = []
    norms = []
    for i, (x, (d, e)) in enumerate(zip(inputs.xs, chances, strict=True)):
        if not 0 < d < 1:
            keep.append(_certain(d))
            norms.append((0.0, 0.0))  # nothing to restore
            continue
        rule = MagPrune(d, e, inputs.seed, inputs.name, i)
        mask, everything, kept = rank_mask(
            x[slab], rule, base=base[slab], first=first, backend=inputs.backend
        )
        keep.append(mask)
        norms.append((everything, kept))
    return keep, norms


_EPSILON = Parameter(
    "epsilon", float, "model", 0.15, "half the span of the chances to stay", bounds=(0, 1)
)
_PARITY = {
    "mergekit": "bits on a CPU for float32, bfloat16 and float16, with NaN, infinities and both "
    "zeros: masks are drawn from torch's generator in its order. Exceptions: with 5 or more "
    "float32 models torch sums in another order; rows of one element and scalars, which fail "
    "there, are kept with probability density; a density of 0 drops a NaN there and keeps it here"
}

DELLA = Method(
    "della",
    "Drop elements at random, large ones of a row less often, then elect and average as TIES (Deep "
    "et al., 2406.11617).",
    base="required",
    models=(1, None),
    parameters=parameters("by rank and chance", True, True, _EPSILON),
    merge=_recipe("sum"),
    parity=_PARITY,
)
DELLA_LINEAR = Method(
    "della_linear",
    "DELLA's random drop, then the weighted sum.",
    base="required",
    models=(1, None),
    parameters=parameters("by rank and chance", False, True, _EPSILON),
    merge=_recipe(None),
    parity=_PARITY,
)
