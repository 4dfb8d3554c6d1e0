"""greedy_soup: who joins, and the mean of the models themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mergekern as mk

from accuracy import assert_bits_equal
from refusal import refused

OP = "greedy_soup"
State = dict[str, Tensor]


def states(n: int = 4, dtype: torch.dtype = torch.float32) -> list[State]:
    g = torch.Generator().manual_seed(0)
    return [
        {
            "w": torch.randn(5, 7, generator=g).to(dtype),
            "b": torch.randn(3, generator=g).to(dtype),
            "steps": torch.tensor([3, 4]),
        }
        for _ in range(n)
    ]


def plain(values: list[float]) -> list[State]:
    return [{"w": torch.tensor([v], dtype=torch.float64)} for v in values]


class Scores:
    """Numbers in the order of the calls; keeps what it was given."""

    def __init__(self, *values: Any) -> None:
        self.values, self.seen = iter(values), list[State]()

    def __call__(self, state: State) -> Any:
        self.seen.append({key: x.clone() for key, x in state.items()})
        return next(self.values)


def equal(got: State, expected: Mapping[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for key, x in expected.items():
        assert_bits_equal(got[key], x)


def mean(models: list[State], **options: Any) -> State:
    return mk.merge_state_dicts(models, "linear", weight=1.0, **options)


# ---- who joins -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "tried", "members", "best"),
    [
        # by their own score: 2, 0, 3, 1
        ([0.5, 0.1, 0.9, 0.3], [0.8, 0.95, 0.9], (2, 3), 0.95),
        ([0.5, 0.1, 0.9, 0.3], [0.1, 0.2, 0.3], (2,), 0.9),
        ([0.5, 0.1, 0.9, 0.3], [0.9, 0.9, 0.9], (2, 0, 3, 1), 0.9),  # not worse is enough
        ([0.5, 0.5, 0.5, 0.5], [0.6, 0.5, 0.7], (0, 1, 3), 0.7),  # of equal ones the first
        ([-math.inf, 0.0, math.inf, -1.0], [math.inf, -math.inf, 3.0], (2, 1), math.inf),
        ([-0.0, 0.0, -1.0, -2.0], [0.0, -0.0, 0.0], (0, 1, 2, 3), 0.0),
    ],
)
def test_the_rule(own: list, tried: list, members: tuple, best: float) -> None:
    models, scores = states(), Scores(*own, *tried)
    soup = mk.greedy_soup(models, scores)
    order = sorted(range(4), key=lambda i: -own[i])
    assert soup.members == members
    assert soup.score == best
    assert soup.scores == tuple(own)
    assert soup.trials == (own[order[0]], *tried)
    equal(soup.state_dict, mean([models[i] for i in sorted(members)]))
    for i in range(4):
        equal(scores.seen[i], mean([models[i]]))
    joined = [order[0]]
    for seen, i in zip(scores.seen[4:], order[1:], strict=True):
        equal(seen, mean([models[j] for j in sorted([*joined, i])]))
        joined += [i] if i in members else []


def test_a_given_order_is_followed() -> None:
    models, scores = states(), Scores(0.2, 0.1, 0.4)
    soup = mk.greedy_soup(models, scores, order=[3, 0, 1])
    assert soup[1:] == ((3, 1), 0.4, (), (0.2, 0.1, 0.4))
    equal(soup.state_dict, mean([models[1], models[3]]))
    assert len(scores.seen) == 3


def test_one_model_is_its_own_soup() -> None:
    models = states(1)
    soup = mk.greedy_soup(models, lambda d: torch.tensor(0.25))
    assert soup[1:] == ((0,), 0.25, (0.25,), (0.25,))
    equal(soup.state_dict, models[0])
    assert soup.state_dict["w"].data_ptr() != models[0]["w"].data_ptr()


def test_the_nearest_mean_is_found() -> None:
    """Of points on a line, by the distance of the mean from 3."""
    soup = mk.greedy_soup(plain([2.0, 8.0, 5.0, 1.0]), lambda d: -abs(float(d["w"]) - 3))
    assert soup.members == (0, 2, 3)
    assert soup.trials == (-1.0, -0.5, 8 / 3 - 3, -1.0)  # of 2, 3.5, 8 / 3 and 4


# ---- the mean --------------------------------------------------------------------------------


def test_means_are_those_of_the_models_not_of_rounded_means() -> None:
    models = states(9, torch.bfloat16)
    soup = mk.greedy_soup(models, lambda d: 1.0)
    assert soup.members == tuple(range(9))
    assert_bits_equal(soup.state_dict["w"], mean(models)["w"])
    running = models[0]["w"]
    for k, m in enumerate(models[1:], start=1):
        running = running * (k / (k + 1)) + m["w"] * (1 / (k + 1))
    assert (running != soup.state_dict["w"]).any()


def test_means_do_not_depend_on_the_order_of_joining() -> None:
    """Sums in the order of the models, here of numbers that cancel."""
    models = plain([1e16, 1.0, -1e16, 3.0])
    for order in ([0, 2, 1, 3], [3, 1, 2, 0]):
        soup = mk.greedy_soup(models, lambda d: 1.0, order=order)
        assert soup.members == tuple(order)
        equal(soup.state_dict, mean(models))


def test_dtypes() -> None:
    """Means have one dtype, whoever takes part; and the one asked for."""
    a, b = states(1, torch.bfloat16)[0], states(2)[1]
    scores = Scores(0.2, 0.1, 0.3)
    soup = mk.greedy_soup([a, b], scores)
    assert {d["w"].dtype for d in scores.seen} == {torch.float32}
    equal(soup.state_dict, mean([a, b]))
    soup = mk.greedy_soup([a, b], lambda d: 1.0, out_dtype=torch.float16)
    equal(soup.state_dict, mean([a, b], out_dtype=torch.float16))


@pytest.mark.parametrize("named", ["torch", "reference"])
def test_a_backend_that_is_asked_for(named: str, calls: Any) -> None:
    mk.greedy_soup(states(2), lambda d: 1.0, backend=named)
    assert calls.backends() == {named}


def test_one_dict_is_written_again_and_the_callback_cannot_spoil_it() -> None:
    models, given = states(3), []

    def score(state: State) -> float:
        given.append({key: x.data_ptr() for key, x in state.items()})
        for x in state.values():
            x.zero_()
        return 1.0

    before = [{key: x.clone() for key, x in m.items()} for m in models]
    soup = mk.greedy_soup(models, score)
    assert all(g == given[0] for g in given)
    equal(soup.state_dict, mean(models))
    for m, b in zip(models, before):
        equal(m, b)


# ---- models that are read when needed --------------------------------------------------------


class Lazy(Mapping[str, Tensor]):
    def __init__(self, state: State) -> None:
        self.state = state

    def __getitem__(self, key: str) -> Tensor:
        return self.state[key].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def files(models: list[State], folder: Path) -> list[Path]:
    paths = [folder / f"{i}.safetensors" for i in range(len(models))]
    for path, model in zip(paths, models):
        save_file(model, path)
    return paths


FORMS: dict[str, Callable[[list[State], Path], list[Any]]] = {
    "mappings": lambda models, folder: [Lazy(m) for m in models],
    "paths": files,
    "names of files": lambda models, folder: [str(p) for p in files(models, folder)],
    "arrays": lambda models, folder: [{k: x.numpy() for k, x in m.items()} for m in models],
    "parameters": lambda models, folder: [
        {k: torch.nn.Parameter(x, requires_grad=x.is_floating_point()) for k, x in m.items()}
        for m in models
    ],
    "mixed": lambda models, folder: [models[0], *files(models, folder)[1:]],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_models(form: str, tmp_path: Path) -> None:
    models = states(3)
    soup = mk.greedy_soup(FORMS[form](models, tmp_path), lambda d: 1.0)
    expected = mean(models)
    assert set(soup.state_dict) == set(expected)  # a file has an order of its own
    for key, x in expected.items():
        assert_bits_equal(soup.state_dict[key], x)


# ---- refusals --------------------------------------------------------------------------------

A, B, C = plain([1.0, 2.0, 3.0])
REFUSALS: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "none": (([], len), {}, "models is empty"),
    "a state dict": ((A, len), {}, "models is no list; got dict"),
    "a path": (("a.safetensors", len), {}, "models is no list; got str"),
    "NaN alone": (([A, B], Scores(1.0, math.nan)), {}, "the score of [1] is NaN; got nan"),
    "NaN of a trial": (([A, B], Scores(1.0, 2.0, math.nan)), {}, "the score of [1, 0] is NaN"),
    "None": (([A], Scores(None)), {}, "the score of [0] is no number; got None"),
    "empty order": (([A, B], len), {"order": []}, "order is none; got []"),
    "order twice": (([A, B], len), {"order": [0, 0]}, "order is none; got [0, 0]"),
    "order beyond": (([A, B], len), {"order": [0, 2]}, "different numbers below 2"),
    "order below": (([A, B], len), {"order": [-1]}, "order is none; got [-1]"),
    "out_dtype": (([A], len), {"out_dtype": torch.int8}, "out_dtype has an unsupported dtype"),
    "no tensor": (([{"w": "x"}], len), {}, "models[0]['w'] is no tensor; got str"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    args, options, words = REFUSALS[what]
    with refused(OP, words):
        mk.greedy_soup(*args, **options)


def test_models_that_do_not_fit() -> None:
    odd = {"v": A["w"], "n": torch.tensor(1)}
    for other, words in (
        (odd, "3 tensors do not fit: w: missing from models[1]; v: missing from models[0]"),
        ({"w": torch.zeros(2, dtype=torch.float64)}, "w: shape differs: [1] in models[0]"),
        ({"w": torch.tensor([1])}, "w: dtype differs: floating in models[0], int64 in models[1]"),
    ):
        with refused(OP, words, sentence=False):
            mk.greedy_soup([A, other], len)
    counts = [{"n": torch.tensor(v)} for v in (1, 2)]
    with refused(OP, "n: values differ in models[1]; it cannot be averaged", sentence=False):
        mk.greedy_soup(counts, len)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x00" * 4)
    for bad in (tmp_path / "missing.safetensors", broken, tmp_path, 7):
        with refused(OP, "models[1] is no model; got", error=mk.CheckpointError, sentence=False):
            mk.greedy_soup([A, bad], len)


def test_what_the_callback_takes_out_is_in_the_soup() -> None:
    models = states(3)

    def score(state: State) -> float:
        return float(len(state.popitem()))

    assert set(mk.greedy_soup(models, score).state_dict) == set(models[0])
