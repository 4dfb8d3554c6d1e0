"""apply: one model of several, against dense matrices, planted permutations and by refusals."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekern.align.matching.match import Match
from mergekern.align.merging.apply import apply
from mergekern.align.merging.relabel import Relabelling
from mergekern.align.spaces import Place, Space, Spaces
from mergekern.align.tracing.program import Program

from accuracy import assert_bytes_equal, assert_within
from align.networks import CASES, one_to_one, planted, random_labels, run, unrelated
from refusal import refused

NAMES = list(CASES)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    got = model.state_dict()
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert_bytes_equal(got[name], x)


def identity(spaces: Spaces, n: int) -> Match:
    labels = {name: [torch.arange(s.size)] * n for name, s in spaces.movable.items()}
    return Match(spaces, labels, "identity", {})


# ---- permutations ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_planted_permutations_are_undone_to_the_bit(name: str, n: int, dtype: torch.dtype) -> None:
    models, match, _ = planted(CASES[name], n, dtype)
    before = [state_of(model) for model in models]
    merged = apply(models, match)
    assert type(merged) is type(models[0])
    assert_same_state(merged, before[0])
    for model, state in zip(models, before, strict=True):
        assert_same_state(model, state)


def test_the_result_shares_nothing_with_the_models() -> None:
    models, match, _ = planted(CASES["residual"], 2)
    before = [state_of(model) for model in models]
    merged = apply(models, match)
    with torch.no_grad():
        for x in merged.state_dict().values():
            x.fill_(7)
    for model, state in zip(models, before, strict=True):
        assert_same_state(model, state)


def test_a_copy_keeps_what_the_model_has() -> None:
    """Ties, training mode, gradients wanted or not, memory formats, other attributes."""
    models, match, _ = planted(CASES["attention"], 2)
    models[0].train()
    models[0].fc1.weight.requires_grad_(False)
    models[0].note = "kept"
    merged = apply(models, match)
    assert merged.out.weight is merged.embed.weight
    assert merged.training
    assert merged.note == "kept"
    wanted = {k: p.requires_grad for k, p in merged.named_parameters()}
    assert wanted == {k: p.requires_grad for k, p in models[0].named_parameters()}
    models, match, _ = planted(CASES["residual"], 2, torch.float32)
    models[0].to(memory_format=torch.channels_last)
    merged = apply(models, match)
    assert merged.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_state(merged, state_of(models[0]))


@pytest.mark.parametrize("name", NAMES)
def test_labels_that_stay_average(name: str) -> None:
    models, spaces, _ = unrelated(CASES[name], 3)
    merged = apply(models, identity(spaces, 3)).state_dict()
    for key, x in merged.items():
        xs = [model.state_dict()[key] for model in models]
        if x.is_floating_point():
            # Sums of 3 and a division in float64, in any order: 3 roundings of at most u sum |x|.
            exact, size = torch.stack(xs).mean(0), torch.stack(xs).abs().mean(0)
            assert_within(x, exact, 6 * 2**-53 * size)
        else:
            assert_bytes_equal(x, xs[0])


def test_weights_are_normalized() -> None:
    models, match, _ = planted(CASES["mlp"], 2)
    models[1].load_state_dict({k: 3 * x for k, x in models[1].state_dict().items()})
    merged, same = (apply(models, match, weights=w).state_dict() for w in ([1, 3], [0.25, 0.75]))
    for key, x in models[0].state_dict().items():
        assert_bytes_equal(merged[key], same[key])
        # w_0 x + w_1 3 x, that is 2.5 x, by two products, a sum and a division.
        assert_within(merged[key], 2.5 * x, 5 * 2**-53 * 2.5 * x.abs())
    assert_same_state(apply(models, match, weights=[1, 0]), state_of(models[0]))


# ---- zips, against dense matrices ------------------------------------------------------------

# Which spaces lie along which axes, written down from the networks themselves.
DENSE = {
    "mlp": {
        "a.weight": {0: ("M", "a")},
        "a.bias": {0: ("M", "a")},
        "b.weight": {0: ("M", "b"), 1: ("U", "a")},
        "b.bias": {0: ("M", "b")},
        "c.weight": {1: ("U", "b")},
    },
    "residual": {
        "stem.weight": {0: ("M", "stem")},
        "conv1.weight": {0: ("M", "conv1"), 1: ("U", "stem")},
        "conv2.weight": {0: ("M", "stem"), 1: ("U", "conv1")},
        "depthwise.weight": {0: ("M", "stem")},
        "depthwise.bias": {0: ("M", "stem")},
        "head.weight": {1: ("U", "stem", 4)},
        **{
            f"{norm}.{x}": {0: ("M", space)}
            for norm, space in (
                ("norm", "stem"),
                ("norm1", "conv1"),
                ("norm2", "stem"),
                ("norm3", "stem"),
            )
            for x in ("weight", "bias", "running_mean", "running_var")
        },
    },
}


def matrices(labels: Sequence[Tensor], size: int) -> tuple[list[Tensor], list[Tensor]]:
    """M_i [merged, features] with means in its rows, U_i [features, merged] of zeros and ones."""
    one_hot = [nn.functional.one_hot(v, size).double() for v in labels]
    count = sum(u.sum(0) for u in one_hot)
    return [u.T / count[:, None] for u in one_hot], one_hot


def dense(name: str, key: str, xs: list[Tensor], match: Match, w: list[float]) -> Tensor:
    """sum_i N w_i M_i x_i U_i, or the plain weighted average of what has neither."""
    n, total = len(xs), torch.zeros_like(xs[0])
    axes = DENSE[name].get(key, {})
    for i, x in enumerate(xs):
        y = x
        for axis, (kind, space, *block) in axes.items():
            merge, unmerge = matrices(match.labels[space], match.spaces[space].size)
            matrix = merge[i] if kind == "M" else unmerge[i].T
            matrix = (
                torch.kron(matrix.contiguous(), torch.eye(*block).double()) if block else matrix
            )
            y = torch.tensordot(matrix, y, ([1], [axis])).movedim(0, axis)
        averaged = 1 if any(kind == "M" for kind, *_ in axes.values()) else n
        total += n * w[i] * y / averaged
    return total


@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 0.3]])
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", list(DENSE))
def test_zips_are_those_of_dense_matrices(name: str, n: int, weights: list[float] | None) -> None:
    models, spaces, _ = unrelated(CASES[name], n)
    labels = {
        s.name: random_labels(s.size, n, seed) for seed, s in enumerate(spaces.movable.values())
    }
    match = Match(spaces, labels, "zip", {})
    given = None if weights is None else weights[:n]
    merged = apply(models, match, weights=given).state_dict()
    w = [1 / n] * n if given is None else [x / sum(given) for x in given]
    assert any(len(v.unique()) < len(v) for vectors in labels.values() for v in vectors)
    for key, got in merged.items():
        xs = [model.state_dict()[key] for model in models]
        if got.is_floating_point():
            exact, size = (dense(name, key, y, match, w) for y in (xs, [x.abs() for x in xs]))
            # zip_weights: (m + 3) u; dense products as many again, and w is rounded three times.
            terms = n * max(xs[0].shape, default=1) ** 2
            assert_within(got, exact, (2 * terms + 9) * 2**-53 * size)
        else:
            assert_bytes_equal(got, xs[0])


# ---- tensors that one call of zip_weights cannot take ----------------------------------------


class Square(nn.Module):
    """Features on both axes of a tensor, on its last two, and on none of the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(3, 4)
        self.pair = nn.Parameter(torch.randn(4, 4))
        self.stack = nn.Parameter(torch.randn(2, 5, 4))
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rows(x)
        x = x * torch.einsum("bi,ij,bj->b", x, self.pair, x)[:, None]
        return self.out(torch.einsum("kji,bi->bj", self.stack, x))


def square(models: int) -> tuple[list[nn.Module], Spaces]:
    torch.manual_seed(3)
    first = Square().double()
    i, j = one_to_one(4), one_to_one(5)
    spaces = [
        Space(
            "i",
            4,
            (
                Place("rows.weight", 0, i, "produces"),
                Place("rows.bias", 0, i, "rides"),
                Place("pair", 0, i, "consumes"),
                Place("pair", 1, i, "consumes"),
                Place("stack", 2, i, "consumes"),
            ),
        ),
        Space("j", 5, (Place("stack", 1, j, "produces"), Place("out.weight", 1, j, "consumes"))),
    ]
    program = Program(first, torch.randn(3, 3).double(), "test")
    return [first, *(Square().double() for _ in range(models - 1))], Spaces(spaces, program)


@pytest.mark.parametrize("n", [2, 3])
def test_permutations_on_any_axes_are_undone_to_the_bit(n: int) -> None:
    models, spaces = square(n)
    labels = {name: [torch.arange(s.size)] for name, s in spaces.items()}
    for seed, model in enumerate(models[1:]):
        moved = spaces.random(seed)
        model.load_state_dict(spaces.permuted(moved, models[0].state_dict()))
        for name in labels:
            labels[name].append(moved[name])
    assert_same_state(apply(models, Match(spaces, labels, "", {})), state_of(models[0]))


def test_what_can_only_be_permuted_is_not_zipped() -> None:
    models, spaces = square(2)
    twice = {"i": [torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 2])]}
    with refused("apply", "pair", "axes 0, 1"):
        apply(models, Match(spaces, twice, "zip", {}))
    models, spaces, _ = unrelated(CASES["attention"], 2)
    stream = {"embed": random_labels(8, 2, 0)}
    with refused("apply", "embed.weight", "both made and read"):
        apply(models, Match(spaces, stream, "zip", {}))


def test_labels_along_an_axis_are_those_of_its_positions() -> None:
    swap = Relabelling({"s": [torch.tensor([0, 1]), torch.tensor([1, 0])]})
    for start, expected in ((0, [1, 0, 2, 3]), (2, [0, 1, 3, 2])):
        stay, moved = swap.along(4, [("s", one_to_one(2, start))])
        assert stay.tolist() == [0, 1, 2, 3]
        assert moved.tolist() == expected
    pairs = torch.tensor([[0, 2], [1, 3]])
    assert swap.along(4, [("s", pairs)])[1].tolist() == [1, 0, 3, 2]


# ---- integers, and models that do not fit ----------------------------------------------------


def test_counters_are_those_of_the_first_model() -> None:
    models, match, _ = planted(CASES["residual"], 2)
    models[0].norm1.num_batches_tracked.fill_(5)
    models[1].norm1.num_batches_tracked.fill_(6)
    assert_same_state(apply(models, match), state_of(models[0]))


def test_integers_that_are_read_must_agree() -> None:
    models, match, _ = planted(CASES["attention"], 2)
    models[1].ids += 1
    with pytest.raises(ValueError, match=r"apply: 1 tensors do not fit: ids: values differ"):
        apply(models, match)


def other(change: str) -> tuple[list[Any], Match]:
    models, match, _ = planted(CASES["mlp"], 2)
    if change == "width":
        models[1].b = nn.Linear(8, 7)
    if change == "both widths":
        for model in models:
            model.c = nn.Linear(6, 4).double()
    if change == "dtype":
        models[1].half()
    if change == "more":
        models[1].extra = nn.Linear(1, 1)
    if change == "no module":
        models[1] = models[1].state_dict()
    if change == "none":
        models = []
    return models, match


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("both widths", ["models[0]", "got c.weight [4, 6]", "expected c.weight [3, 6]"]),
        ("width", ["models[1]", "got b.weight [7, 8]"]),
        ("more", ["models[1]", "expected no extra.bias"]),
        ("dtype", ["a.weight of models[1]", "float16", "float64"]),
        ("no module", ["OrderedDict"]),
        ("none", ["no models"]),
    ],
)
def test_models_that_do_not_fit(change: str, words: list[str]) -> None:
    models, match = other(change)
    with refused("apply", *words):
        apply(models, match)


A, B = torch.arange(8), torch.arange(8).flip(0)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"nowhere": [A, B]}, ["'nowhere'", "one of the 2 that do: 'a', 'b'"]),
        ({"c": [A[:3], A[:3]]}, ["'c' is no space that moves"]),
        ({"a": [A]}, ["'a'", "1 vectors", "2, one for each"]),
        ({"a": [A, B[:7]]}, ["models[1]", "7 labels"]),
        ({"a": [A, B + 1]}, ["models[1]", "from 1 to 8", "0 to 7"]),
        ({"a": [A, B - 1]}, ["models[1]", "from -1 to 6"]),
        ({"a": [A.clamp(max=6), A.clamp(max=6)]}, ["'a'", "none for 7"]),
        ({"a": [A, B.float()]}, ["labels of 'a'", "float32"]),
    ],
)
def test_labels_that_do_not_fit(labels: dict[str, list[Tensor]], words: list[str]) -> None:
    models, match, _ = planted(CASES["mlp"], 2)
    with refused("apply", *words):
        apply(models, Match(match.spaces, labels, "", {}))


@pytest.mark.parametrize(
    ("weights", "word"), [([1, -1], "sum of 0"), ([1], "length"), ([1, float("nan")], "finite")]
)
def test_weights_that_do_not_fit(weights: list[float], word: str) -> None:
    models, match, _ = planted(CASES["mlp"], 2)
    with refused("apply", word):
        apply(models, match, weights=weights)


def test_an_interrupted_merge_leaves_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    models, match, inputs = planted(CASES["residual"], 2)
    before = [state_of(model) for model in models]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(copy, "deepcopy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(models, match)
    for model, state in zip(models, before, strict=True):
        assert_same_state(model, state)
        run(model, inputs)
