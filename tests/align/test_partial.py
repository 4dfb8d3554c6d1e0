"""apply with `until`: a trunk that all models share, and each model's own head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from mergekern.align.declare import declare_spaces
from mergekern.align.discover import discover_spaces
from mergekern.align.matching.match import Match
from mergekern.align.merging.apply import apply
from mergekern.align.spaces import Place, Space, Spaces

from accuracy import assert_bytes_equal
from align import constructs
from align.networks import (
    CASES,
    Case,
    assert_same_output,
    normal,
    one_to_one,
    planted,
    random_labels,
    reordered,
    run,
    unrelated,
)
from refusal import refused

# Every space that a layer lies behind.
CUTS = [
    *(("mlp", until) for until in ("a", "b")),
    *(("residual", until) for until in ("stem", "conv1")),
    *(("attention", until) for until in ("embed", "qkv", "qkv[16:24]", "fc1")),
]


# ---- what it computes ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(("name", "until"), CUTS)
def test_each_head_is_its_own_model(name: str, until: str, n: int) -> None:
    models, match, inputs = planted(CASES[name], n)
    outputs = run(apply(models, match, until=until), inputs)
    assert isinstance(outputs, tuple)
    assert len(outputs) == n
    for model, output in zip(models, outputs, strict=True):
        assert_same_output(output, run(model, inputs))


@pytest.mark.parametrize("name", constructs.CASES)
def test_constructs_are_merged_back_and_cut_anywhere(name: str) -> None:
    """All that discovery understands: weights to the bit, and each head its own model."""
    model, inputs, movable = constructs.case(name)
    models, match = reordered(model, discover_spaces(model, inputs), 2)
    for key, x in apply(models, match).state_dict().items():
        assert_bytes_equal(x, model.state_dict()[key])
    with torch.no_grad():
        expected = [each(*inputs) for each in models]
        for until in movable:
            if (name, until) == ("factored", "a"):
                continue  # lies within weights
            outputs = apply(models, match, until=until)(*inputs)
            for output, y in zip(outputs, expected, strict=True):
                assert_same_output(output, y)


@pytest.mark.parametrize(("name", "until"), CUTS)
def test_a_model_with_itself_is_itself(name: str, until: str) -> None:
    (model,), match, inputs = planted(CASES[name], 1)
    labels = {space: vectors * 3 for space, vectors in match.labels.items()}
    partial = apply([model] * 3, Match(match.spaces, labels, "identity", {}), until=until)
    assert not list(partial.unmerge.buffers())
    for output in run(partial, inputs):
        assert_same_output(output, run(model, inputs))


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize("until", ["a", "b"])
def test_zips_are_those_of_dense_matrices(until: str, weights: list[float] | None) -> None:
    """M_i and U_i as ZipIt has them: the head of model i is W_i U_i."""
    models, spaces, x = unrelated(CASES["mlp"], 2)
    labels = {s: random_labels(spaces[s].size, 2, seed) for seed, s in enumerate(("a", "b"))}
    partial = apply(models, Match(spaces, labels, "zip", {}), until=until, weights=weights)
    u = {s: [nn.functional.one_hot(v, spaces[s].size).double() for v in labels[s]] for s in labels}
    merge = {s: [m.T / sum(m.sum(0) for m in u[s])[:, None] for m in u[s]] for s in u}
    w = [0.5, 0.5] if weights is None else [0.25, 0.75]

    def merged(layer: str, space: str, unmerge: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        weight = bias = torch.zeros(())
        for i, model in enumerate(models):
            m, own = 2 * w[i] * merge[space][i], getattr(model, layer)
            weight = weight + m @ own.weight @ (
                torch.eye(5).double() if unmerge is None else unmerge[i]
            )
            bias = bias + m @ own.bias
        return weight, bias

    with torch.no_grad():
        h = nn.functional.linear(x, *merged("a", "a", None)).relu()
        if until == "b":
            h = nn.functional.linear(h, *merged("b", "b", u["a"])).tanh()
        for i, (model, output) in enumerate(zip(models, run(partial, x), strict=True)):
            y = h @ u[until][i].T
            y = model.b(y).tanh() if until == "a" else y
            assert_same_output(output, model.c(y))


class Outputs(nn.Module):
    """Returns features, a number and an input beside the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, *, scale: Tensor, extra: Any = None) -> dict[str, Any]:
        hidden = torch.relu(self.a(x))
        out = self.b(hidden) * scale
        heads = hidden.unflatten(1, (2, 4)).transpose(1, 2)
        return {"hidden": hidden, "heads": heads, "rest": (out, x.shape[0], scale, extra)}


def test_outputs_of_the_trunk_are_each_models_own() -> None:
    def example(seed: int) -> dict[str, Any]:
        return {"x": normal(4, 5)(seed), "scale": normal(4, 3)(seed), "extra": None}

    models, match, inputs = planted(Case(Outputs, example, "free"), 3)
    outputs = run(apply(models, match, until="a"), inputs)
    for model, output in zip(models, outputs, strict=True):
        expected = run(model, inputs)
        assert output["rest"][1] == 4
        assert_bytes_equal(output["rest"][2], inputs["scale"])
        assert output["rest"][3] is None
        for key in ("hidden", "heads"):
            assert_same_output(output[key], expected[key])
        assert_same_output(output["rest"][0], expected["rest"][0])


class InPlace(nn.Module):
    """What crosses is changed behind the first layer that does not belong to the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        y = self.b(hidden)
        hidden.mul_(2)
        z = torch.tanh(hidden)
        return y * self.c(z)


class Weights(nn.Module):
    """Makes values of weights alone, before they are used, and returns one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.randn(6))
        self.shift = nn.Parameter(torch.randn(9, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.scale.exp(), self.shift[: x.shape[0]]
        hidden = torch.relu(self.a(x))
        return self.c(self.b(hidden) * scale) + shift, shift


@pytest.mark.parametrize(("network", "until"), [(InPlace, "a"), (Weights, "a"), (Weights, "b")])
def test_heads_do_not_see_each_other(network: type[nn.Module], until: str) -> None:
    """What one changes in place, and what each makes of its own weights."""
    models, match, x = planted(Case(network, normal(4, 5)), 2)
    models.append(models[0])
    for vectors in match.labels.values():
        vectors.append(vectors[0])
    with torch.no_grad():
        for i, model in enumerate(models[:2]):
            model.c.weight += i  # which does not matter to the trunk
            if network is Weights:
                model.shift += i
    for model, output in zip(models, run(apply(models, match, until=until), x), strict=True):
        assert_same_output(output, run(model, x))


def test_the_trunk_runs_once() -> None:
    models, match, x = planted(CASES["mlp"], 3)
    partial = apply(models, match, until="a")
    with FlopCounterMode(display=False) as counter:
        run(partial, x)
    # 7 inputs: the first layer once, the two others in every head.
    assert counter.get_total_flops() == 2 * 7 * (5 * 8 + 3 * (8 * 6 + 6 * 3))


def test_inputs_are_checked_as_those_of_the_model() -> None:
    models, match, inputs = planted(CASES["attention"], 2)
    partial = apply(models, match, until="qkv[16:24]")
    with refused("PartialZip", "other names", "['tokens']"):
        partial(tokens=inputs["tokens"])
    with refused("PartialZip", "other names"):
        partial(inputs["tokens"], inputs["mask"])
    with refused("PartialZip", "mask differs from the example in shape"):
        partial(tokens=inputs["tokens"], mask=inputs["mask"][:, :5])


# ---- as a module -----------------------------------------------------------------------------


def test_names_say_whose_tensor_it_is() -> None:
    models, match, _ = planted(CASES["mlp"], 2)
    partial = apply(models, match, until="a")
    assert list(partial.state_dict()) == [
        "trunk.a.weight",
        "trunk.a.bias",
        *(
            f"heads.{i}.{name}"
            for i in (0, 1)
            for name in ("b.weight", "b.bias", "c.weight", "c.bias")
        ),
        "unmerge.1.relu",
    ]
    assert partial.state_dict()["unmerge.1.relu"].dtype == torch.int64
    assert len(list(partial.parameters())) == 10
    for name in ("weight", "bias"):
        assert_bytes_equal(getattr(partial.trunk.a, name), getattr(models[0].a, name))
        assert_bytes_equal(getattr(partial.heads[1].c, name), getattr(models[1].c, name))


def test_tied_weights_are_in_the_trunk_and_in_the_heads() -> None:
    models, match, _ = planted(CASES["attention"], 2)
    partial = apply(models, match, until="embed")
    assert_bytes_equal(partial.trunk.out.weight, models[0].embed.weight)
    assert_bytes_equal(partial.heads[1].out.weight, models[1].embed.weight)
    assert "heads.1.norm3.weight" not in partial.state_dict()


@pytest.mark.parametrize("name", list(CASES))
def test_it_shares_nothing_with_the_models(name: str) -> None:
    models, match, inputs = planted(CASES[name], 2)
    before = [{k: x.clone() for k, x in m.state_dict().items()} for m in models]
    partial = apply(models, match, until=next(iter(match.spaces.movable)))
    partial.train()
    run(partial, inputs)
    with torch.no_grad():
        for x in partial.state_dict().values():
            x.fill_(0)
    for model, state in zip(models, before, strict=True):
        for key, x in model.state_dict().items():
            assert_bytes_equal(x, state[key])


@pytest.mark.parametrize(("name", "until"), CUTS)
def test_copies_and_state_dicts(name: str, until: str) -> None:
    models, match, inputs = planted(CASES[name], 2)
    partial = apply(models, match, until=until)
    expected = run(partial, inputs)
    twin = copy.deepcopy(partial)
    loaded = apply([CASES[name].model(9).double() for _ in models], match, until=until)
    loaded.load_state_dict(partial.state_dict())
    with torch.no_grad():
        for x in partial.parameters():
            x.zero_()
    for other in (twin, loaded):
        for a, b in zip(
            *(torch.utils._pytree.tree_leaves(y) for y in (run(other, inputs), expected)),
            strict=True,
        ):
            assert_bytes_equal(a, b)


@pytest.mark.parametrize(("name", "until"), CUTS)
def test_it_can_be_exported(name: str, until: str) -> None:
    models, match, inputs = planted(CASES[name], 2)
    partial = apply(models, match, until=until)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    exported = torch.export.export(partial, args, kwargs).module()
    for a, b in zip(
        *(torch.utils._pytree.tree_leaves(run(m, inputs)) for m in (exported, partial)), strict=True
    ):
        assert_bytes_equal(a, b)


@pytest.mark.parametrize(("name", "until"), CUTS)
def test_it_moves_to_another_device(name: str, until: str) -> None:
    """The meta device stands for one that tensors made by the trace's device cannot meet."""
    models, match, inputs = planted(CASES[name], 2)
    partial = apply(models, match, until=until).to("meta")
    moved = tree_map(lambda x: x.to("meta"), inputs)
    leaves = tree_leaves(run(partial, moved))
    assert {y.device.type for y in leaves} == {"meta"}


def test_gradients_reach_trunk_and_heads() -> None:
    models, match, x = planted(CASES["mlp"], 2)
    partial = apply(models, match, until="a")
    sum(y.sum() for y in partial(x)).backward()
    assert all(p.grad is not None for p in partial.parameters())
    models[0].a.weight.requires_grad_(False)
    assert not apply(models, match, until="a").trunk.a.weight.requires_grad


def test_training_mode_is_that_of_batch_norm() -> None:
    """As the model itself computes and counts in training mode, for it has no dropout."""
    models, match, x = planted(CASES["residual"], 2)
    partial = apply(models, match, until="conv1")
    assert not partial.training
    for module in (partial, *models):
        module.train()
    for model, output in zip(models, run(partial, x), strict=True):
        assert_same_output(output, run(model, x))
    for i, model in enumerate(models):
        for name in ("norm2.running_mean", "norm3.running_var"):
            own = model.state_dict()[name]
            assert_same_output(partial.state_dict()[f"heads.{i}.{name}"], own)
    assert_same_output(partial.trunk.norm.running_var, models[0].norm.running_var)
    partial.eval()
    models[0].eval()
    assert_same_output(run(partial, x)[0], run(models[0], x))
    assert apply([m.train() for m in models], match, until="conv1").training


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("until", "words"),
    [
        ("nowhere", ["got 'nowhere'", "one of the 2 that do: 'a', 'b'"]),
        ("c", ["'c', which is fixed"]),
    ],
)
def test_until_names_a_space_that_moves(until: str, words: list[str]) -> None:
    models, match, _ = planted(CASES["mlp"], 2)
    with refused("apply", *words):
        apply(models, match, until=until)


def test_until_has_something_behind_it() -> None:
    models, match, _ = planted(CASES["mlp"], 2)
    last = Space("last", 3, (Place("c.weight", 0, one_to_one(3), "produces"),))
    spaces = Spaces([*match.spaces.values(), last], match.spaces.program)
    with refused("apply", "no layer lies behind 'last'", "'a', 'b'"):
        apply(models, Match(spaces, match.labels, "", {}), until="last")


def test_until_is_a_space_that_activations_have() -> None:
    model, inputs, _ = constructs.case("factored")
    models, match = reordered(model, discover_spaces(model, inputs), 2)
    with refused("apply", "'a' lies within weights"):
        apply(models, match, until="a")


def declared(first: nn.Module, x: Tensor) -> Spaces:
    """A stream of two layers with a norm before the second, and what lies between."""
    stream, inner = "stream", "inner"
    axes = {
        "0.weight": (stream, None),
        "0.bias": (stream,),
        "1.weight": (stream,),
        "1.bias": (stream,),
        "2.weight": (inner, stream),
        "2.bias": (inner,),
        "4.weight": (None, inner),
    }
    return declare_spaces(axes, first, x)


def test_declared_spaces_are_cut_where_layers_read_them() -> None:
    torch.manual_seed(1)
    layers = [nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)]
    first, x = nn.Sequential(*layers).double(), torch.randn(7, 5).double()
    models, match = reordered(first, declared(first, x), 3)
    for until in ("stream", "inner"):
        for model, output in zip(models, run(apply(models, match, until=until), x), strict=True):
            assert_same_output(output, run(model, x))


class Between(nn.Module):
    """Adds to a stream before and after it is read, through a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(8, 3)
        self.norm, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.d = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.d(torch.relu(self.b(self.norm(x))))
        return self.c(self.norm2(x))


def test_what_declared_spaces_do_not_tell_is_not_cut() -> None:
    first, x = Between(), torch.randn(7, 5)
    axes = {"a.weight": ("s", None), "a.bias": ("s",), "norm.weight": ("s",), "norm.bias": ("s",)}
    axes |= {"b.weight": ("i", "s"), "b.bias": ("i",), "d.weight": ("s", "i"), "d.bias": ("s",)}
    axes |= {"norm2.weight": ("s",), "norm2.bias": ("s",), "c.weight": (None, "s")}
    models, match = reordered(first, declare_spaces(axes, first, x), 2)
    for output, model in zip(run(apply(models, match, until="s"), x), models, strict=True):
        assert_same_output(output, run(model, x))
    with refused("apply", "until='i' cuts", "linear of module 'a'"):
        apply(models, match, until="i")


def test_a_few_names_of_many() -> None:
    models, match, _ = planted(CASES["mlp"], 2)
    more = [Space(f"s{i}", 1, ()) for i in range(20)]
    spaces = Spaces([*match.spaces.values(), *more], match.spaces.program)
    with refused("apply", "one of the 22 that do: 'a', 'b', 's0', 's1', 's2', ..."):
        apply(models, Match(spaces, match.labels, "", {}), until="nowhere")
