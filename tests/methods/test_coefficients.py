"""MergedModel: merge_deltas's weights, the op's gradients, autograd's and FusionBench's numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import mergekern as mk
from mergekern.methods.coefficients import LAYERS

from accuracy import assert_bits_equal, assert_within, half_ulp
from methods.merged_models import (
    VALUES,
    Net,
    Probe,
    batch,
    built,
    columns,
    exact_gradients,
    tuned,
)
from required import peer

OP = "MergedModel"
U = 2.0**-24


# ---- the merge -------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["tensor", "model", "block"])
def test_weights_are_those_of_task_arithmetic(layers: str) -> None:
    split = (lambda name: name.partition(".")[0]) if layers == "block" else layers
    merged, model, states = built(layers=split, clamp=False)
    expected = {"tensor": 8, "model": 1, "block": 6}[layers]
    assert merged.coefficients.shape == (3, expected)
    assert len(merged.layers) == expected
    with torch.no_grad():
        merged.coefficients.copy_(torch.linspace(-1, 2, 3 * expected).view(3, -1))
    for name, base in model.named_parameters():
        weights = columns(merged, name).tolist()
        task = [d[name] for d in states]
        wanted = mk.merge_tensors(task, "task_arithmetic", base=base, weight=weights)
        assert_bits_equal(merged.weights()[name], wanted)
        assert_bits_equal(merged.merge()[name], wanted)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
def test_coefficients_are_clamped_then_normalised(clamp: bool, softmax: bool) -> None:
    merged, model, states = built(coefficients=VALUES, clamp=clamp, softmax=softmax)
    weights = VALUES.double().clamp(0, 1) if clamp else VALUES.double()
    weights = weights.softmax(0) if softmax else weights
    xs = [d["first.weight"] for d in states]
    expected = mk.merge_deltas(model.first.weight, xs, weights.tolist())
    assert_bits_equal(merged.merge()["first.weight"], expected)


def test_the_merged_state_dict_loads_and_computes_the_same() -> None:
    merged, model, _ = built(coefficients=VALUES)
    other = Net()
    own = {key: x.clone() for key, x in model.state_dict().items()}
    found = merged.merge()
    other.load_state_dict(found)
    for name in ("again.weight", "tied.weight"):
        assert_bits_equal(found[name], found["last.weight"])
    taken = {x.data_ptr() for x in [*merged.weights().values(), *model.state_dict().values()]}
    assert not taken & {x.data_ptr() for x in found.values()}
    x = batch()
    assert_bits_equal(merged.eval()(x, times=2.0), other.eval()(x, times=2.0))
    for key, value in model.state_dict().items():  # the model's own stay as they are
        assert_bits_equal(value, own[key])


def test_sixteen_bit_files_serve_a_float32_model() -> None:
    model = Net()
    states = tuned(model, dtype=torch.bfloat16)
    base = {k: p.detach().bfloat16() for k, p in model.named_parameters()}
    merged = mk.MergedModel(model, states, base=base, coefficients=0.3)
    weight = merged.merge()["first.weight"]
    assert weight.dtype == torch.float32
    xs = [d["first.weight"] for d in states]
    expected = mk.merge_deltas(
        base["first.weight"], xs, merged.coefficients[:, 0].tolist(), out_dtype=torch.float32
    )
    assert_bits_equal(weight, expected)
    merged(batch()).sum().backward()
    assert merged.coefficients.grad is not None
    assert merged.coefficients.grad.isfinite().all()


# ---- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", LAYERS)
def test_gradients_of_a_network(layers: str) -> None:
    """Those of its merged weights, which autograd finds, times the task vectors."""
    merged, model, states = built(layers=layers, coefficients=VALUES, clamp=False)
    x = batch()
    merged(x).square().sum().backward()
    alone = Net()
    alone.load_state_dict(merged.merge())
    alone(x).square().sum().backward()
    by_weight = {k: w.grad for k, w in alone.named_parameters() if w.grad is not None}
    assert set(merged.weights()) - set(by_weight) == {"unused"}
    exact, bound = exact_gradients(merged, model, states, by_weight)
    got = merged.coefficients.grad
    assert got is not None
    assert got.dtype == torch.float32
    assert_within(got, exact, bound + half_ulp(exact, torch.float32))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
def test_the_constraint_is_differentiated(clamp: bool, softmax: bool) -> None:
    """As autograd does in float64; clamp lets through what lies on its ends."""
    probe = Probe()
    states = tuned(probe, 4)
    values = torch.tensor([0.0, 1.0, 1.5, 0.25])
    merged = mk.MergedModel(
        probe, states, coefficients=values, layers="model", clamp=clamp, softmax=softmax
    )
    merged().backward()
    by_weight = {
        name: d for (name, _), d in zip(probe.named_parameters(), probe.directions, strict=True)
    }
    inner, bound = exact_gradients(merged, probe, states, by_weight)
    c = values.double()[:, None].requires_grad_()
    effective = c.clamp(0, 1) if clamp else c
    effective = effective.softmax(0) if softmax else effective
    (exact,) = torch.autograd.grad(effective, c, inner)
    got = merged.coefficients.grad
    assert got is not None
    largest = float(inner.abs().max())
    limit = bound.sum() + 16 * 2.0**-53 * largest + half_ulp(exact, torch.float32)
    assert_within(got, exact, limit)
    if clamp and not softmax:
        assert got[2] == 0
        assert (got[[0, 1, 3]] != 0).all()


def test_losses_of_one_merge_one_after_the_other() -> None:
    """No retain_graph, one merge, and the sum of the gradients."""
    merged, _, _ = built(coefficients=VALUES)
    batches = [batch(i) for i in range(3)]
    weights = merged.weights()
    each = []
    for x in batches:
        merged.coefficients.grad = None
        merged(x).square().sum().backward()
        each.append(merged.coefficients.grad)
        assert merged.weights() is weights
    merged.coefficients.grad = None
    for x in batches:
        merged(x).square().sum().backward()
    got, total = merged.coefficients.grad, sum(each)
    assert_bits_equal(got, total)


def test_the_graph_is_that_of_the_coefficients_it_was_merged_with() -> None:
    merged, _, _ = built(coefficients=VALUES, softmax=True)
    x = batch()
    merged.eval()(x).square().sum().backward()
    expected = merged.coefficients.grad
    merged.coefficients.grad = None
    loss = merged(x).square().sum()
    with torch.no_grad():
        merged.coefficients.add_(1)
    loss.backward()
    assert_bits_equal(merged.coefficients.grad, expected)


def test_nothing_is_saved_for_each_model() -> None:
    saved = []
    for n in (1, 6):
        model = Net()
        merged = mk.MergedModel(model, tuned(model, n))
        sizes: list[int] = []

        def pack(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.nbytes)
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            merged.weights()
        saved.append(sum(sizes))
    assert saved == [0, 0]


# ---- FusionBench -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["layer_wise", "task_wise"])
@pytest.mark.parametrize("clamp", [False, True])
def test_fusion_bench(wrapper: str, clamp: bool) -> None:
    """Weights and gradients within the roundings of float32 that FusionBench makes."""
    host = peer(f"fusion_bench.models.wrappers.{wrapper}_fusion", "fusion-bench")
    layered = wrapper == "layer_wise"
    probe = Probe()
    count = len(probe.directions)
    values = torch.rand(3, count if layered else 1, generator=torch.Generator().manual_seed(5))
    states = tuned(probe)
    ours = mk.MergedModel(
        probe, states, coefficients=values, layers="tensor" if layered else "model", clamp=clamp
    )
    models = [copy.deepcopy(probe) for _ in states]
    for model, state in zip(models, states):
        model.load_state_dict(state, strict=False)
    kind = host.LayerWiseMergedModel if layered else host.TaskWiseMergedModel
    given = values.clone() if layered else values[:, 0].clone()
    theirs = kind(given, copy.deepcopy(probe), models, clamp_weights=clamp, strict=False)
    theirs.merge_weights()
    for name, mine in ours.weights().items():
        # Theirs: a difference, a product and a sum rounded for each of 3 models; ours likewise.
        base = dict(probe.named_parameters())[name].detach().double()
        deltas = sum((d[name].double() - base).abs() for d in states)
        limit = 2 * 10 * U * (base.abs() + deltas)
        assert_within(mine, theirs._merged_state_dict[name].detach().double(), limit)
    ours().backward()
    theirs().backward()
    by_weight = {n: d for (n, _), d in zip(probe.named_parameters(), probe.directions)}
    exact, bound = exact_gradients(ours, probe, states, by_weight)
    got, their = ours.coefficients.grad, theirs.merge_weight.grad.view(exact.shape)
    assert got is not None
    assert_within(got, exact, bound + half_ulp(exact, torch.float32))
    # Theirs adds up in float32: (numel + 2) roundings of 2**-24 in the place of 2**-53.
    assert_within(their, exact, bound * 2.0**29 + half_ulp(exact, torch.float32))
