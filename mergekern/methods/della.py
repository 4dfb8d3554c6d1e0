"""DELLA: masks whose chances follow the rank of each magnitude in its row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..keep import NOTHING, Keep, MagPrune
from ..ops.merge_deltas import l1_factor, merge_deltas
from ..ops.rank_mask import rank_mask
from . import host_masks, slices
from .passes import Gather, Passes, Study
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

        how = cut({"density": density}, base.shape, None)
        parts = list(slices.parts(inputs, how))
        held = max(1, _MASKS // max(1, len(inputs.xs) * parts[0].xs[0].numel() // 8))
        drawn = [_masks(one, chances) for one in parts[:held]]
        factors: list[float] | None = inputs.survey
        if rescale and factors is None:
            rest = (_masks(one, chances)[1] for one in parts[held:])
            norms = functools.reduce(_added, [*(of_part for _, of_part in drawn), *rest])
            factors = [l1_factor(everything, kept) for everything, kept in norms]
        out = torch.empty(base.shape, dtype=inputs.out_dtype, device=base.device)
        for i, one in enumerate(parts):
            merge_deltas(
                one.base,
                one.xs,
                weight,
                keep=(drawn[i] if i < held else _masks(one, chances))[0],
                rescale=factors if rescale else None,
                elect=elect,
                normalize=normalize,
                scale=lambda_,
                out=out if len(parts) == 1 else slices.of(out, one, how),
                backend=inputs.backend,
            )
        return out

    return merge


def _certain(density: float) -> Keep:
    return None if density >= 1 else NOTHING


Norms = list[tuple[float, float]]


def _masks(inputs: Inputs, chances: list[tuple[float, float]]) -> tuple[list[Keep], Norms]:
    """What is kept of each model in a slice, and the L1 norms before and after."""
    keep: list[Keep] = []
    norms = []
    for i, (x, (d, e)) in enumerate(zip(inputs.xs, chances, strict=True)):
        if not 0 < d < 1:
            keep.append(_certain(d))
            norms.append((0.0, 0.0))  # nothing to restore
            continue
        rule = MagPrune(d, e, inputs.seed, inputs.name, i)
        mask, everything, kept = rank_mask(
            x, rule, base=inputs.base, first=inputs.offset, backend=inputs.backend
        )
        keep.append(mask)
        norms.append((everything, kept))
    return keep, norms


def _kept(
    inputs: Inputs, *, density: list[float], epsilon: list[float], **_: Any
) -> list[Keep] | None:
    if inputs.host is not None:  # drawn from torch's generator, once
        return None
    return _masks(inputs, list(zip(density, epsilon, strict=True)))[0]


def _added(a: Norms, b: Norms) -> Norms:
    return [(p + r, q + s) for (p, q), (r, s) in zip(a, b, strict=True)]


def cut(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> str | None:
    """Ranks are those of a row, along the second axis: slices are made of whole rows of the first.

    A tensor without a second axis is one row; masks from torch's generator are of whole tensors.
    """
    if all(not 0 < d < 1 for d in arguments["density"]):
        return "elements"
    return None if host is not None or len(shape) < 2 else "rows"


def needs(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> bool:
    return arguments["rescale"] and any(0 < d < 1 for d in arguments["density"])


def _measure(gather: Gather) -> Passes:
    norms: Norms = []

    def add(inputs: Inputs, *, density: list[float], epsilon: list[float], **_: Any) -> None:
        more = _masks(inputs, list(zip(density, epsilon, strict=True)))[1]
        norms[:] = _added(norms, more) if norms else more

    yield add
    return [l1_factor(everything, kept) for everything, kept in norms]


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
    kept=_kept,
    parity=_PARITY,
    cut=cut,
    measure=Study(_measure),
    needs=needs,
    draws=frozenset({"mergekit"}),
)
DELLA_LINEAR = Method(
    "della_linear",
    "DELLA's random drop, then the weighted sum.",
    base="required",
    models=(1, None),
    parameters=parameters("by rank and chance", False, True, _EPSILON),
    merge=_recipe(None),
    kept=_kept,
    parity=_PARITY,
    cut=cut,
    measure=Study(_measure),
    needs=needs,
    draws=frozenset({"mergekit"}),
)
