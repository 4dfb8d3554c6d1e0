"""The arithmetic of merge_deltas as specified, and the recipes of the methods as its options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekern import Band, Bernoulli, Mask, Threshold, reference
from mergekern.check import accumulator
from mergekern.keep import Keep, Recipe, above

from cases import Case

INF = math.inf


# ---- the specified arithmetic ----------------------------------------------------------------


def factors_of(
    base: Tensor | None,
    xs: list[Tensor],
    keep: list[Keep],
    rescale: Any,
    stepwise: bool = False,
) -> list[float]:
    if rescale == "density":
        limits = [k.limit if isinstance(k, Bernoulli) else 65536 for k in keep]
        return [1 / ((limit or 65536) / 65536) for limit in limits]
    if rescale == "l1":
        norms = reference.l1_norms(base, xs, keep, stepwise)

        def hold(values: Any) -> Any:
            """Tools that compute in the dtype of the tensors hold their norms in it too."""
            return torch.tensor(values, dtype=torch.float64).to(xs[0].dtype).tolist()

        if stepwise:
            norms = [tuple(pair) for pair in hold(norms)]
        ratios = [a / b if 1e-7 <= a < INF and b >= 1e-7 else 1.0 for a, b in norms]
        if stepwise:
            ratios = hold(ratios)
        return [float(np.float32(r)) for r in ratios]
    return [1.0] * len(xs) if rescale is None else list(rescale)


def specified(
    base: Tensor | None,
    xs: Sequence[Tensor],
    weights: Sequence[float],
    *,
    keep: Sequence[Keep] | None = None,
    rescale: Any = None,
    divide: bool = False,
    elect: str | None = None,
    zero: str = "positive",
    weigh: str = "before",
    combine: str = "sum",
    alone: list[float] | None = None,
    normalize: bool | str = False,
    floor: float = 0.0,
    scale: float = 1.0,
    rounding: str = "once",
    dtype: torch.dtype | None = None,
    acc: torch.dtype | None = None,
) -> Tensor:
    """What csrc/merge_deltas.h promises, step by step in `acc` (the accumulator if None)."""
    xs, base = [x.cpu() for x in xs], None if base is None else base.cpu()
    n, stepwise, weights = len(xs), rounding == "host", [float(w) for w in weights]
    if stepwise:
        weights = torch.tensor(weights, dtype=xs[0].dtype).tolist()
    rules: list[Keep] = [None] * n if keep is None else list(keep)
    out = torch.empty(xs[0].shape, dtype=dtype or xs[0].dtype)
    factors = factors_of(base, xs, rules, rescale, stepwise)
    if elect is None and (combine == "max" or normalize == "count"):
        elect = "present"
    ones = [1.0] * n
    before, after = (ones, weights) if elect and weigh == "after" else (weights, ones)
    if not stepwise:
        before = [b / f if divide else b * f for b, f in zip(before, factors, strict=True)]
    total = float(torch.tensor(weights, dtype=xs[0].dtype).sum()) if stepwise else sum(weights)
    recipe = Recipe(
        keep=rules,
        before=before,
        after=after,
        weights=ones if normalize == "count" else weights,
        alone=alone or [],
        rescale=factors,
        elect=elect or "everyone",
        zero=zero,
        combine=combine,
        normalize=bool(normalize),
        stepwise=stepwise,
        divide=divide,
        total=total if abs(total) >= 1e-8 else 1.0,
        least=floor,
        instead=floor or 1.0,
        scale=scale,
    )
    reference.merge_deltas(out, base, xs, recipe, acc=acc or accumulator(xs[0].dtype))
    return out


# ---- the recipes of the methods, as options --------------------------------------------------


def trims(xs: list[Tensor], base: Tensor | None, share: float = 0.2) -> list[Keep]:
    if not xs[0].numel():
        return [None] * len(xs)
    k = max(1, int(share * xs[0].numel()))
    origin = None if base is None else base.cpu()
    found = reference.kth_magnitude([x.cpu() for x in xs], origin, [[k]] * len(xs))
    return [Threshold(*one) for (one,) in found]


def bands(xs: list[Tensor], base: Tensor | None) -> list[Keep]:
    """The largest 70 % without the largest 20 %."""
    pairs = zip(trims(xs, base, 0.7), trims(xs, base, 0.2))
    return [None if most is None else Band(least, most) for least, most in pairs]


def masks(xs: list[Tensor], density: float = 0.4) -> list[Keep]:
    generator = torch.Generator().manual_seed(xs[0].numel())
    drawn = [torch.rand(x.numel(), generator=generator) < density for x in xs]
    packed = [torch.from_numpy(np.packbits(d.numpy())) for d in drawn]
    return [Mask(bits.to(xs[0].device)) for bits in packed]


def draws(xs: list[Tensor], density: float = 0.3) -> list[Keep]:
    return [Bernoulli(density, seed=7, name="layer.weight", model=i) for i in range(len(xs))]


def alternating(xs: list[Tensor], base: Tensor | None) -> list[Keep]:
    """None, a Threshold, a Bernoulli, None, ..."""
    rules = zip([None] * len(xs), trims(xs, base), draws(xs))
    return [rule[i % 3] for i, rule in enumerate(rules)]


RECIPES: dict[str, Callable[[list[Tensor], Tensor | None], dict[str, Any]]] = {
    "arithmetic": lambda xs, base: {"scale": 0.7},
    "normalized": lambda xs, base: {"normalize": True},
    "elect sum": lambda xs, base: {"elect": "sum"},
    "elect count": lambda xs, base: {"elect": "count", "normalize": True},
    "ties": lambda xs, base: {"keep": trims(xs, base), "elect": "sum", "normalize": True},
    "trim l1": lambda xs, base: {"keep": trims(xs, base), "rescale": "l1", "scale": 1.3},
    "dare": lambda xs, base: {"keep": draws(xs), "rescale": "density"},
    "dare ties": lambda xs, base: {
        "keep": draws(xs, 0.6),
        "rescale": "l1",
        "elect": "count",
        "scale": -0.5,
    },
    "alternating": lambda xs, base: {"keep": alternating(xs, base), "elect": "sum"},
    "breadcrumbs": lambda xs, base: {"keep": bands(xs, base), "elect": "sum"},
    "masks": lambda xs, base: {"keep": masks(xs), "rescale": [1.5] * len(xs)},
    "masked ties": lambda xs, base: {"keep": masks(xs), "elect": "sum", "normalize": True},
    "sce": lambda xs, base: {
        "keep": masks(xs),
        "elect": "sum",
        "weigh": "after",
        "normalize": True,
        "floor": 1e-6,
    },
    "peft": lambda xs, base: {
        "keep": trims(xs, base),
        "elect": "sum",
        "weigh": "after",
        "normalize": "count",
    },
    "peft frequency": lambda xs, base: {"elect": "count", "weigh": "after", "normalize": "count"},
    "ram": lambda xs, base: {"keep": [above(0.5)] * len(xs), "normalize": "count"},
    "ram plus": lambda xs, base: {
        "keep": [above(0.5)] * len(xs),
        "normalize": "count",
        "alone": [1.0 + 0.25 * i for i in range(len(xs))],
    },
    "magmax": lambda xs, base: {"combine": "max", "scale": 0.5},
    "elected max": lambda xs, base: {"keep": trims(xs, base), "elect": "sum", "combine": "max"},
    "tie negative": lambda xs, base: {"elect": "count", "zero": "negative"},
    "tie none": lambda xs, base: {"elect": "sum", "zero": "none", "normalize": "count"},
    "tie sum negative": lambda xs, base: {"elect": "sum", "zero": "negative"},
    "host ties": lambda xs, base: {
        "elect": "sum",
        "normalize": True,
        "scale": 0.7,
        "rounding": "host",
    },
    "host dare": lambda xs, base: {"keep": masks(xs), "rescale": "l1", "rounding": "host"},
    "host trim": lambda xs, base: {"keep": trims(xs, base), "elect": "sum", "rounding": "host"},
    "host quotient": lambda xs, base: {
        "keep": masks(xs),
        "rescale": [0.3 + 0.1 * i for i in range(len(xs))],
        "divide": True,
        "rounding": "host",
    },
    "quotient": lambda xs, base: {"rescale": [0.3] * len(xs), "divide": True},
    "host normalized": lambda xs, base: {"normalize": True, "scale": 1.25, "rounding": "host"},
    "host after": lambda xs, base: {
        "elect": "count",
        "weigh": "after",
        "normalize": "count",
        "rounding": "host",
    },
}


def base_of(case: Case, device: str) -> Tensor:
    return dataclasses.replace(case, n=1).tensors(device, seed=9)[0]
