"""regmean of networks that keep a cache, write into what they are given, or share weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import mergekern as mk

from accuracy import assert_bits_equal
from refusal import refused


class Residual(nn.Module):
    """x + tanh(lin x), in a new tensor or in x itself; beside a cache, of all that it has seen."""

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.lin, self.inside = nn.Linear(4, 4), inside

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        y = self.lin(x).tanh()
        if cache is not None:
            cache.append(y.mean(0))
            y = y + torch.stack(cache).sum(0) / len(cache)
        if self.inside:
            x += y
            return x
        return x + y


class Chain(nn.Module):
    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Residual(inside) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, cached: bool = False) -> Tensor:
        caches: list[Tensor] | None = [] if cached else None
        x = self.first(x)
        for block in self.blocks:
            x = block(x, caches)
        return self.head(x)


def chains(inside: bool = False) -> list[Chain]:
    torch.manual_seed(0)
    return [Chain(inside).double() for _ in range(2)]


def batches(n: int = 2) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [[torch.randn(20, 4, generator=g).double() for _ in range(2)] for _ in range(n)]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for key, x in a.state_dict().items():
        assert_bits_equal(b.state_dict()[key], x)


@pytest.mark.parametrize("blocks", [None, "blocks"])
def test_blocks_that_write_into_their_input(blocks: str | None) -> None:
    pure, inside = (
        mk.regmean(chains(inside), batches(), blocks=blocks) for inside in (False, True)
    )
    assert_same(pure, inside)


def test_a_cache_is_filled_once() -> None:
    """By hand: block k of each model is run with what the merged blocks before it have cached."""
    models = chains()
    given = [[{"x": x, "cached": True} for x in b] for b in batches()]
    got = mk.regmean(models, given, blocks="blocks")
    mean = mk.regmean(models, batches())  # of biases; the rest is replaced below
    expected = copy.deepcopy(mean)
    for name in ("first", "head"):
        layers = [getattr(m, name).weight for m in models]
        getattr(expected, name).weight.data = sum(layers).div(2)
    with torch.no_grad():
        states = [[(expected.first(x), list[Tensor]()) for x in b] for b in batches()]
        for k, block in enumerate(expected.blocks):
            inputs = [[x for x, _ in each] for each in states]
            lone = mk.regmean([m.blocks[k] for m in models], inputs)
            block.load_state_dict(lone.state_dict())
            states = [[(block(x, cache), cache) for x, cache in each] for each in states]
    for key, x in expected.state_dict().items():
        assert torch.allclose(got.state_dict()[key], x, rtol=1e-12, atol=1e-14), key


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.sub_(0.5).div_(2.0)))


def test_models_that_write_into_their_batch() -> None:
    """Several passes give what one gives, and the batches stay; they may be one for all models."""
    models, given = [Writes().double() for _ in range(2)], batches(1) * 2
    before = [x.clone() for x in given[0]]
    got = [mk.regmean(models, given, memory=memory) for memory in ("1GiB", 400)]
    assert_same(*got)
    for x, y in zip(given[0], before, strict=True):
        assert_bits_equal(x, y)


def test_inputs_of_inference_mode() -> None:
    given = batches()
    with torch.inference_mode():
        other = [[x.clone() for x in b] for b in given]
    assert_same(*(mk.regmean(chains(), x) for x in (given, other)))


class Guarded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = x * 1
            z = self.a(y)
            y += 1
            return z + self.b(y)


def test_tensors_without_a_version_are_read_each_time() -> None:
    models, given = [Guarded().double() for _ in range(2)], batches()
    got = mk.regmean(models, given)
    alone = mk.regmean([m.b for m in models], [[x + 1 for x in b] for b in given])
    assert_bits_equal(got.b.weight, alone.weight)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.idle(x[:0])])


def test_a_layer_of_no_rows_was_never_called() -> None:
    models = [Expert() for _ in range(2)]
    given = [[x.float() for x in b] for b in batches()]
    with pytest.warns(UserWarning, match=r"averaged; got idle.weight; expected"):
        mk.regmean(models, given)


# ---- weights ------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self, tied: bool, value: float) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(2, 2), nn.Embedding(2, 2)
        nn.init.constant_(self.a.weight, value)
        nn.init.constant_(self.b.weight, 3 * value)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def test_ties_of_the_first_model_lose_nothing() -> None:
    given = [[torch.arange(2)]] * 2
    with refused("regmean", "models[0] ties a.weight and b.weight"):
        mk.regmean([Pair(True, 0.0), Pair(False, 2.0)], given)
    got = mk.regmean([Pair(False, 2.0), Pair(True, 0.0)], given)
    assert [x.weight.detach()[0, 0].item() for x in (got.a, got.b)] == [1, 3]


def test_computed_weights_are_averaged_and_named() -> None:
    models = [nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Linear(3, 3)) for _ in range(2)]
    given = [[x.float() for x in b] for b in batches()]
    with pytest.warns(UserWarning, match=r"made of other tensors are averaged by these; got 0;"):
        mk.regmean(models, given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mk.regmean(chains(), batches())


@pytest.mark.parametrize("outside", [False, True])
def test_weights_of_several_blocks_are_refused(outside: bool) -> None:
    models = chains()
    for m in models:
        (m.first if outside else m.blocks[2].lin).weight = m.blocks[0].lin.weight
    name = "first.weight" if outside else "blocks.0.lin.weight"
    with refused("regmean", f"{name} is shared", "a weight of one block"):
        mk.regmean(models, batches(), blocks="blocks")
    mk.regmean(models, batches())


def test_layers_in_another_order() -> None:
    class Other(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.__dict__["_modules"].pop("first")

    models, given = chains(), batches()
    other = Other().double()
    other.load_state_dict(models[1].state_dict())
    assert [*other.state_dict()] != [*models[1].state_dict()]
    assert_same(mk.regmean(models, given), mk.regmean([models[0], other], given))


# ---- calls --------------------------------------------------------------------------------------


def test_names_that_forward_does_not_take_are_left_out() -> None:
    given = batches()
    named: Sequence[Any] = [[{"x": x, "labels": torch.zeros(20)} for x in b] for b in given]
    assert_same(*(mk.regmean(chains(), x) for x in (given, named)))


class Shifted(nn.Module):
    """One argument without a default and one with."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.lin(x if shift is None else x + shift)


class Lenient(Shifted):
    """As encoders of Hugging Face: every argument has a default."""

    def forward(self, x: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        assert x is not None
        return super().forward(x, shift)


@pytest.mark.parametrize("kind", [Shifted, Lenient])
@pytest.mark.parametrize("whole", [tuple, list])
def test_labels_do_not_go_into_an_argument_with_a_default(
    kind: type[Shifted], whole: type[tuple[Any, ...]] | type[list[Any]]
) -> None:
    models, xs = [kind().double() for _ in range(2)], batches()
    shift = torch.arange(20).double()[:, None]
    labelled = [[whole((x, shift)) for x in b] for b in xs]
    with refused("regmean", "entry 1 of a batch would be shift", "a mapping that names x, shift"):
        mk.regmean(models, labelled)
    alone = [[whole((x,)) for x in b] for b in xs]
    assert_same(mk.regmean(models, xs), mk.regmean(models, alone))
    named = [[{"x": x, "shift": shift} for x in b] for b in xs]
    moved = [[x + shift for x in b] for b in xs]
    assert_same(mk.regmean(models, moved), mk.regmean(models, named))


@pytest.mark.parametrize("blocks", [None, "encoder.layers"])
def test_a_padding_mask_of_a_transformer_encoder(blocks: str | None) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=mask)

    torch.manual_seed(0)
    models = [Encoder() for _ in range(2)]
    x, mask = torch.randn(12, 5, 8), torch.zeros(12, 5, dtype=torch.bool)
    mask[:6, 3:] = True
    fast = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of out_proj, which is no call
        merged = mk.regmean(models, [[(x, mask)]] * 2, blocks=blocks)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    average = mk.merge_state_dicts([m.state_dict() for m in models], "linear", weight=1.0)
    moved = [k for k, w in merged.state_dict().items() if not torch.equal(w, average[k])]
    assert {"encoder.layers.0.linear1.weight", "encoder.layers.1.linear2.weight"} <= {*moved}
