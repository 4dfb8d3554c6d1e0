"""add_weighted_adapter by the SVD combinations: PEFT's beside the drop-in's, and a float64 oracle.

The oracle truncates by a float64 SVD what PEFT merged, or for `svd` the exact weighted sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekern.integrations import peft as dropin
from mergekern.integrations.peft import adapters as ours

from accuracy import assert_bits_equal, assert_within
from required import peer

pytestmark = pytest.mark.usefixtures("peft_counters")

api = peer("peft", "peft")
lora = peer("peft.tuners.lora.model", "peft")
layers = peer("peft.tuners.lora.layer", "peft")
transformers = peer("transformers.pytorch_utils", "transformers")

KINDS = {
    "svd": "task_arithmetic",
    "ties_svd": "ties",
    "dare_linear_svd": "dare_linear",
    "dare_ties_svd": "dare_ties",
    "magnitude_prune_svd": "magnitude_prune",
}
WEIGHTS = [0.7, -0.4, 1.1]
U = 2.0**-24


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(18, 20)
        self.wide = nn.Linear(31, 16)
        self.reversed = transformers.Conv1D(14, 23)  # GPT-2's, of which PEFT sets fan_in_fan_out
        self.table = nn.Embedding(19, 12)
        self.filters = nn.Conv2d(3, 16, 3)
        self.pointwise = nn.Conv2d(14, 17, 1)


LAYERS = ("first", "wide", "reversed", "table", "filters", "pointwise")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "equal": [{"r": 4}, {"r": 4}, {"r": 4}],
    "ranks": [{"r": 4}, {"r": 1, "lora_alpha": 3}, {"r": 7, "lora_alpha": 2}],
    "scales": [
        {"r": 4, "use_rslora": True},
        {"r": 4, "rank_pattern": {"first": 2}, "alpha_pattern": {"wide": 5}},
        {"r": 3, "lora_alpha": -2},
    ],
}


Targets = tuple[tuple[str, ...], ...]


def adapted(
    settings: str = "equal",
    dtype: torch.dtype = torch.float32,
    net: Callable[[], nn.Module] = Net,
    targets: Targets = (LAYERS,) * 3,
) -> Any:
    """A network with adapters "0", "1" and "2" of random factors."""
    torch.manual_seed(0)
    model: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, (given, names) in enumerate(zip(SETTINGS[settings], targets, strict=True)):
            config = api.LoraConfig(target_modules=list(names), **given)
            if model is None:
                model = api.get_peft_model(net().to(dtype), config, str(i))
            else:
                model.add_adapter(str(i), config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape).to(dtype)
    return model


def combine(model: Any, kind: str, weights: list[float] = WEIGHTS, **given: Any) -> Any:
    torch.manual_seed(2)
    if kind != "svd":
        given = {"density": 0.5, **given}
    model.add_weighted_adapter(["0", "1", "2"], weights, "new", kind, **given)
    return model


def layer(model: Any, name: str) -> Any:
    return model.base_model.model.get_submodule(name)


def factors(of: Any, adapter: str = "new") -> tuple[Tensor, Tensor]:
    if adapter in of.lora_A:
        return of.lora_B[adapter].weight.data, of.lora_A[adapter].weight.data
    return of.lora_embedding_B[adapter].data, of.lora_embedding_A[adapter].data


def product(of: Any, adapter: str = "new") -> Tensor:
    """[out, in] of the factors in float64, scaled."""
    b, a = factors(of, adapter)
    return of.scaling[adapter] * (b.flatten(1).double() @ a.flatten(1).double())


def merged_by_peft(kind: str, monkeypatch: pytest.MonkeyPatch, *args: Any, **given: Any) -> Any:
    """PEFT's model, and the matrix that it truncated, of each layer."""
    recorded: list[Tensor] = []
    merge = getattr(lora, KINDS[kind])

    def recording(*inner: Any) -> Tensor:
        recorded.append(merge(*inner))
        return recorded[-1]

    with monkeypatch.context() as patch:
        patch.setattr(lora, KINDS[kind], recording)
        model = combine(adapted(*args), kind, **given)
    names = [name for name, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")]
    turned = {"reversed", "table"}
    flat = (x.detach().double().flatten(1) for x in recorded)
    return model, {n: x.T if n in turned else x for n, x in zip(names, flat, strict=True)}


def truncated(x: Tensor, rank: int) -> tuple[Tensor, float]:
    """The best product of that rank, and s_1 s_r / (s_r - s_{r+1})."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    after = float(s[rank]) if rank < len(s) else 0.0
    amplified = float(s[0] * s[rank - 1]) / (float(s[rank - 1]) - after)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], amplified


def exact_sum(model: Any, name: str, weights: list[float] = WEIGHTS) -> Tensor:
    of = layer(model, name)
    return sum(w * product(of, str(i)) for i, w in enumerate(weights))


def off(model: Any, name: str, expected: Tensor) -> float:
    """How far the product of the factors is off; PEFT's own scale is not 1 with use_rslora."""
    b, a = (x.flatten(1).double() for x in factors(layer(model, name)))
    return float((b @ a - expected).norm())


# Trims of bfloat16 have to choose among equal magnitudes, which is open in PEFT.
CASES = [
    pytest.param(kind, dtype, id=f"{kind}-{str(dtype)[6:]}")
    for kind in KINDS
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    if dtype != torch.bfloat16 or kind not in ("ties_svd", "magnitude_prune_svd")
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_products_are_the_best_and_no_farther_off_than_peft_s(
    kind: str, dtype: torch.dtype, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, merged = merged_by_peft(kind, monkeypatch, settings, dtype)
    state = torch.get_rng_state()
    with dropin.accelerated():
        mine = combine(adapted(settings, dtype), kind)
    assert dropin.served[kind] == len(LAYERS)
    assert not dropin.fallbacks
    assert_bits_equal(torch.get_rng_state(), state)
    for name in LAYERS:
        of = layer(mine, name)
        b, a = (x.flatten(1) for x in factors(of))
        whole = exact_sum(mine, name) if kind == "svd" else merged[name]
        expected, amplified = truncated(whole, len(a))
        unit = 2.0**-53 if b.dtype == torch.float64 else U
        svd = 16 * sum(expected.shape) * 2.0**-53 * amplified  # of both SVDs in float64
        bound = 3 * unit * (b.abs().double() @ a.abs().double()) + svd
        assert_within(b.double() @ a.double(), expected, bound)
        eye = torch.eye(len(a), dtype=torch.float64)
        assert_within(a.double() @ a.T.double(), eye, torch.full_like(eye, 32 * unit))
        if dtype != torch.float64 or kind == "svd":  # in float64 both are as right as it can hold
            assert off(mine, name, expected) <= off(host, name, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_registered_as_peft_registers_it(kind: str) -> None:
    host = combine(adapted("ranks"), kind)
    with dropin.accelerated():
        mine = combine(adapted("ranks"), kind)
    assert mine.peft_config["new"] == host.peft_config["new"]
    both = [
        {n: (p.shape, p.dtype, p.device, p.requires_grad) for n, p in m.named_parameters()}
        for m in (mine, host)
    ]
    assert both[0] == both[1]
    for name in LAYERS:
        assert layer(mine, name).scaling["new"] == layer(host, name).scaling["new"] == 1
        assert factors(layer(mine, name))[1].is_contiguous()


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(160, 320)


@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_a_layer_large_enough_for_the_search(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("equal", torch.float32, Large, (("first",),) * 3)
    host, merged = merged_by_peft(kind, monkeypatch, *args)
    with dropin.accelerated():
        mine = combine(adapted(*args), kind)
    whole = exact_sum(mine, "first") if kind == "svd" else merged["first"]
    expected, amplified = truncated(whole, 4)
    b, a = (x.double() for x in factors(layer(mine, "first")))
    assert_within(b @ a, expected, 3 * U * (b.abs() @ a.abs()) + 2.0**-25 * amplified)
    assert off(mine, "first", expected) <= off(host, "first", expected)


@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
@pytest.mark.parametrize("rank", [1, 9, 12, 13])
def test_ranks(kind: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below, at and above the sum of ranks; one of the layers has a side of 12."""
    names = LAYERS if rank <= 12 else tuple(n for n in LAYERS if n != "table")
    args = ("equal", torch.float32, Net, (names,) * 3)
    _, merged = merged_by_peft(kind, monkeypatch, *args, svd_rank=rank)
    with dropin.accelerated():
        mine = combine(adapted(*args), kind, svd_rank=rank)
    for name in names:
        b, a = (x.flatten(1) for x in factors(layer(mine, name)))
        assert len(a) == b.shape[1] == rank
        whole = exact_sum(mine, name) if kind == "svd" else merged[name]
        expected, _ = truncated(whole, rank)
        limit = 512 * U * float(expected.abs().max())
        assert_within(b.double() @ a.double(), expected, torch.full_like(expected, limit))
        eye = torch.eye(rank, dtype=torch.float64)
        assert_within(a.double() @ a.T.double(), eye, torch.full_like(eye, 32 * U))


@pytest.mark.parametrize("kind", ["svd", "magnitude_prune_svd"])
def test_layers_that_some_adapters_lack(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = (("first", "wide"), ("wide",), ("first", "table"))
    _, merged = merged_by_peft(kind, monkeypatch, "equal", torch.float32, Net, targets)
    with dropin.accelerated():
        mine = combine(adapted("equal", targets=targets), kind)
    assert dropin.served[kind] == 3
    for name, whole in merged.items():
        expected, _ = truncated(whole, 4)
        limit = torch.full_like(expected, 512 * U * float(expected.abs().max()))
        assert_within(product(layer(mine, name)), expected, limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["svd", "dare_linear_svd"])
def test_whole_weights_and_16_bits(kind: str, dtype: torch.dtype) -> None:
    """PEFT has no SVD of these on a CPU; the factors are rounded once, to the adapters' dtype."""
    with pytest.raises(RuntimeError, match="not implemented for"):
        combine(adapted("equal", dtype), kind, [1, -1, 2])
    with dropin.accelerated():
        mine = combine(adapted("equal", dtype), kind, [1, -1, 2])
    for name in LAYERS:
        b, a = factors(layer(mine, name))
        assert a.dtype == b.dtype == dtype
        if kind == "svd":
            expected, _ = truncated(exact_sum(mine, name, [1, -1, 2]), 4)
            terms = b.flatten(1).abs().double() @ a.flatten(1).abs().double()
            assert_within(product(layer(mine, name)), expected, torch.finfo(dtype).eps * terms)


@pytest.mark.parametrize("made", [nn.Conv1d, nn.Conv3d])
def test_convolutions_of_other_dimensions(made: Any) -> None:
    """PEFT fails on the axes of their kernels."""

    class Convolving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filters = made(9, 16, 2)

    args = ("equal", torch.float32, Convolving, (("filters",),) * 3)
    with pytest.raises(RuntimeError):
        combine(adapted(*args), "svd")
    with dropin.accelerated():
        mine = combine(adapted(*args), "svd")
    assert factors(layer(mine, "filters"))[1].shape[1:] == layer(mine, "filters").weight.shape[1:]
    expected, _ = truncated(exact_sum(mine, "filters"), 4)
    limit = torch.full_like(expected, 512 * U * float(expected.abs().max()))
    assert_within(product(layer(mine, "filters")), expected, limit)


def test_a_layer_of_another_class_is_merged_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its get_delta_weight counts, not the product of its factors."""
    plain = layers.Linear.get_delta_weight

    def doubled(self: Any, adapter: str) -> Tensor:
        return 2 * plain(self, adapter)

    own = type("Own", (layers.Linear,), {"get_delta_weight": doubled})
    model = adapted("equal", targets=(("first",),) * 3)
    layer(model, "first").__class__ = own
    expected, _ = truncated(2 * exact_sum(model, "first"), 4)
    with dropin.accelerated():
        combine(model, "svd")
    b, a = (x.double() for x in factors(layer(model, "first")))
    assert_within(b @ a, expected, torch.full_like(expected, 512 * U * float(expected.abs().max())))
    assert dropin.served["svd"] == 1


def test_peft_s_attention() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)

    args = ("equal", torch.float32, Attending, (("attention",),) * 3)
    host = combine(adapted(*args), "svd")
    with dropin.accelerated():
        mine = combine(adapted(*args), "svd")
    assert dropin.served["svd"] == 2
    for name in ("attention", "attention.base_layer.out_proj"):
        expected = product(layer(host, name))
        limit = torch.full_like(expected, 512 * U * float(expected.abs().max()))
        assert_within(product(layer(mine, name)), expected, limit)


# ---- what goes to PEFT -----------------------------------------------------------------------


def test_a_clamp_is_peft_s() -> None:
    given = {"svd_clamp": 0.9, "density": 0.5}
    host = combine(adapted(), "ties_svd", **given)
    with dropin.accelerated():
        mine = combine(adapted(), "ties_svd", **given)
    reason = "svd_clamp, which cuts entries of factors that are not unique"
    assert dropin.fallbacks == {("ties_svd", reason): len(LAYERS)}
    assert not dropin.served["ties_svd"]
    for name in LAYERS:
        for got, expected in zip(factors(layer(mine, name)), factors(layer(host, name))):
            assert_bits_equal(got, expected)


def test_the_reduced_svd_keeps_the_same() -> None:
    with dropin.accelerated():
        whole, reduced = (
            combine(adapted(), "svd", svd_full_matrices=full) for full in (True, False)
        )
    for name in LAYERS:
        assert_bits_equal(factors(layer(reduced, name))[0], factors(layer(whole, name))[0])
    assert dropin.served["svd"] == 2 * len(LAYERS)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"svd_driver": "gesvd"}, "svd_driver, which names a method of cuSOLVER"),
        ({"svd_rank": 15}, "a rank above a side of the layer"),
    ],
)
def test_what_peft_refuses_is_peft_s_to_refuse(given: dict[str, Any], reason: str) -> None:
    targets = (("pointwise",),) * 3
    with pytest.raises(RuntimeError) as theirs:
        combine(adapted(targets=targets), "svd", **given)
    with dropin.accelerated(), pytest.raises(RuntimeError) as mine:
        combine(adapted(targets=targets), "svd", **given)
    assert str(mine.value) == str(theirs.value)
    assert dropin.fallbacks["svd", reason] == 1


def test_nan_is_refused_as_peft_refuses_it() -> None:
    for kind in ("svd", "ties_svd"):
        model = adapted()
        factors(layer(model, "wide"), "1")[0][2, 1] = torch.nan
        with dropin.accelerated(), pytest.raises(torch.linalg.LinAlgError):
            combine(model, kind)


def test_one_adapter_is_linear_as_in_peft() -> None:
    with dropin.accelerated():
        model = adapted()
        model.add_weighted_adapter(["1"], [0.5], "new", "svd")
    assert not dropin.served["svd"]
    for name in LAYERS:
        expected = 0.5 * product(layer(model, name), "1")
        limit = torch.full_like(expected, 16 * U * float(expected.abs().max()))
        assert_within(product(layer(model, name)), expected, limit)


def test_a_grouped_convolution_is_peft_s() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filters = nn.Conv2d(4, 8, 3, groups=2)

    args = ("equal", torch.float32, Grouped, (("filters",),) * 3)
    with pytest.raises(RuntimeError) as theirs:
        combine(adapted(*args), "svd")
    with dropin.accelerated(), pytest.raises(RuntimeError) as mine:
        combine(adapted(*args), "svd")
    assert str(mine.value) == str(theirs.value)
    assert next(iter(dropin.fallbacks))[1].endswith("as of a grouped convolution")


def test_no_matrix_of_the_layer_s_size_is_formed_for_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def formed(self: Any, adapter: str) -> Tensor:
        raise AssertionError("a task vector was formed")

    monkeypatch.setattr(ours, "best_of_rank", formed)
    with dropin.accelerated():
        combine(adapted("ranks"), "svd")
    assert dropin.served == {"svd": len(LAYERS)}
