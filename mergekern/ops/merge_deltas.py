"""merge_deltas: task vectors trimmed, elected, weighed and added to their base in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ..keep import Band, Bernoulli, Keep, Mask, Recipe, Threshold
from ._cost import Cost

ELECTIONS = (None, "present", "sum", "count")
ZEROS = ("positive", "negative", "none")
RESCALES = (None, "l1", "density")


def merge_deltas(
    base: Tensor | None,
    xs: Sequence[Tensor],
    weights: Sequence[float],
    *,
    keep: Sequence[Keep] | None = None,
    rescale: str | Sequence[float] | None = None,
    divide: bool = False,
    elect: str | None = None,
    zero: str = "positive",
    weigh: str = "before",
    combine: str = "sum",
    alone: Sequence[float] | None = None,
    normalize: bool | str = False,
    floor: float = 0.0,
    scale: float = 1.0,
    rounding: str = "once",
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out = base + scale * combine_i(w_i r_i keep_i(x_i - base)).

    keep: None, or per model None, a `Threshold` (of `kth_magnitude`), a `Band`, a `Bernoulli` or
    a `Mask`.
    rescale: r_i = 1 (None); "l1": sum |delta_i| / sum |kept delta_i|, as mergekit, 1 where either
    norm is below 1e-7 or not finite, or r_i is not; "density": one over the probability of a
    Bernoulli, as DARE; or one number per model, which `divide` makes a divisor (a step of its own
    where roundings are those of a host).
    elect: who takes part, per element. None: all. "present": the kept deltas that are not 0.
    "sum": those of the sign of sum_i v_i (v_i the weighted deltas), "count": those of the sign
    that more of them have. zero: the sign of a tied vote; with "none" nobody takes part then.
    weigh: w_i goes in "before" the vote (mergekit) or "after" it (PEFT).
    combine: "sum", or "max": the first v_i of the largest magnitude, with its sign.
    normalize: True divides by sum_i w_i, with an election by that of those who take part; "count"
    by their number. A sum within 1e-8 of 0 (with an election: within `floor`) divides by 1 (by
    `floor` if that is not 0).
    alone: with "present" and "count", factors instead of the weights where one model is alone.
    rounding: "once", at the store; "host": after every step, as tools do that compute in the
    dtype of the tensors; what is dropped is then delta * 0 (see csrc/merge_deltas.h: stepwise).
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
    Source: task arithmetic (2212.04089), TIES (2306.01708), DARE (2311.03099), RAM (2601.13572);
    mergekit `generalized_task_arithmetic`, PEFT `merge_utils`.

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
    scale, floor = check.number(op, "scale", scale), check.number(op, "floor", floor)
    check.choice(op, "elect", elect, ELECTIONS)
    check.choice(op, "zero", zero, ZEROS)
    check.choice(op, "weigh", weigh, ("before", "after"))
    check.choice(op, "combine", combine, ("sum", "max"))
    check.choice(op, "normalize", normalize, (False, True, "count"))
    check.choice(op, "rounding", rounding, ("once", "host"))
    if combine == "max" and normalize:
        raise ArgumentError.of(op, "a maximum is not normalized", normalize, "normalize=False")
    if elect is None and (combine == "max" or normalize == "count"):
        elect = "present"
    rules = _rules(op, keep, first, n)
    dtype = check.result_dtype(op, out_dtype, out, first)
    out = check.output(op, out, first, dtype=dtype, inputs=xs if base is None else [base, *xs])
    chosen = dispatch.select(backend, op, first.device, first.dtype)

    stepwise = rounding == "host"
    if stepwise:  # such tools hold their weights in a tensor of that dtype
        weights = torch.tensor(weights, dtype=first.dtype).tolist()
    if isinstance(rescale, str | None):
        check.choice(op, "rescale", rescale, RESCALES)
        factors = _factors(op, chosen, rescale, base, xs, rules, stepwise)
    else:
        factors = check.numbers(op, "rescale", rescale, n, finite=not stepwise)
    first_factors = [1.0] * n if elect and weigh == "after" else weights
    recipe = Recipe(
        keep=rules,
        before=first_factors
        if stepwise
        else [w / r if divide else w * r for w, r in zip(first_factors, factors, strict=True)],
        after=weights if elect and weigh == "after" else [1.0] * n,
        weights=[1.0] * n if normalize == "count" else weights,
        alone=[] if alone is None else _alone(op, alone, elect, normalize, n),
        rescale=factors,
        elect=elect or "everyone",
        zero=zero,
        combine=combine,
        normalize=bool(normalize),
        stepwise=stepwise,
        divide=divide,
        total=_total(weights, first.dtype, stepwise),
        least=floor,
        instead=floor or 1.0,
        scale=scale,
    )
    dispatch.load(chosen, op)(out, base, xs, recipe)
    return out


def _rules(op: str, keep: Sequence[Keep] | None, like: Tensor, n: int) -> list[Keep]:
    rules: list[Keep] = [None] * n if keep is None else list(keep)
    if len(rules) != n:
        raise ArgumentError.of(op, "keep has the wrong length", len(rules), n)
    for rule in rules:
        if isinstance(rule, Bernoulli) and not 0 <= rule.density <= 1:
            raise ArgumentError.of(op, "density is out of range", rule.density, "0 to 1")
        if isinstance(rule, Mask):
            check.mask(op, rule.bits, like.numel(), like.device)
        elif not (rule is None or isinstance(rule, Bernoulli | Threshold | Band)):
            kinds = "None, Threshold, Band, Bernoulli or Mask"
            raise ArgumentError.of(op, "keep holds an unknown rule", type(rule).__name__, kinds)
    return rules


def _alone(
    op: str, alone: Sequence[float], elect: str | None, normalize: bool | str, n: int
) -> list[float]:
    if elect != "present" or normalize != "count":
        needed = "elect='present' and normalize='count'"
        raise ArgumentError.of(op, "alone goes with a mean of those present", elect, needed)
    return check.numbers(op, "alone", alone, n)


def _factors(
    op: str,
    chosen: str,
    rescale: str | None,
    base: Tensor | None,
    xs: list[Tensor],
    rules: list[Keep],
    stepwise: bool,
) -> list[float]:
    if rescale == "l1":
        norms = dispatch.load(chosen, op, "l1_norms")(base, xs, rules, stepwise)
        return [
            l1_factor(everything, kept, xs[0].dtype if stepwise else torch.float64)
            for everything, kept in norms
        ]
    if rescale == "density":
        return [1 / _probability(k) for k in rules]
    return [1.0] * len(xs)


class Counts(NamedTuple):
    """Kept elements of each task vector, and the places where kept ones have both signs."""

    kept: list[int]
    conflicts: int


def count_kept(
    base: Tensor | None,
    xs: Sequence[Tensor],
    keep: Sequence[Keep] | None = None,
    *,
    rounded: bool = False,
    first: int = 0,
    last: int | None = None,
    backend: str = "auto",
) -> Counts:
    """How much of each x - base is kept, and where the kept differ in sign; 0 and NaN have none.

    Shapes: all of one shape, any strides. keep: as in `merge_deltas`. rounded: differences are
    rounded to the dtype of the xs, as with rounding="host". Counted are the elements of flat
    indices `first` to `last`, all by default.
    Result: exact. Cost: one read of every input.
    Raises: ArgumentError for unequal inputs, rules that do not fit and ranges outside.
    Source: the sign conflicts of TIES (Yadav et al., 2306.01708).

    >>> import torch
    >>> count_kept(None, [torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0])])
    Counts(kept=[2, 2], conflicts=1)
    """
    op = "count_kept"
    xs = check.tensors(op, xs)
    if base is not None:
        base = check.tensor(op, base, "base")
        check.same(op, "base", base, "xs[0]", xs[0])
    rules, total = _rules(op, keep, xs[0], len(xs)), xs[0].numel()
    last = total if last is None else last
    if not 0 <= first <= last <= total:
        got = f"{first} to {last}"
        raise ArgumentError.of(op, "range leaves the tensor", got, f"within 0 to {total}")
    chosen = dispatch.select(backend, "merge_deltas", xs[0].device, xs[0].dtype)
    count = dispatch.load(chosen, "merge_deltas", op)
    return Counts(*count(base, xs, rules, rounded, first, last))


def l1_factor(everything: float, kept: float, dtype: torch.dtype = torch.float64) -> float:
    """What restores an L1 norm; `dtype`: that of a tool that holds its norms in it.

    Rounded to float32, so that backends with another order of summation agree on it. 1 where
    either norm is below 1e-7 or not finite, or the factor is not.
    """
    norms = torch.tensor([everything, kept], dtype=torch.float64).to(dtype)
    if not bool((norms >= 1e-7).all()) or not bool(norms.isfinite().all()):
        return 1.0
    factor = float((norms[0] / norms[1]).to(torch.float32))
    return factor if math.isfinite(factor) else 1.0


def l1_norms(
    xs: list[Tensor], keep: Sequence[Keep], *, base: Tensor | None = None, backend: str = "auto"
) -> list[tuple[float, float]]:
    """Per model sum |x - base| and the same over what is kept, in float64; xs have been checked."""
    chosen = dispatch.select(backend, "merge_deltas", xs[0].device, xs[0].dtype)
    norms: list[tuple[float, float]] = dispatch.load(chosen, "merge_deltas", "l1_norms")(
        base, xs, list(keep), False
    )
    return norms


def _probability(keep: Keep) -> float:
    return keep.limit / 65536 if isinstance(keep, Bernoulli) and keep.limit else 1.0


def _total(weights: list[float], dtype: torch.dtype, stepwise: bool) -> float:
    total = sum(weights)
    if stepwise:
        total = float(torch.tensor(weights, dtype=dtype).sum())
    return total if abs(total) >= 1e-8 else 1.0


def cost(n: int, numel: int, itemsize: int, *, base: bool = True) -> Cost:
    """Least traffic of n models: one read of each and of base, one write."""
    return Cost(numel * itemsize * (n + 1 + base), numel * (3 * n + 2))
