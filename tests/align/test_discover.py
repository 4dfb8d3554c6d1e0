"""discover_spaces finds every space of every construct, and nothing that is none."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import mergekern as mk
from mergekern.align.spaces import Space, Spaces

from accuracy import assert_bytes_equal
from align.constructs import CASES, Net, case, image
from refusal import refused

EXACT = 1e-11  # of outputs in float64, whose unit is 1e-16; a wrong space changes them by 1e-3 on


@functools.cache
def found(name: str, **options: str) -> tuple[nn.Module, tuple, Spaces]:
    model, inputs, _ = case(name)
    return model, inputs, mk.discover_spaces(model, inputs, **options)


@pytest.mark.parametrize("name", CASES)
def test_spaces_are_those_of_the_construct(name: str) -> None:
    _, _, spaces = found(name)
    got = {name: (space.size, space.heads) for name, space in spaces.movable.items()}
    assert got == case(name).movable


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_permutations_leave_the_outputs(name: str, seed: int) -> None:
    model, inputs, spaces = found(name)
    assert spaces.verify(model, inputs, seed=seed).error < EXACT


@pytest.mark.parametrize("name", CASES)
def test_outputs_that_are_free_move_as_their_space_says(name: str) -> None:
    model, inputs, spaces = found(name, outputs="free")
    assert len(spaces.movable) >= len(case(name).movable)
    assert spaces.verify(model, inputs).error < EXACT


@pytest.mark.parametrize("name", CASES)
def test_every_place_is_needed(name: str) -> None:
    """Without any one of its places a space is wrong, and verify says so."""
    model, inputs, spaces = found(name)
    for space in spaces.movable.values():
        for place in space.places:
            if space.size == space.heads and space.group:
                continue  # a head's own feature moves only with its group
            left = tuple(p for p in space.places if p is not place)
            broken = replace(space, places=left, group=None)
            others = Spaces([broken], spaces.program)
            assert max(others.verify(model, inputs, seed=s).error for s in range(3)) > 1e-6, place


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_a_space_is_named_once_for_an_axis(name: str) -> None:
    model, _, spaces = found(name)
    state = dict(model.state_dict())
    taken: set[tuple[str, int, int]] = set()
    for space in spaces.values():
        for place in space.places:
            assert len(place.positions) == space.size
            at = {(place.name, place.axis, p) for p in place.positions.flatten().tolist()}
            assert len(at) == place.positions.numel()
            assert not at & taken
            taken |= at
            assert place.positions.max() < state[place.name].shape[place.axis]


@pytest.mark.parametrize(
    ("name", "space", "words"),
    [
        ("residual", "head", "an output"),
        ("residual", "input of stem", "an input"),
        ("tied", "embed[0:11]", "looked up by number"),
        ("fused_qkv", "position", "positions"),
        ("query_norm", "norm_q.weight", "shared by all heads"),
        ("grouped", "input of conv", "within the groups"),
        ("mixer", "input of t1", "positions"),
    ],
)
def test_what_may_not_move_says_why(name: str, space: str, words: str) -> None:
    spaces = found(name)[2]
    assert words in str(spaces[space].fixed)
    assert space not in spaces.movable


def test_heads_keep_their_features_where_something_tells_them_apart() -> None:
    for name in ("rotary", "query_norm", "grouped"):
        spaces = found(name)[2].movable
        assert next(iter(spaces.values())).inside
    assert found("fused_qkv")[2]["qkv"].inside is None


def test_heads_of_one_attention_move_together() -> None:
    spaces = found("fused_qkv")[2]
    assert spaces["qkv"].group == spaces["qkv[16:24]"].group is not None
    assert len(spaces.groups()) == 3


def test_zips_are_told_where_a_norm_makes_them_approximate() -> None:
    spaces = found("fused_qkv")[2]
    assert "LayerNorm" in str(spaces["patch"].approximate)
    assert "multiplied with each other" in str(spaces["qkv"].approximate)
    assert spaces["fc1"].approximate is None


def test_roles_say_what_a_zip_averages_and_what_it_adds() -> None:
    roles = {(p.name, p.axis): p.role for s in found("residual")[2].values() for p in s.places}
    assert roles["a.weight", 0] == "produces"
    assert roles["a.weight", 1] == "consumes"
    assert roles["bn1.weight", 0] == roles["bn1.running_var", 0] == "rides"
    tied = {(p.name, p.axis): p.role for p in found("tied")[2]["embed"].places}
    assert tied["embed.weight", 1] == "both"


def test_tied_weights_are_moved_under_each_of_their_names() -> None:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    model = Net(lambda m, x: m.head(m.b(m.a(x).relu()).relu()), a=a, b=b, head=nn.Linear(6, 2))
    spaces = mk.discover_spaces(model, torch.randn(3, 6))
    assert spaces.verify(model, torch.randn(3, 6)).exact
    for space in spaces.values():
        names = [p.name for p in space.places]
        assert ("a.weight" in names) == ("b.weight" in names)


def test_probes_are_what_the_consumers_read() -> None:
    """Before a pool, where there are most samples; after the activation."""
    _, _, spaces = found("residual")
    stem, inner = spaces["stem"], spaces["a"]
    nodes = {n.name: n for n in spaces.program.graph.nodes}
    assert [str(nodes[p.node].target) for p in stem.probes] == [
        "aten.conv2d.default",
        "aten.adaptive_avg_pool2d.default",
    ]
    assert [p.axes for p in (*stem.probes, *inner.probes)] == [(1,)] * 3
    attention = found("fused_qkv")[2]["qkv"].probes
    assert len(attention) == 2
    assert [p.arg for p in attention] == [0, 1]
    assert attention[0].axes == (1, 3)


def test_the_model_is_left_as_it_was() -> None:
    model, inputs, _ = case("residual")
    model.train()
    model.bn.eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    spaces = mk.discover_spaces(model, inputs)
    spaces.verify(model, inputs)
    assert model.training
    assert not model.bn.training
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_any_number_of_example_rows(rows: int) -> None:
    model, _, movable = case("fused_qkv", torch.float32)
    spaces = mk.discover_spaces(model, torch.randn(rows, 3, 8, 8))
    assert {n: (s.size, s.heads) for n, s in spaces.movable.items()} == movable
    assert spaces.verify(model, torch.randn(5, 3, 8, 8)).exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_bounds_by_the_dtype(dtype: torch.dtype) -> None:
    model, inputs, _ = case("residual", dtype)
    result = mk.discover_spaces(model, inputs).verify(model, inputs)
    assert result.exact
    assert result.bound == torch.finfo(dtype).eps ** 0.5


def test_verify_finds_a_space_that_is_wrong() -> None:
    model, inputs, _ = case("residual")
    spaces = mk.discover_spaces(model, inputs)
    wrong = Space("wrong", 6, tuple(p for p in spaces["stem"].places if "bn2" not in p.name))
    result = Spaces([wrong], spaces.program).verify(model, inputs)
    assert not result.exact


# ---- declared ------------------------------------------------------------------------------------


def test_declared_spaces_are_those_that_are_discovered() -> None:
    model, inputs, _ = case("residual")
    norm = ("weight", "bias", "running_mean", "running_var")
    axes = {
        "stem.weight": ("stem", None, None, None),
        "a.weight": ("a", "stem", None, None),
        "b.weight": ("stem", "a", None, None),
        "head.weight": (None, "stem"),
        **{f"{bn}.{x}": ("stem",) for bn in ("bn", "bn2") for x in norm},
        **{f"bn1.{x}": ("a",) for x in norm},
    }
    declared, spaces = mk.declare_spaces(axes, model, inputs), mk.discover_spaces(model, inputs)
    assert declared.verify(model, inputs).error < EXACT
    for name in ("stem", "a"):
        both = declared[name], spaces[name]
        places = [{(p.name, p.axis, p.role) for p in s.places} for s in both]
        assert places[0] == places[1]
    probes = [{(p.node, p.arg) for p in s["a"].probes} for s in (declared, spaces)]
    assert probes[0] == probes[1]
    blind = mk.declare_spaces(axes, model)
    permuted = blind.permuted(blind.random(), model.state_dict())
    assert not torch.equal(permuted["a.weight"], model.a.weight)
    other = copy.deepcopy(model)
    other.load_state_dict(blind.permuted(blind.random(), model.state_dict()))
    found = mk.match(blind, "weights", models=[model, other])
    merged = mk.apply([model, other], found)
    for key, x in model.state_dict().items():
        assert_bytes_equal(merged.state_dict()[key], x)
    for needs in (
        lambda: blind.verify(model, inputs),
        lambda: mk.collect_statistics([model, other], [inputs], blind),
        lambda: mk.apply([model, other], found, until="stem"),
    ):
        with refused("spaces", "example inputs are missing"):
            needs()


@pytest.mark.parametrize(
    ("axes", "options", "words"),
    [
        ({"nothing": ("x",)}, {}, "axes of no tensor"),
        ({"a.weight": ("x",)}, {}, "do not fit"),
        ({"a.weight": "xyzw"}, {}, "do not fit"),
        ({"a.weight": ("x", "x", None, None)}, {}, "sizes of space x differ"),
        ({"a.weight": (("x", "eats"), None, None, None)}, {}, "is no space"),
        ({"a.weight": ("x", None, None, None)}, {"heads": {"x": 3}}, "heads of x"),
    ],
)
def test_declarations_that_do_not_fit(axes: dict, options: dict, words: str) -> None:
    with refused("declare_spaces", words):
        mk.declare_spaces(axes, case("residual").model, **options)


# ---- what cannot be traced -----------------------------------------------------------------------


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_module_that_cannot_be_traced_is_named() -> None:
    model = Net(
        lambda m, x: m.b(m.inner(m.a(x))), a=nn.Linear(6, 8), inner=Inner(), b=nn.Linear(8, 2)
    )
    with refused("discover_spaces", "module inner cannot be traced", "declare_spaces"):
        mk.discover_spaces(model, torch.randn(3, 6))


def test_a_call_that_is_unknown_is_refused_with_its_module() -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort(-1).values

    model = Net(lambda m, x: m.b(m.s(m.a(x))), a=nn.Linear(6, 8), s=Sorted(), b=nn.Linear(8, 2))
    with refused("discover_spaces", "module s cannot be traced", "aten.sort"):
        mk.discover_spaces(model, torch.randn(3, 6))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (None, "there are no inputs"),
        ((), "there are no inputs"),
        (torch.randn(2, 5), "cannot be traced"),
        ((torch.randn(2, 3, 8, 8), torch.randn(2)), "cannot be traced"),
        ({"y": torch.randn(2, 3, 8, 8)}, "cannot be traced"),
    ],
)
def test_inputs_that_do_not_fit(inputs: object, words: str) -> None:
    with refused("discover_spaces", words):
        mk.discover_spaces(case("residual", torch.float32).model, inputs)


def test_other_refusals() -> None:
    model, inputs, _ = case("residual")
    with refused("discover_spaces", "model is none"):
        mk.discover_spaces(model.forward, inputs)
    with refused("discover_spaces", "outputs is unknown"):
        mk.discover_spaces(model, inputs, outputs="some")
    with refused("discover_spaces", "outputs names none"):
        mk.discover_spaces(model, inputs, outputs=["logits"])
    spaces = mk.discover_spaces(model, inputs)
    with refused("verify", "another structure"):
        spaces.verify(model, (image(), image()))
    with refused("verify", "other names"):
        spaces.verify(model, {"x": image()})


def test_a_model_that_fixes_its_batch_says_so() -> None:
    model = Net(lambda m, x: m.b(m.a(x).reshape(len(x), -1)), a=nn.Linear(6, 8), b=nn.Linear(8, 2))
    spaces = mk.discover_spaces(model, torch.randn(3, 6))
    assert spaces.verify(model, torch.randn(3, 6)).exact
    with refused("verify", "fixes the sizes", "[5, 6]", "[3, 6]"):
        spaces.verify(model, torch.randn(5, 6))
    with refused("verify", "is no tensor"):
        spaces.verify(model, ("x",))


def test_outputs_by_name() -> None:
    def run(m: Net, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = m.a(x).relu()
        return {"hidden": hidden, "logits": m.b(hidden)}

    model = Net(run, a=nn.Linear(6, 8), b=nn.Linear(8, 2))
    x = torch.randn(3, 6)
    assert not mk.discover_spaces(model, x).movable
    spaces = mk.discover_spaces(model, x, outputs=["logits"])
    assert set(spaces.movable) == {"a"}
    assert spaces.verify(model, x).exact
