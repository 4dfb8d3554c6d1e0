"""The PEFT drop-in: PEFT's bits from mergekern, and PEFT's own functions afterwards.

Every test of a result asserts that mergekern computed it (`served`) or that PEFT did, and why
(`fallbacks`).
"""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekern import BackendError
from mergekern.integrations import peft as dropin
from mergekern.integrations.peft.adapters import METHOD, svd_weighted_adapter

from accuracy import assert_bits_equal, assert_within, half_ulp
from refusal import refused
from required import peer

pytestmark = pytest.mark.usefixtures("peft_counters")

api = peer("peft", "peft")
utils = peer("peft.utils.merge_utils", "peft")
lora = peer("peft.tuners.lora.model", "peft")

THEIRS: dict[str, Callable[..., Tensor]] = {n: getattr(utils, n) for n in dropin.FUNCTIONS}
BOUND = ("task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties")
CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("task_arithmetic", ()),
    ("magnitude_prune", (0.3,)),
    ("ties", (0.3,)),
    ("ties", (0.7, "frequency")),
    ("dare_linear", (0.3,)),
    ("dare_ties", (0.3,)),
    ("dare_ties", (0.7, "frequency")),
]
WEIGHTS = (0.7, -1.3, 2.2, 0.9)
SHAPES = ((), (1,), (7,), (5, 1, 3, 3), (96, 131))
U = 2.0**-24


def distinct(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values of both signs, around 1, no two of one magnitude: a trim has no choice."""
    g = torch.Generator().manual_seed(seed)
    n = math.prod(shape)
    if torch.finfo(dtype).bits == 16:
        low = 0x3000 if dtype == torch.float16 else 0x3D00
        assert n <= 4096
        size = (low + torch.randperm(4096, generator=g)[:n]).to(torch.int16).view(dtype)
    else:
        size = (1 + torch.randperm(n, generator=g).to(dtype)) / max(n, 1)
    return (size * (1 - 2 * torch.randint(2, (n,), generator=g)).to(dtype)).view(shape)


def both(name: str, *args: Any) -> tuple[Tensor, Tensor]:
    """Ours and PEFT's from one seed; both leave torch's generator in the same state."""
    torch.manual_seed(3)
    expected = THEIRS[name](*args)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    got = dropin.FUNCTIONS[name](*args)
    assert torch.equal(torch.get_rng_state(), state)
    return got, expected


# ---- switching -------------------------------------------------------------------------------


def bound() -> dict[tuple[str, str], Any]:
    return {(m.__name__, n): getattr(m, n) for m in (utils, lora) for n in BOUND} | {
        (utils.__name__, "magnitude_based_pruning"): utils.magnitude_based_pruning,
        (lora.__name__, METHOD): getattr(lora.LoraModel, METHOD),
    }


def test_install_replaces_and_uninstall_restores_the_same_objects() -> None:
    before = bound()
    assert {f.__module__ for f in before.values()} == {utils.__name__, lora.__name__}
    dropin.install()
    dropin.install()
    ours = {**dropin.FUNCTIONS, METHOD: svd_weighted_adapter}
    assert all(f is ours[name] for (_, name), f in bound().items())
    dropin.uninstall()
    dropin.uninstall()
    after = bound()
    assert all(after[key] is f for key, f in before.items())


def test_the_block_restores_after_an_exception_and_may_be_nested() -> None:
    before = bound()

    def fail() -> None:
        with dropin.accelerated():
            with dropin.accelerated():
                assert utils.ties is dropin.ties
            assert utils.ties is dropin.ties
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(bound()[key] is f for key, f in before.items())


@pytest.mark.parametrize("version", ["0.18.1", "0.22.0", "1.0.0"])
def test_a_version_that_was_not_compared_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with refused("peft", "0.19", "0.22", version, error=BackendError, sentence=False):
        dropin.install()
    assert utils.ties is THEIRS["ties"]


def test_the_svd_combinations_of_older_versions_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """They count the scale of every task vector twice."""
    method = getattr(lora.LoraModel, METHOD)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.20.0")
    dropin.install()
    assert getattr(lora.LoraModel, METHOD) is method
    assert utils.ties is dropin.ties


def test_without_peft_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with refused("peft", "pip install", error=BackendError, sentence=False):
        dropin.install()


@pytest.mark.parametrize("name", [*THEIRS, METHOD])
def test_signatures_are_those_of_peft(name: str) -> None:
    def shape(f: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]

    if name == METHOD:
        assert shape(svd_weighted_adapter) == shape(getattr(lora.LoraModel, METHOD))
    else:
        assert shape(dropin.FUNCTIONS[name]) == shape(THEIRS[name])


# ---- the same bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "args"), CALLS)
def test_bits(
    name: str, args: tuple[Any, ...], dtype: torch.dtype, n: int, shape: tuple[int, ...]
) -> None:
    xs = [distinct(shape, dtype, i) for i in range(n)]
    assert_bits_equal(*both(name, xs, torch.tensor(WEIGHTS[:n]), *args))
    assert dropin.served[name] == 1
    assert not dropin.fallbacks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "args"), CALLS)
def test_bits_of_narrow_task_tensors(name: str, args: tuple[Any, ...], dtype: torch.dtype) -> None:
    """With float32 weights, as add_weighted_adapter passes them, PEFT multiplies in float32."""
    xs = [distinct((32, 61), dtype, i) for i in range(3)]
    got, expected = both(name, xs, torch.tensor(WEIGHTS[:3]), *args)
    assert expected.dtype == torch.float32
    assert_bits_equal(got, expected)
    assert dropin.served[name] == 1


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def sliced(x: Tensor) -> Tensor:
    wide = torch.full((x.shape[0], 3 * x.shape[1]), 77.0, dtype=x.dtype)
    wide[:, 1::3] = x
    return wide[:, 1::3]


@pytest.mark.parametrize("layout", [transposed, sliced])
@pytest.mark.parametrize(("name", "args"), CALLS)
def test_bits_of_strided_tensors(
    name: str, args: tuple[Any, ...], layout: Callable[[Tensor], Tensor]
) -> None:
    xs = [layout(distinct((96, 131), torch.float32, i)) for i in range(3)]
    xs[1] = xs[1].contiguous()
    assert_bits_equal(*both(name, xs, torch.tensor(WEIGHTS[:3]), *args))
    assert dropin.served[name] == 1


@pytest.mark.parametrize(("name", "args"), CALLS)
def test_bits_of_several_pieces(name: str, args: tuple[Any, ...]) -> None:
    """More elements than one piece, and a last piece that ends within a byte of the mask."""
    xs = [distinct((3, 100_003), torch.float32, i) for i in range(2)]
    assert_bits_equal(*both(name, xs, torch.tensor(WEIGHTS[:2]), *args))
    assert dropin.served[name] == 1


@pytest.mark.parametrize("kind", ["integer", "float16", "parameters", "tuple"])
@pytest.mark.parametrize(("name", "args"), CALLS)
def test_bits_of_other_arguments(name: str, args: tuple[Any, ...], kind: str) -> None:
    xs: Any = [distinct((17, 5), torch.float32, i) for i in range(3)]
    weights = torch.tensor([2, -1, 3])
    if kind == "float16":
        weights = torch.tensor(WEIGHTS[:3], dtype=torch.float16)
    if kind == "parameters":
        xs = [torch.nn.Parameter(x) for x in xs]
    with torch.no_grad():
        got, expected = both(name, tuple(xs) if kind == "tuple" else xs, weights, *args)
    assert_bits_equal(got, expected)
    assert dropin.served[name] == 1


def test_magnitude_based_pruning_differs_in_the_sign_of_zeros_only() -> None:
    x = distinct((40, 33), torch.float32, 0)
    got, expected = both("magnitude_based_pruning", x, 0.4)
    assert_bits_equal(got, expected + 0.0)  # -0 + 0 is 0
    assert int((got != 0).sum()) == int(0.4 * x.numel())
    assert dropin.served["magnitude_based_pruning"] == 1


@pytest.mark.parametrize("name", ["magnitude_prune", "ties"])
def test_among_equal_magnitudes_the_lowest_indices_are_kept(name: str) -> None:
    x = torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0, 1.0])
    got, expected = both(name, [x], torch.tensor([1.0]), 0.5)
    assert_bits_equal(got, torch.tensor([1.0, -1.0, 2.0, 0.0, 0.0, 0.0]))
    assert_bits_equal(got.abs().sort().values, expected.abs().sort().values)
    assert dropin.served[name] == 1


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_a_tied_vote_elects_the_positive(name: str) -> None:
    x = distinct((64,), torch.float32, 0)
    xs = [x, -x, torch.zeros(64)]
    got, expected = both(name, xs, torch.tensor([1.0, 3.0, 1.0]), 0.9)
    assert_bits_equal(got, expected)
    if name == "ties":  # int(0.9 * 64) are kept of each, the same
        assert_bits_equal(got > 0, x.abs() > 7 / 64)
    assert dropin.served[name] == 1


@pytest.mark.parametrize(("name", "args"), CALLS[1:4])
def test_a_density_of_0_keeps_nothing(name: str, args: tuple[Any, ...]) -> None:
    xs = [distinct((9, 9), torch.float32, i) for i in range(2)]
    got, expected = both(name, xs, torch.tensor([1.0, 2.0]), 0, *args[1:])
    assert_bits_equal(got, expected)
    assert_bits_equal(got, torch.zeros(9, 9))
    assert dropin.served[name] == 1


@pytest.mark.parametrize(("name", "args"), CALLS[1:])
def test_a_density_of_1_prunes_nothing_and_warns_as_peft(name: str, args: tuple[Any, ...]) -> None:
    xs = [distinct((9, 9), torch.float32, i) for i in range(2)]
    with pytest.warns(UserWarning, match="no pruning") as caught:
        got, expected = both(name, xs, torch.tensor([1.0, 2.0]), 1.0, *args[1:])
    assert len(caught) == 4  # two tensors, twice
    assert_bits_equal(got, expected)
    assert dropin.served[name] == 1


@pytest.mark.parametrize("name", ["magnitude_prune", "ties"])
def test_nan_is_where_peft_has_it(name: str) -> None:
    xs = [distinct((9, 9), torch.float32, i) for i in range(3)]
    xs[1][4, 5] = math.nan
    assert_bits_equal(*both(name, xs, torch.tensor(WEIGHTS[:3]), 0.4))
    assert dropin.served[name] == 1


# ---- the same within a bound -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    """PEFT rounds each product to 16 bits; here the sum is rounded, so the error is no larger."""
    xs = [distinct((32, 61), dtype, i) for i in range(4)]
    weights = torch.tensor(WEIGHTS, dtype=dtype)
    got, expected = both("task_arithmetic", xs, weights)
    assert got.dtype == expected.dtype == dtype
    terms = torch.stack([x.double() * w for x, w in zip(xs, weights.double())])
    exact = terms.sum(0)
    bound = half_ulp(exact, dtype) + 2 * 5 * U * terms.abs().sum(0)
    assert_within(got, exact, bound)
    errors = [float((x.double() - exact).abs().sum()) for x in (got, expected)]
    assert errors[0] <= errors[1]
    assert dropin.served["task_arithmetic"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ties_with_weights_of_16_bits(dtype: torch.dtype) -> None:
    """float32 as PEFT returns it, within 6 roundings of the float64 result."""
    xs = [distinct((32, 61), dtype, i) for i in range(4)]
    weights = torch.tensor(WEIGHTS, dtype=dtype)
    got, expected = both("ties", xs, weights, 0.3)
    assert got.dtype == expected.dtype == torch.float32
    kept = []
    for x in xs:
        least = x.abs().flatten().sort(descending=True).values[int(0.3 * x.numel()) - 1]
        kept.append(torch.where(x.abs() >= least, x.double(), 0))
    stack = torch.stack(kept)
    agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    terms = stack * weights.double().view(-1, 1, 1) * agree
    count = agree.sum(0).clamp(min=1)
    exact = terms.sum(0) / count
    assert_within(got, exact, 6 * U / (1 - 6 * U) * terms.abs().sum(0) / count)
    errors = [float((x.double() - exact).abs().sum()) for x in (got, expected)]
    assert errors[0] < errors[1]
    assert dropin.served["ties"] == 1


@pytest.mark.parametrize("name", ["task_arithmetic", "dare_linear"])
@pytest.mark.parametrize("n", [5, 9, 17])
def test_many_task_tensors(name: str, n: int) -> None:
    """From five on torch sums in another order: both within n + 2 roundings of the magnitudes."""
    xs = [distinct((48, 131), torch.float32, i) for i in range(n)]
    weights = torch.linspace(-1, 2, n)
    args = () if name == "task_arithmetic" else (0.25,)  # 1 / 0.25 is exact
    got, expected = both(name, xs, weights, *args)
    torch.manual_seed(3)
    kept = [x.double() * (torch.bernoulli(torch.full_like(x, a)) / a) for x in xs for a in args]
    terms = torch.stack([x * w for x, w in zip(kept or xs, weights.double())]).double()
    bound = (n + 2) * U / (1 - (n + 2) * U) * terms.abs().sum(0)
    assert_within(got, terms.sum(0), bound)
    assert_within(expected, terms.sum(0), bound)
    assert dropin.served[name] == 1


# ---- what goes to PEFT -----------------------------------------------------------------------


def served_by_peft(reason: str, name: str, *args: Any) -> Tensor:
    got, expected = both(name, *args)
    assert dropin.fallbacks[name, reason] == 1
    assert not dropin.served[name]
    if not got.is_meta:
        assert_bits_equal(got, expected)
    return got


def test_a_gradient_is_peft_s() -> None:
    xs = [distinct((5, 7), torch.float32, i).requires_grad_() for i in range(2)]
    reason = "a gradient is wanted: call under torch.no_grad()"
    for name, args in CALLS:
        out = served_by_peft(reason, name, xs, torch.tensor([1.0, 2.0]), *args)
        assert out.requires_grad
        dropin.fallbacks.clear()


class Labelled(Tensor):
    pass


@pytest.mark.parametrize(
    ("reason", "xs", "weights"),
    [
        ("tensors without plain data", [torch.ones(3, device="meta")] * 2, torch.ones(2)),
        ("dtype int64", [torch.arange(3)] * 2, torch.ones(2)),
        ("empty tensors", [torch.ones(0, 3)] * 2, torch.ones(2)),
        ("no plain tensor", [torch.ones(3).as_subclass(Labelled)] * 2, torch.ones(2)),
        (
            "task tensors of unequal shape, dtype or device",
            [torch.ones(3), torch.ones(3, dtype=torch.float64)],
            torch.ones(2),
        ),
        ("weights of another shape, device or kind", [torch.ones(3)] * 2, torch.ones(1)),
        ("weights wider than the task tensors", [torch.ones(3)] * 2, torch.ones(2).double()),
        (
            "weights that are not finite",
            [torch.ones(3)] * 2,
            torch.tensor([math.inf, 1]),
        ),
    ],
    ids=lambda p: p.replace(" ", "-") if isinstance(p, str) else "",
)
def test_what_mergekern_does_not_serve_is_peft_s(
    reason: str, xs: list[Tensor], weights: Tensor
) -> None:
    if xs[0].is_meta:
        weights = weights.to("meta")
    served_by_peft(reason, "task_arithmetic", xs, weights)


def test_a_random_drop_of_everything_is_peft_s() -> None:
    xs = [distinct((5, 7), torch.float32, i) for i in range(2)]
    for name in ("dare_linear", "dare_ties"):
        served_by_peft("a density of 0, which PEFT divides by", name, xs, torch.ones(2), 0.0)


@pytest.mark.parametrize(
    ("error", "args"),
    [(ValueError, (-0.5,)), (RuntimeError, (0.5, "loudest")), (TypeError, (None,))],
)
def test_wrong_arguments_raise_what_peft_raises(
    error: type[Exception], args: tuple[Any, ...]
) -> None:
    xs = [distinct((5, 7), torch.float32, i) for i in range(2)]
    for function in (THEIRS["ties"], dropin.ties):
        with pytest.raises(error):
            function(xs, torch.ones(2), *args)
    assert dropin.fallbacks["ties", "arguments that PEFT refuses"] == 1


def test_tensors_of_unequal_shape_raise_what_peft_raises() -> None:
    for function in (THEIRS["ties"], dropin.ties):
        with pytest.raises(RuntimeError, match="stack"):
            function([torch.ones(3), torch.ones(4)], torch.ones(2), 0.5)


def test_peft_s_own_prune_is_served_while_installed() -> None:
    x = distinct((40, 33), torch.float32, 0)
    expected = utils.prune(x, 0.4, method="magnitude")
    with dropin.accelerated():
        got = utils.prune(x, 0.4, method="magnitude")
    assert_bits_equal(got, expected + 0.0)
    assert dropin.served["magnitude_based_pruning"] == 1


# ---- add_weighted_adapter --------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(12, 20)
        self.second = torch.nn.Linear(20, 8)
        self.table = torch.nn.Embedding(9, 12)
        self.filters = torch.nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def adapted() -> Any:
    """A small network with two adapters of random weights."""
    targets = ["first", "second", "table", "filters"]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = api.get_peft_model(Net(), api.LoraConfig(r=4, target_modules=targets), "a")
        model.add_adapter("b", api.LoraConfig(r=4, lora_alpha=3, target_modules=targets))
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g)
    return model


def combined(kind: str) -> dict[str, Tensor]:
    model = adapted()
    torch.manual_seed(2)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "ab", kind, density=0.5)
    return {name: p for name, p in model.named_parameters() if "ab" in name.split(".")}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("linear", "task_arithmetic"),
        ("ties", "ties"),
        ("dare_linear", "dare_linear"),
        ("dare_ties", "dare_ties"),
        ("magnitude_prune", "magnitude_prune"),
    ],
)
def test_add_weighted_adapter(kind: str, name: str) -> None:
    """Combinations of factors; test_peft_svd.py has the others."""
    expected = combined(kind)
    assert not dropin.served
    with dropin.accelerated():
        got = combined(kind)
    layers = 4
    assert dropin.served == {name: 2 * layers}
    assert not dropin.fallbacks
    assert got.keys() == expected.keys()
    assert len(got) == 2 * layers
    for key, value in expected.items():
        assert bool((value != 0).any())
        assert_bits_equal(got[key], value)
