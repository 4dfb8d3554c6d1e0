"""Against mergekit: never less accurate, the same result where no choice is open, the same names.

mergekit computes task vectors in the tensors' dtype and rounds after each step; here arithmetic is
float32 with one rounding. So bits are not compared, but both with float64, and with each other
within the sum of both error bounds. Elements where rounding decides a discrete choice (what to
trim, which sign wins) are found in float64, left out, and counted.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergekern as mk
from mergekern.check import name_of

from accuracy import assert_bytes_equal, assert_within, half_ulp
from required import peer

api = peer("mergekit.merge_methods.api", "mergekit")
registry = peer("mergekit.merge_methods.registry", "mergekit")
specs = peer("mergekit.merge_methods.base", "mergekit")

SHAPE = (64, 193)
NUMEL = math.prod(SHAPE)
DTYPES = (torch.float32, torch.bfloat16)
# No two of them cancel, so no divisor is near 0.
WEIGHTS = ((1.0, 1.0, 1.0), (0.3, 0.5, 0.9), (0.7, -0.4, 0.55))
DENSITIES = (0.2, 0.5, 1.0)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # of one rounding, relative


# ---- data and the two sides ------------------------------------------------------------------


def models(dtype: torch.dtype, n: int = 3, seed: int = 0) -> list[Tensor]:
    """A base as weights are, and n models whose task vectors are of its size."""
    g = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(SHAPE, generator=g)
    deltas = [0.01 * torch.randn(SHAPE, generator=g) for _ in range(n)]
    return [x.to(dtype) for x in (base, *(base + d for d in deltas))]


def theirs(base: Tensor | None, xs: Sequence[Tensor], method: str, **parameters: Any) -> Tensor:
    return api.merge_tensors(
        [*([] if base is None else [base]), *xs],
        method,
        parameters=parameters,
        base_index=None if base is None else 0,
    )


def ours(base: Tensor | None, xs: Sequence[Tensor], method: str, **parameters: Any) -> Tensor:
    return mk.merge_tensors(xs, method, base=base, **parameters)


# ---- float64, from the formulas --------------------------------------------------------------


def gamma(n: int, u: float) -> float:
    """Relative error of n roundings in a row."""
    return n * u / (1 - n * u)


class Exact(NamedTuple):
    """base + sum of terms / divisor in float64, term by term, for values and for bounds."""

    base: Tensor
    terms: Tensor  # [N, ...], of the agreeing models
    divisor: Tensor
    divisor_size: Tensor  # sum |weight| of what the divisor adds up
    clear: Tensor  # elements where no discrete choice depends on rounding

    def value(self) -> Tensor:
        return self.base + self.terms.sum(0) / self.divisor

    def bound(self, u: float) -> Tensor:
        """|error| if every step rounds with unit u: delta, weight, product, sums, /, +."""
        n = len(self.terms)
        total = self.terms.sum(0).abs()
        off_sum = gamma(n + 3, u) * self.terms.abs().sum(0)
        off_divisor = gamma(n + 1, u) * self.divisor_size
        least = self.divisor.abs() - off_divisor
        assert (least > 0).all(), "weights of the test cancel"
        share = total / self.divisor.abs()
        off = (off_sum + share * off_divisor) / least
        off = off + u * (share + off)
        return off + u * (self.base.abs() + share + off)


def exact_linear(xs: Sequence[Tensor], weights: Sequence[float]) -> Exact:
    x = torch.stack([x.double() for x in xs])
    terms = x * torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    ones = torch.ones(SHAPE, dtype=torch.float64)
    zero = torch.zeros(SHAPE, dtype=torch.float64)
    size = sum(abs(w) for w in weights)
    return Exact(zero, terms, sum(weights) * ones, size * ones, ones.bool())


def exact_task_arithmetic(base: Tensor, xs: Sequence[Tensor], weights: Sequence[float]) -> Exact:
    linear = exact_linear([x.double() - base.double() for x in xs], weights)
    one, nothing = torch.ones_like(linear.divisor), torch.zeros_like(linear.divisor)
    return linear._replace(base=base.double(), divisor=one, divisor_size=nothing)


def exact_ties(
    base: Tensor, xs: Sequence[Tensor], weights: Sequence[float], density: float
) -> Exact:
    """Trim, elect, average. In doubt: a magnitude that rounds to what the threshold rounds to
    (rounding is monotone, so all others are kept or dropped whatever the order of ties), and a
    vote whose sum is within its rounding of 0."""
    u = UNIT[base.dtype]
    w = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    clear = torch.ones(SHAPE, dtype=torch.bool)
    kept = []
    for x in xs:
        delta = x.double() - base.double()
        if density < 1:
            size = delta.abs()
            threshold = size.flatten().sort(descending=True).values[int(density * NUMEL) - 1]
            clear &= size.to(base.dtype) != threshold.to(base.dtype)
            delta = torch.where(size >= threshold, delta, 0)
        kept.append(delta)
    weighted = torch.stack(kept) * w
    vote = weighted.sum(0)
    certain = vote.abs() > gamma(len(xs) + 3, u) * weighted.abs().sum(0)
    clear &= certain | (weighted == 0).all(0)
    agree = weighted.sign() == torch.where(vote >= 0, 1.0, -1.0)
    divisor = (w * agree).sum(0)
    nobody = ~agree.any(0)
    return Exact(
        base=base.double(),
        terms=weighted * agree,
        divisor=torch.where(nobody, 1.0, divisor),
        divisor_size=(w.abs() * agree).sum(0),
        clear=clear,
    )


def exact_slerp(base: Tensor, x: Tensor, t: float) -> tuple[Tensor, float]:
    """The value, and the largest error of a coefficient if norms and dot are float32 sums."""
    a, b = base.double(), x.double()
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    assert 0 < cosine < 0.99, "far from the switch to straight lines"

    def coefficients(angle: float) -> tuple[float, float]:
        return (
            math.sin((1 - t) * angle) / math.sin(angle),
            math.sin(t * angle) / math.sin(angle),
        )

    # |cosine error| <= gamma(NUMEL + 4) * (sum |a b| / (|a| |b|) <= 1), in any order of summation.
    angle = math.acos(cosine)
    off = gamma(NUMEL + 4, UNIT[torch.float32])
    best = coefficients(angle)
    worst = max(
        abs(c - d)
        for nudged in (cosine - off, cosine + off)
        for c, d in zip(coefficients(math.acos(nudged)), best, strict=True)
    )
    c, d = best
    # Sines and their quotient: 4 units each of at most 4 roundings.
    return c * a + d * b, worst + gamma(16, UNIT[torch.float32]) * max(abs(c), abs(d))


# ---- accuracy and agreement ------------------------------------------------------------------


def assert_no_worse(mine: Tensor, other: Tensor, exact: Tensor, clear: Tensor) -> None:
    """(a) Our largest error is at most theirs, over the elements where nothing is in doubt."""
    errors = [float((x.double() - exact)[clear].abs().max()) for x in (mine, other)]
    mean = [float((x.double() - exact)[clear].abs().mean()) for x in (mine, other)]
    equal = float((mine == other)[clear].double().mean())
    print(
        f"{name_of(mine.dtype)}: max error {errors[0]:.3e} (theirs {errors[1]:.3e}), mean "
        f"{mean[0]:.3e} ({mean[1]:.3e}), {100 * equal:.2f} % equal, "
        f"{int((~clear).sum())} of {clear.numel()} in doubt"
    )
    assert math.isfinite(errors[0])
    assert errors[0] <= errors[1]


def assert_close(mine: Tensor, other: Tensor, exact: Exact) -> None:
    """(b) Each side within its own bound of float64, and so within the sum of each other."""
    clear, value, dtype = exact.clear, exact.value(), mine.dtype
    once = exact.bound(UNIT[torch.float32])
    own = once + (half_ulp(value, dtype) * (1 + 2.0**-7) if dtype != torch.float32 else 0)
    host = exact.bound(UNIT[dtype])
    assert other.dtype == dtype
    assert_within(mine[clear], value[clear], own[clear])
    assert_within(other[clear], value[clear], host[clear])
    assert_within(mine[clear], other[clear].double(), (own + host)[clear])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(dtype: torch.dtype, weights: tuple[float, ...], normalize: bool) -> None:
    _, *xs = models(dtype)
    exact = exact_linear(xs, weights)
    if not normalize:
        one = torch.ones_like(exact.divisor)
        exact = exact._replace(divisor=one, divisor_size=0 * one)
    mine, other = (
        side(None, xs, "linear", weight=list(weights), normalize=normalize)
        for side in (ours, theirs)
    )
    assert_close(mine, other, exact)
    assert_no_worse(mine, other, exact.value(), exact.clear)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_task_arithmetic(dtype: torch.dtype, weights: tuple[float, ...]) -> None:
    base, *xs = models(dtype)
    exact = exact_task_arithmetic(base, xs, weights)
    mine, other = (
        side(base, xs, "task_arithmetic", weight=list(weights)) for side in (ours, theirs)
    )
    assert_close(mine, other, exact)
    assert_no_worse(mine, other, exact.value(), exact.clear)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_ties(dtype: torch.dtype, weights: tuple[float, ...], density: float) -> None:
    base, *xs = models(dtype)
    exact = exact_ties(base, xs, weights, density)
    doubtful = float((~exact.clear).double().mean())
    assert doubtful < (0.001 if dtype == torch.float32 else 0.06)
    mine, other = (
        side(base, xs, "ties", weight=list(weights), density=density) for side in (ours, theirs)
    )
    assert_close(mine, other, exact)
    assert_no_worse(mine, other, exact.value(), exact.clear)


@pytest.mark.parametrize("density", DENSITIES)
def test_ties_keeps_the_same_elements(density: float) -> None:
    """float32 without ties: the same set, and as many as asked for."""
    base, x = models(torch.float32, n=1)
    sizes = (x - base).abs().flatten()
    assert len(sizes.unique()) > 0.97 * NUMEL  # float32 differences still collide, off the cut
    k = int(density * NUMEL)
    cut = sizes.sort(descending=True).values
    assert k == NUMEL or cut[k - 1] > cut[k]
    mine, other = (
        side(base, [x], "ties", weight=[1.0], density=density) != base for side in (ours, theirs)
    )
    assert torch.equal(mine, other)
    assert int(mine.sum()) == k


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp(dtype: torch.dtype, t: float) -> None:
    base, x = models(dtype, n=1)
    exact, off = exact_slerp(base, x, t)
    mine, other = (side(base, [x], "slerp", t=t) for side in (ours, theirs))
    u = UNIT[torch.float32]
    size = base.double().abs() + x.double().abs()
    # Two products and a sum, then the store; the coefficients are ours in float64, theirs not.
    own = gamma(3, u) * size + half_ulp(exact, dtype) * (1 + 2.0**-7)
    assert_within(mine, exact, own)
    assert_within(other, exact, own + off * size)
    assert_no_worse(mine, other, exact, torch.ones(SHAPE, dtype=torch.bool))


# ---- dare: the same distribution -------------------------------------------------------------


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize("side", [ours, theirs])
def test_dare_keeps_its_density_and_its_norm(method: str, density: float, side: Any) -> None:
    base, x = models(torch.float32, n=1)
    base = torch.zeros_like(base)
    torch.manual_seed(0)  # mergekit draws from the global generator
    kept = side(base, [x], method, weight=[1.0], density=density, rescale=False)
    assert torch.equal(kept, torch.where(kept != 0, x, 0))
    # Five standard deviations of a binomial count, and the 2**-17 to which a density is rounded.
    off = 5 * math.sqrt(NUMEL * density * (1 - density)) + NUMEL * 2.0**-17
    assert abs(int((kept != 0).sum()) - NUMEL * density) <= off
    # No pattern along rows or columns.
    for dim in (0, 1):
        share = (kept != 0).double().mean(dim)
        limit = 5 * math.sqrt(density * (1 - density) / SHAPE[dim]) + 2.0**-17
        assert ((share - density).abs() <= limit).all()

    torch.manual_seed(0)
    rescaled = side(base, [x], method, weight=[1.0], density=density)
    assert torch.equal(rescaled != 0, kept != 0)
    # One factor for all, which restores the sum of magnitudes: float32 sums of NUMEL terms.
    norm = [float(y.double().abs().sum()) for y in (rescaled, x)]
    assert abs(norm[0] / norm[1] - 1) <= gamma(2 * NUMEL, UNIT[torch.float32])
    factor = (rescaled.double() / x.double())[kept != 0]
    assert float(factor.max() / factor.min() - 1) <= gamma(3, UNIT[torch.float32])


def test_dare_of_two_models_draws_two_masks() -> None:
    base, x = models(torch.float32, n=1)
    base = torch.zeros_like(base)
    for side in (ours, theirs):
        torch.manual_seed(0)
        both = side(base, [x, x], "dare_linear", weight=[1.0, 1.0], density=0.5, rescale=False)
        times = torch.round(both / x)
        shares = torch.stack([(times == n).double().mean() for n in range(3)])
        expected = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
        assert ((shares - expected).abs() <= 5 * math.sqrt(0.25 / NUMEL)).all()


# ---- names, defaults, contracts --------------------------------------------------------------


SHARED = [name for name in mk.methods() if name in registry._METHODS]


def test_all_of_mergekit_is_here() -> None:
    assert set(registry._METHODS) == set(SHARED)
    assert len(SHARED) == 20


@pytest.mark.parametrize("name", SHARED)
def test_parameters_are_those_of_mergekit(name: str) -> None:
    mine, spec = mk.methods()[name], registry.get(name).spec
    assert {p.name for p in mine.parameters} == {p.name for p in spec.parameters}
    for theirs_ in spec.parameters:
        p = mine.parameter(theirs_.name)
        assert p.required == theirs_.required, p.name
        assert (p.scope == "tensor") == (theirs_.scope is specs.ParameterScope.SHARED), p.name
        if (name, p.name) == ("passthrough", "scale"):
            # None stands for no multiplication; test_passthrough shows that 1 is the same.
            assert (theirs_.default, p.default) == (None, 1.0)
            continue
        assert p.kind is theirs_.value_type, p.name
        if not p.required:
            assert p.default == theirs_.default, p.name
            assert type(p.default) is type(theirs_.default), p.name


@pytest.mark.parametrize("name", SHARED)
def test_what_mergekit_takes_we_take(name: str) -> None:
    """Numbers of models, with and without a base."""
    mine, contract = mk.methods()[name], registry.get(name).spec.contract
    for n, has_base in itertools.product(range(1, 6), (False, True)):
        try:
            contract.validate_ids(list(range(n)), 0 if has_base else None)
        except ValueError:
            continue
        if mine.base == "required" and n == 1:
            continue  # a base alone: mergekit returns it, here a model is asked for
        mine.check_count(n - has_base, has_base)


# ---- whole state dicts and files -------------------------------------------------------------


def state_dicts() -> list[dict[str, Tensor]]:
    """Tiny checkpoints: a matrix, a vector, a scalar, an integer buffer."""
    made = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        made.append(
            {
                "encoder.layer.0.weight": torch.randn(24, 32, generator=g),
                "encoder.layer.0.bias": torch.randn(32, generator=g),
                "logit_scale": torch.randn((), generator=g),
                "embeddings.position_ids": torch.arange(16).view(1, -1),
            }
        )
    return made


def test_state_dicts_have_the_same_names_and_buffers() -> None:
    states = state_dicts()
    mine = mk.merge_state_dicts(states, "linear", weight=[1, 2, 3])
    other = api.merge_state_dicts(states, "linear", parameters={"weight": [1, 2, 3]})
    assert list(mine) == list(other)
    for key, x in mine.items():
        assert (x.dtype, x.shape) == (other[key].dtype, other[key].shape)
    assert_bytes_equal(mine["embeddings.position_ids"], states[0]["embeddings.position_ids"])
    assert_bytes_equal(mine["embeddings.position_ids"], other["embeddings.position_ids"])


def test_buffers_that_differ_are_refused_by_both() -> None:
    states = state_dicts()
    states[1]["embeddings.position_ids"] = states[1]["embeddings.position_ids"] + 1
    with pytest.raises(ValueError, match="position_ids"):
        api.merge_state_dicts(states, "linear", parameters={"weight": 1})
    with pytest.raises(mk.ArgumentError, match="position_ids"):
        mk.merge_state_dicts(states, "linear", weight=1)


LINEAR_YAML = """
merge_method: linear
models:
  - model: {0}
    parameters: {{weight: 0.3}}
  - model: {1}
    parameters:
      weight:
        - filter: bias
          value: 1.5
        - value: 0.5
  - model: {2}
    parameters: {{weight: -0.25}}
dtype: float32
"""
TIES_YAML = """
merge_method: ties
base_model: {0}
models:
  - model: {0}
  - model: {1}
    parameters: {{weight: 0.7, density: 0.5}}
  - model: {2}
    parameters: {{weight: 0.4, density: 0.3}}
parameters: {{normalize: true, int8_mask: true, lambda: 0.8}}
dtype: float32
"""


@pytest.mark.parametrize("text", [LINEAR_YAML, TIES_YAML], ids=["linear", "ties"])
def test_the_same_yaml_on_the_same_files(text: str, tmp_path: Path) -> None:
    """mergekit-pytorch and merge_checkpoints: same names, dtypes and buffers, and the same values.

    float32 on both sides: at most eight roundings of terms that sum to at most six |x|.
    """
    paths = []
    for i, state in enumerate(state_dicts()):
        paths.append(tmp_path / f"model{i}.safetensors")
        save_file(state, paths[-1])
    config = tmp_path / "config.yml"
    config.write_text(text.format(*paths))
    code = "from mergekit.scripts.merge_raw_pytorch import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(config), str(tmp_path / "theirs")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    mk.merge_checkpoints(config, tmp_path / "ours", progress=False)
    mine = load_file(tmp_path / "ours" / "model.safetensors")
    files = sorted((tmp_path / "theirs").glob("*.safetensors"))
    other = {k: x for file in files for k, x in load_file(file).items()}

    assert mine.keys() == other.keys() == state_dicts()[0].keys()
    inputs = [load_file(path) for path in paths]
    differing = 0
    for key, x in mine.items():
        if not x.is_floating_point():
            assert_bytes_equal(x, other[key])
            continue
        size = torch.stack([state[key].double().abs() for state in inputs]).sum(0)
        # Roundings: delta, weight, product, two sums, division, lambda, base. Terms: linear has
        # sum |w| / sum w <= 1.05 / 0.55; ties adds a mean of differences to the base.
        bound = 2 * gamma(8, UNIT[torch.float32]) * 6 * size
        assert_within(x, other[key].double(), bound)
        assert not torch.equal(x, inputs[0][key])
        differing += int((x != other[key]).sum())
    print(f"{differing} elements differ in bits")
