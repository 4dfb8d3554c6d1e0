"""merge_deltas: task vectors trimmed, elected, weighed and added to their base in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ..keep import Bernoulli, Keep, Threshold
from ._cost import Cost

ELECTIONS = (None, "sum", "count")
RESCALES = (None, "l1", "density")


def merge_deltas(
    base: Tensor | None,
    xs: Sequence[Tensor],
    weights: Sequence[float],
    *,
    keep: Sequence[Keep] | None = None,
    rescale: str | None = None,
    elect: str | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out = base + scale * combine_i(w_i r_i keep_i(x_i - base)).

    keep: None, or per model None, a `Threshold` (of `kth_magnitude`) or a `Bernoulli`.
    rescale: r_i = 1 (None); "l1": sum |delta_i| / sum |kept delta_i|, as mergekit, 1 where either
    norm is below 1e-7 or not finite; "density": one over the probability of a Bernoulli, as DARE.
    elect: None sums. "sum": per element the sign of sum_i v_i (v_i the weighted deltas), "count":
    the sign held by more of them; 0 counts as +. Only v_i of that sign are added; zeros are not.
    normalize: divide by sum_i w_i, with an election by that of the agreeing models; a sum within
    1e-8 of 0 (exactly 0 with an election) divides by 1.
    base None: the xs are task vectors already and nothing is added.

    Shapes: all of one shape, any strides. `out` may be one of the inputs.
    Dtypes: as `weighted_sum`.
    Result: the same bits on every backend, thread count and split. Arithmetic in float32 (float64
    for float64), every step rounded, models in input order, one rounding to the result; the exact
    sequence is in csrc/merge_deltas.h: at most n + 7 roundings of the sum of magnitudes. An "l1"
    factor is a float64 reduction rounded to float32.
    NaN in a kept delta gives NaN; infinities of both signs give NaN without election or by sum.

    Cost: one read of base and of every x, one write; "l1" one more read. Nothing of size
    N x numel is allocated.
    Raises: ArgumentError for unequal inputs, non-finite weights, unknown options.
    Source: task arithmetic (2212.04089), TIES (2306.01708), DARE (2311.03099); mergekit
    `generalized_task_arithmetic`.

    >>> import torch
    >>> base, a, b = torch.zeros(3), torch.tensor([1.0, -1.0, 4.0]), torch.tensor([3.0, 2.0, 0.0])
    >>> merge_deltas(base, [a, b], [1, 1], elect="sum", normalize=True)
    tensor([2., 2., 4.])
    """
    op = "merge_deltas"
    xs = check.tensors(op, xs)
    first, n = xs[0], len(xs)
    if base is not None:
        base = check.tensor(op, base, "base")
        check.same(op, "base", base, "xs[0]", first)
    weights = check.numbers(op, "weights", weights, n)
    scale = check.number(op, "scale", scale)
    check.choice(op, "elect", elect, ELECTIONS)
    check.choice(op, "rescale", rescale, RESCALES)
    rules = _rules(op, keep, n)
    dtype = check.result_dtype(op, out_dtype, out, first)
    out = check.output(op, out, first, dtype=dtype, inputs=xs if base is None else [base, *xs])
    chosen = dispatch.select(backend, op, first.device, first.dtype)

    factors = list(weights)
    if rescale == "l1":
        norms = dispatch.load(chosen, op, "l1_norms")(base, xs, rules)
        factors = [w * _l1_factor(*pair) for w, pair in zip(weights, norms, strict=True)]
    elif rescale == "density":
        factors = [w / _probability(k) for w, k in zip(weights, rules, strict=True)]
    total = sum(weights)
    dispatch.load(chosen, op)(
        out,
        base,
        xs,
        weights,
        factors,
        rules,
        elect,
        normalize,
        total if abs(total) >= 1e-8 else 1.0,
        scale,
    )
    return out


def _rules(op: str, keep: Sequence[Keep] | None, n: int) -> list[Keep]:
    rules: list[Keep] = [None] * n if keep is None else list(keep)
    if len(rules) != n:
        raise ArgumentError.of(op, "keep has the wrong length", len(rules), n)
    for rule in rules:
        if isinstance(rule, Bernoulli) and not 0 <= rule.density <= 1:
            raise ArgumentError.of(op, "density is out of range", rule.density, "0 to 1")
        if not (rule is None or isinstance(rule, Bernoulli | Threshold)):
            kinds = "None, Threshold or Bernoulli"
            raise ArgumentError.of(op, "keep holds an unknown rule", type(rule).__name__, kinds)
    return rules


def _l1_factor(everything: float, kept: float) -> float:
    """Rounded to float32, so that backends with another order of summation agree on it."""
    if everything < 1e-7 or kept < 1e-7 or not math.isfinite(everything):
        return 1.0
    return float(torch.tensor(everything / kept, dtype=torch.float32))


def _probability(keep: Keep) -> float:
    return keep.limit / 65536 if isinstance(keep, Bernoulli) and keep.limit else 1.0


def cost(n: int, numel: int, itemsize: int, *, base: bool = True) -> Cost:
    """Least traffic of n models: one read of each and of base, one write."""
    return Cost(numel * itemsize * (n + 1 + base), numel * (3 * n + 2))
