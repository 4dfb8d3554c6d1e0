"""MergedModel as a module: when it merges anew, copies, tied weights, refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergekern as mk

from accuracy import assert_bits_equal
from methods.merged_models import (
    VALUES,
    Net,
    X,
    batch,
    built,
    columns,
    tuned,
)
from refusal import refused

OP = "MergedModel"


@pytest.mark.parametrize("how", ["step", "data", "assigned"])
def test_a_changed_coefficient_is_merged_anew(how: str) -> None:
    merged, model, states = built()
    before = merged.weights()
    assert merged.weights() is before
    if how == "step":
        merged(batch()).sum().backward()
        with torch.no_grad():  # as optimizers do
            merged.coefficients.sub_(merged.coefficients.grad, alpha=0.01)
    elif how == "data":
        merged.coefficients.data[0, 0] += 0.125
    else:
        merged.coefficients = nn.Parameter(merged.coefficients.detach() + 0.125)
    after = merged.weights()
    assert after is not before
    xs = [d["first.weight"] for d in states]
    clamped = columns(merged, "first.weight").clamp(0, 1)
    expected = mk.merge_deltas(model.first.weight, xs, clamped.tolist())
    assert_bits_equal(after["first.weight"], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_before_training(mode: Any) -> None:
    """What was merged without a graph is merged again where one is needed, and kept otherwise."""
    merged, _, _ = built()
    x = batch()
    with mode():
        value = merged.eval()(x)
    assert not value.requires_grad
    loss = merged(x).sum()
    loss.backward()
    assert merged.coefficients.grad is not None
    kept = merged.weights()
    with mode():
        assert merged.weights() is kept
        assert_bits_equal(merged(x), value)


@pytest.mark.parametrize("based", [False, True])
def test_to_moves_the_models_too(based: bool) -> None:
    model = Net()
    states = tuned(model)
    base = {key: p.detach() for key, p in model.named_parameters()} if based else None
    merged = mk.MergedModel(model, states, base=base)
    before = merged.merge()["first.weight"]
    assert merged.double() is merged
    merged(batch().double()).sum().backward()
    xs = [d["first.weight"].double() for d in states]
    weights = columns(merged, "first.weight").tolist()
    got = merged.merge()["first.weight"]
    assert_bits_equal(got, mk.merge_deltas(model.first.weight, xs, weights))
    assert before.dtype == states[0]["first.weight"].dtype == torch.float32


def test_coefficients_that_need_no_gradient_have_no_graph() -> None:
    merged, _, _ = built()
    merged.coefficients.requires_grad_(False)
    assert not any(w.requires_grad for w in merged.weights().values())


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(through: Any) -> None:
    merged, _, _ = built(coefficients=VALUES)
    x = batch()
    merged(x).sum().backward()
    other = through(merged)
    assert_bits_equal(other.eval()(x), merged.eval()(x))
    with torch.no_grad():
        other.coefficients.zero_()
    assert_bits_equal(merged.coefficients, VALUES[:, None].expand(3, 8))


# ---- refusals --------------------------------------------------------------------------------


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: x for key, x in state.items() if key != name}


def test_refusals() -> None:
    model = Net()
    a, b, c = tuned(model)
    narrow = {key: x.half() for key, x in b.items()}
    for args, options, words in (
        ((model, []), {}, "nothing to merge; got 8 parameters, 0 state dicts"),
        ((model, a), {}, "state_dicts[0] is no mapping; got str; expected names to tensors"),
        ((nn.Tanh(), [a]), {}, "nothing to merge; got 0 parameters"),
        ((a, [a]), {}, "model is no network; got dict"),
        ((model, [a, narrow]), {}, "state_dicts[1]['scale'] differs from the model in dtype"),
        ((model, [a, {**b, "head.weight": X}]), {}, "state_dicts[1] holds tensors"),
        (
            (
                model,
                [a],
            ),
            {"base": {"x": X}},
            "base holds tensors that the model has not; got 'x'",
        ),
        ((model, [a]), {"layers": "block"}, "layers is unknown"),
        ((model, [a, b]), {"coefficients": [0.1] * 3}, "do not fit; got [3]; expected a number"),
        ((model, [a, b]), {"coefficients": torch.zeros(2, 3)}, "[2] or [2, 8]"),
        ((model, [a, b]), {"coefficients": "many"}, "coefficients are no numbers; got str"),
        ((model, [a, b]), {"coefficients": [0.1, float("nan")]}, "[1, 0] is not finite; got nan"),
        ((model, [{**a, "scale": torch.tensor(1)}]), {}, "unsupported dtype; got int64"),
    ):
        with refused(OP, words):
            mk.MergedModel(*args, **options)
    for bad, words in (
        (without(c, "scale"), "scale: missing from state_dicts[1]"),
        ({**c, "scale": torch.ones(1)}, "scale: shape differs: [] in the model, [1] in"),
    ):
        with refused(OP, words, sentence=False):
            mk.MergedModel(model, [a, bad])


def test_a_search_that_diverges_is_refused() -> None:
    merged, _, _ = built()
    with torch.no_grad():
        merged.coefficients[2, 1] = float("inf")
    with refused(OP, "coefficients[2, 1] is not finite; got inf"):
        merged(batch())


# ---- what is merged anew ---------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loaded", "written", "clamp", "softmax"])
def test_another_base_or_constraint_is_merged_anew(what: str) -> None:
    merged, model, _ = built(coefficients=VALUES)
    before = merged.merge()["first.weight"]
    if what == "loaded":
        merged.load_state_dict({k: x + 1 for k, x in merged.state_dict().items()})
    elif what == "written":
        with torch.no_grad():
            model.first.weight.add_(1)
    else:
        setattr(merged, what, not getattr(merged, what))
    after = merged.merge()["first.weight"]
    assert not torch.equal(after, before)
    assert_bits_equal(after, copy.deepcopy(merged).merge()["first.weight"])


def test_weights_of_inference_serve_no_graph() -> None:
    merged, _, _ = built()
    with torch.inference_mode():
        value = merged.eval()(batch())
    merged.requires_grad_(False)
    x = batch().requires_grad_()
    got = merged(x)
    got.sum().backward()
    assert_bits_equal(got, value)
    assert x.grad is not None


# ---- tied weights and other state ------------------------------------------------------------


def test_tied_weights_go_by_any_of_their_names() -> None:
    model = Net()
    states = tuned(model)
    expected = mk.MergedModel(model, states).merge()
    for name in ("tied.weight", "again.weight"):
        renamed = [{name if k == "last.weight" else k: x for k, x in d.items()} for d in states]
        for k, x in mk.MergedModel(model, renamed).merge().items():
            assert_bits_equal(x, expected[k])
        both = [{**d, name: d["last.weight"].clone()} for d in states]
        assert_bits_equal(mk.MergedModel(model, both).merge()[name], expected[name])
        both[1][name] = both[1][name] + 1
        words = f"state_dicts[1] unties weights that the model ties; got another {name} than last"
        with refused(OP, words):
            mk.MergedModel(model, both)


def test_other_state_is_kept() -> None:
    class Counted(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"seen": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    model = Counted(3, 2)
    found = mk.MergedModel(model, tuned(model)).merge()
    assert found["_extra_state"] == {"seen": 3}
