"""regmean and RegMean++ of whole networks against plain loops in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergekern as mk
from mergekern.ops.covariance import Covariance

from accuracy import assert_bits_equal, assert_within
from refusal import refused

WEIGHTS = [1.0, 2.0, 0.5]
CONDITION = 1e6  # at most, of the sums of Gram matrices here


class Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / x.shape[-1] ** 0.5
        return self.out(scores.softmax(-1) @ self.v(x))


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d)
        self.fc1, self.fc2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        x = x + scale * self.attention(self.norm1(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x)))), None


class ViT(nn.Module):
    """Patches, a linear embedding, blocks, a head."""

    def __init__(self, d: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, 4, stride=4)
        self.embed = nn.Linear(d, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(blocks))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 5)

    def prefix(self, images: Tensor) -> Tensor:
        return self.embed(self.patches(images).flatten(2).transpose(1, 2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.prefix(images)
        for block in self.blocks:
            x, _ = block(x, 0.7)
        return self.head(self.norm(x).mean(1))


def set_norms(models: Sequence[nn.Module]) -> None:
    """At random: what new ones return sums up to 0, so that its second moments are singular."""
    for norm in (m for model in models for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias)


def family(n: int = 3, **given: Any) -> tuple[list[ViT], list[list[Tensor]]]:
    """n networks in float64, and batches of two sizes for each."""
    torch.manual_seed(0)
    models = [ViT(**given).double().eval() for _ in range(n)]
    set_norms(models)
    return models, [[torch.randn(k, 3, 12, 12).double() + i for k in (20, 13)] for i in range(n)]


def inputs_of(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Second moments by name of every linear layer's inputs, each by itself."""
    rows: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: rows.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return {k: torch.cat(x).T @ torch.cat(x) / len(torch.cat(x)) for k, x in rows.items()}


def solve(ws: Sequence[Tensor], gs: Sequence[Tensor], reduce: float) -> Tensor:
    gs = [w * (reduce * g + (1 - reduce) * torch.diag(g.diagonal())) for w, g in zip(WEIGHTS, gs)]
    right = sum(w @ g for w, g in zip(ws, gs, strict=True))
    assert torch.linalg.cond(sum(gs)) < CONDITION
    return torch.linalg.solve(sum(gs), right.T).T


def mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    share = [w / sum(WEIGHTS[: len(states)]) for w in WEIGHTS]
    return {k: sum(s * d[k] for s, d in zip(share, states)) for k in states[0]}


def assert_states(got: nn.Module, expected: dict[str, Tensor]) -> None:
    """64 roundings of each entry and of the layer's mean entry, times the condition of a solve."""
    state = got.state_dict()
    assert state.keys() == expected.keys()
    for key, x in expected.items():
        assert_within(state[key], x, CONDITION * 64 * 2.0**-53 * (x.abs() + x.abs().mean()))


@pytest.mark.parametrize("reduce", [1.0, 0.9])
def test_regmean(reduce: float) -> None:
    models, batches = family()
    before = copy.deepcopy(models)
    got = mk.regmean(models, batches, weights=WEIGHTS, reduce=reduce)
    grams = [inputs_of(m, lambda m=m, b=b: [m(x) for x in b]) for m, b in zip(models, batches)]
    states = [m.state_dict() for m in models]
    expected = mean(states)
    for name in grams[0]:
        key = f"{name}.weight"
        expected[key] = solve([s[key] for s in states], [g[name] for g in grams], reduce)
    assert_states(got, expected)
    for model, was in zip(models, before, strict=True):
        assert_states(model, was.state_dict())


def naive_plus_plus(
    models: Sequence[ViT], batches: Sequence[Sequence[Tensor]], reduce: float
) -> dict[str, Tensor]:
    """Block by block: moments of each model's block, merged, the inputs of the next by it."""
    merged = copy.deepcopy(models[0])
    expected = mean([m.state_dict() for m in models])
    merged.load_state_dict(expected)
    with torch.no_grad():
        inputs = [[merged.prefix(x) for x in each] for each in batches]
    for k, block in enumerate(merged.blocks):
        own = [m.blocks[k] for m in models]
        grams = [
            inputs_of(b, lambda b=b, xs=xs: [b(x, 0.7) for x in xs]) for b, xs in zip(own, inputs)
        ]
        for name in grams[0]:
            key = f"blocks.{k}.{name}.weight"
            ws = [m.state_dict()[key] for m in models]
            expected[key] = solve(ws, [g[name] for g in grams], reduce)
        merged.load_state_dict(expected)
        with torch.no_grad():
            inputs = [[block(x, 0.7)[0] for x in each] for each in inputs]
    return expected


@pytest.mark.parametrize("reduce", [1.0, 0.9])
def test_regmean_plus_plus(reduce: float) -> None:
    models, batches = family()
    got = mk.regmean(models, batches, weights=WEIGHTS, reduce=reduce, blocks="blocks")
    assert_states(got, naive_plus_plus(models, batches, reduce))
    named = ["blocks.0", "blocks.1", "blocks.2"]
    again = mk.regmean(models, batches, weights=WEIGHTS, reduce=reduce, blocks=named)
    for key, x in got.state_dict().items():
        assert_bits_equal(again.state_dict()[key], x)


def test_both_fit_the_models_better_than_the_mean() -> None:
    """By what they are for: the outputs of every linear layer, over all models' inputs."""
    models, batches = family()
    average = copy.deepcopy(models[0])
    average.load_state_dict(mean([m.state_dict() for m in models]))
    grams = [inputs_of(m, lambda m=m, b=b: [m(x) for x in b]) for m, b in zip(models, batches)]
    merged = mk.regmean(models, batches, weights=WEIGHTS)

    def lost(model: nn.Module, name: str) -> float:
        own = model.get_submodule(name).weight.detach()
        away = [own - m.get_submodule(name).weight.detach() for m in models]
        return sum(
            w * float(((d @ g) * d).sum())
            for w, d, g in zip(WEIGHTS, away, [g[name] for g in grams])
        )

    for name in grams[0]:
        assert lost(merged, name) <= lost(average, name)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The width of every input whose products are formed."""
    widths: list[int] = []
    update = Covariance.update

    def counting(self: Covariance, x: Any, *given: Any, **named: Any) -> None:
        widths.append(x.shape[-1])
        update(self, x, *given, **named)

    monkeypatch.setattr(Covariance, "update", counting)
    return widths


@pytest.mark.parametrize("blocks", [None, "blocks"])
def test_queries_keys_and_values_are_one_input(
    blocks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, batches = family()
    widths = counted(monkeypatch)
    mk.regmean(models, batches, blocks=blocks)
    each = 3 * [8, 8, 8, 16] + ([] if blocks else [8, 8])
    assert sorted(widths) == sorted(each * len(models) * len(batches[0]))


def test_a_block_is_run_with_its_own_layers_and_the_merged_ones_once() -> None:
    models, batches = family(2)
    calls: list[int] = []
    for model in models:
        for k, block in enumerate(model.blocks):
            block.register_forward_hook(lambda *_, k=k: calls.append(k))
    mk.regmean(models, batches, blocks="blocks")
    # The result is a copy of models[0], with its hooks: a whole pass for each model, and each
    # block but the last for each batch.
    own = [0, 1, 2] * 4
    merged = [0, 1, 2] * 2 + [0, 1] * 4
    assert sorted(calls) == sorted(own + merged)


# ---- edges -----------------------------------------------------------------------------------


def test_several_passes_give_the_bits_of_one() -> None:
    models, batches = family()
    whole = mk.regmean(models, batches).state_dict()
    reads = [0] * 3

    def again(i: int) -> Callable[[], list[Tensor]]:
        def read() -> list[Tensor]:
            reads[i] += 1
            return batches[i]

        return read

    largest = 8 * (2 * 16 + 8) * 16
    got = mk.regmean(models, [again(i) for i in range(3)], memory=largest).state_dict()
    assert reads[0] > 1
    assert reads == reads[:1] * 3
    for key, x in whole.items():
        assert_bits_equal(got[key], x)
    with refused("regmean", "read once only", "list_iterator"):
        mk.regmean(models, [iter(b) for b in batches], memory=largest)
    with refused("regmean", "does not fit memory", f"{largest} or more"):
        mk.regmean(models, batches, memory=largest - 1)


def test_equal_models_stay() -> None:
    (model, *_), batches = family(2)
    for blocks in (None, "blocks"):
        got = mk.regmean([model] * 2, batches, blocks=blocks).state_dict()
        for key, x in model.state_dict().items():
            assert_bits_equal(got[key], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models(dtype: torch.dtype) -> None:
    """A result of their type; few rows, so that something is singular and said."""
    models, batches = family(2)
    models = [m.to(dtype) for m in models]
    short = [[x[:1].to(dtype) for x in b[:1]] for b in batches]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = mk.regmean(models, short)
    assert any("is singular" in str(w.message) for w in told)
    assert all(x.dtype == dtype and x.isfinite().all() for x in got.state_dict().values())


class Tied(nn.Module):
    """An embedding that is a linear layer too, and two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.b.weight, self.head.weight = self.a.weight, self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


def test_tied_weights() -> None:
    """Two layers: the inputs of both. With an embedding: averaged."""
    torch.manual_seed(0)
    models = [Tied().double() for _ in range(2)]
    batches = [[torch.randint(7, (50,))] for _ in range(2)]
    got = mk.regmean(models, batches)
    assert got.b.weight is got.a.weight
    assert got.head.weight is got.words.weight
    means = (models[0].words.weight + models[1].words.weight) / 2
    assert_within(got.words.weight, means, 4 * 2.0**-53 * means.abs())
    grams = []
    for m, (tokens,) in zip(models, batches, strict=True):
        x = m.words(tokens).detach()
        x = torch.cat([x, torch.relu(m.a(x)).detach()])
        grams.append(x.T @ x / len(x))
    ws = [m.a.weight.detach() for m in models]
    expected = torch.linalg.solve(sum(grams), sum(w @ g for w, g in zip(ws, grams)).T).T
    assert_within(got.a.weight, expected, 1e6 * 2.0**-53 * expected.abs().max())


def test_a_layer_that_no_batch_goes_through_is_averaged_and_named() -> None:
    """The out_proj of torch's own attention is no call of a module."""
    torch.manual_seed(0)
    models = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double() for _ in range(2)]
    set_norms(models)
    batches = [[torch.randn(9, 5, 8).double()] for _ in range(2)]
    with pytest.warns(UserWarning, match=r"averaged; got self_attn.out_proj.weight; expected"):
        got = mk.regmean(models, batches)
    a, b = (m.self_attn.out_proj.weight for m in models)
    assert_within(got.self_attn.out_proj.weight, (a + b) / 2, 4 * 2.0**-53 * (a.abs() + b.abs()))


def test_labels_are_left_out() -> None:
    models, batches = family(2)
    labelled = [[(x, torch.zeros(len(x))) for x in b] for b in batches]
    a, b = (mk.regmean(models, x).state_dict() for x in (batches, labelled))
    for key, x in a.items():
        assert_bits_equal(b[key], x)


class Sometimes(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.a, self.b, self.on = nn.Linear(3, 3), nn.Linear(3, 3), on

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) if self.on else self.a(x)


class Jump(nn.Module):
    """Blocks with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(4) for _ in range(2))
        self.between, self.scale = between, scale

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.blocks[0](x, 1.0)
        return self.blocks[1](self.between(x), self.scale)[0]


def test_refusals() -> None:
    models, batches = family(2)
    with refused("regmean", "batches do not fit", "1", "each of 2"):
        mk.regmean(models, batches[:1])
    with refused("regmean", "a model has no batches"):
        mk.regmean(models, [batches[0], []])
    with refused("regmean", "a model has no batches"):
        mk.regmean(models, [batches[0], []], blocks="blocks")
    with refused("regmean", "weights has the wrong length", sentence=False):
        mk.regmean(models, batches, weights=[1.0])
    with refused("regmean", "reduce is out of range"):
        mk.regmean(models, batches, reduce=2)
    with refused("merge_state_dicts", "blocks.2.fc2.weight", sentence=False):
        mk.regmean([models[0], ViT(blocks=2).double()], batches)
    bad = [batches[0], [batches[1][0] * float("nan")]]
    with refused("regmean", "what goes into embed.weight of models[1] cannot be read"):
        mk.regmean(models, bad)
    with refused("regmean", "a.weight is called in some models only", "1 of 2"):
        mk.regmean([Sometimes(False), Sometimes(True)], [[torch.randn(9, 3)]] * 2)
    with refused("regmean", "blocks name no module", "'layers'"):
        mk.regmean(models, batches, blocks="layers")
    with refused("regmean", "there are no blocks"):
        mk.regmean(models, batches, blocks="norm")
    with refused("regmean", "blocks are called otherwise"):
        mk.regmean(models, batches, blocks=["blocks.1", "blocks.0"])


@pytest.mark.parametrize(("between", "scale"), [(lambda x: x + 1, 1.0), (lambda x: x, 0.5)])
def test_blocks_that_do_not_follow_one_another(
    between: Callable[[Tensor], Tensor], scale: float
) -> None:
    models, batches = [Jump(between, scale) for _ in range(2)], [[torch.randn(9, 5, 4)]] * 2
    with refused("regmean", "block blocks.1 takes something else than the output of blocks.0"):
        mk.regmean(models, batches, blocks="blocks")
