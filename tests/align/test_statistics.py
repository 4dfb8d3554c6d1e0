"""collect_statistics: the moments of what the models' features really are, over all batches."""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import mergekern as mk
from mergekern import ArgumentError
from mergekern.align.spaces import Probe, Space, Spaces
from mergekern.align.statistics.collect import collect_statistics
from mergekern.align.statistics.statistics import Statistics

from accuracy import assert_bytes_equal, assert_within
from align.nets import (
    Attention,
    Convs,
    Mlp,
    attention_spaces,
    convs_spaces,
    each,
    mlp_spaces,
    seeded,
)
from refusal import refused

OP = "collect_statistics"
SHAPES: dict[type[nn.Module], tuple[int, ...]] = {
    Mlp: (5,),
    Convs: (3, 4, 4),
    Attention: (7, 5),
}
SPACES: dict[type[nn.Module], Callable[..., Spaces]] = {
    Mlp: mlp_spaces,
    Convs: convs_spaces,
    Attention: attention_spaces,
}


def inputs(kind: type[nn.Module], sizes: tuple[int, ...] = (16, 16, 9)) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, *SHAPES[kind], generator=g) for n in sizes]


def named(batches: list[Tensor], kind: type[nn.Module]) -> list[Any]:
    """As the example inputs of the spaces are."""
    return [{"x": x} for x in batches] if kind is Attention else list(batches)


def trained(kind: type[nn.Module], count: int = 2) -> list[nn.Module]:
    return [seeded(kind, seed).eval() for seed in range(count)]


def collected(kind: type[nn.Module], count: int = 2, **options: Any) -> Statistics:
    models = trained(kind, count)
    return collect_statistics(models, named(inputs(kind), kind), SPACES[kind](), **options)


# ---- what the features are, by plain torch -----------------------------------------------------


@torch.no_grad()
def seen(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Rows of the features of every space, as its probes read them."""
    if isinstance(model, Mlp):
        one = torch.relu(model.fc1(x))
        return {"one": one, "two": torch.relu(model.fc2(one))}
    if isinstance(model, Convs):
        stream = torch.relu(model.bn(model.stem(x)))
        inner = torch.relu(model.bn1(model.conv1(stream)))
        stream = torch.relu(model.bn2(model.conv2(inner)) + stream)
        pooled = torch.nn.functional.avg_pool2d(stream, 2)
        return {
            k: v.movedim(1, -1).reshape(-1, v.shape[1])
            for k, v in {"stream": pooled, "inner": inner}.items()
        }
    assert isinstance(model, Attention)
    x = model.embed(x)
    q, k, v = model.qkv(x).flatten(0, 1).split(12, -1)
    return {"stream": x.flatten(0, 1), "keys": torch.cat([q, k]), "values": v}


def rows(models: list[nn.Module], x: Tensor) -> dict[str, Tensor]:
    found = [seen(m, x) for m in models]
    return {name: torch.cat([f[name] for f in found], -1) for name in found[0]}


def check_covariance(got: Tensor, x: Tensor, y: Tensor) -> None:
    """Within the bound of `covariance`, of features that may themselves differ in the last bits."""
    a, b = (v.double() - v.double().mean(0) for v in (x, y))
    n, spread = len(x), torch.outer(a.square().mean(0).sqrt(), b.square().mean(0).sqrt())
    largest = torch.outer(x.abs().amax(0), y.abs().amax(0)).double()
    assert_within(got, a.T @ b / n, 264 * 2**-24 * spread + (2 * n + 128) * 2**-53 * largest)


@pytest.mark.parametrize("kind", SHAPES, ids=lambda k: k.__name__)
def test_the_hand_written_spaces_are_right(kind: type[nn.Module]) -> None:
    model = trained(kind)[0]
    assert SPACES[kind]().verify(model, named(inputs(kind), kind)[0]).exact


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", SHAPES, ids=lambda k: k.__name__)
def test_moments_are_of_what_the_features_are(
    kind: type[nn.Module], count: int, within: bool
) -> None:
    stats = collected(kind, count, within=within)
    expected = rows(trained(kind, count), torch.cat(inputs(kind)))
    assert list(stats.covariances) == list(expected)
    for name, x in expected.items():
        size = stats.spaces[name].size
        assert stats.count(name) == len(x)
        got = stats.covariances[name].covariance()
        sides = (x, x) if within else (x[:, :size], x[:, size:])
        check_covariance(got, *sides)
        whole = stats.correlation(name)
        for i in range(1, count):
            start = i * size if within else (i - 1) * size
            block = stats.between(whole, i)
            assert_bytes_equal(block, whole[:size, start : start + size])


def test_within_holds_between_as_well() -> None:
    both, cross = (collected(Mlp, 3, within=w) for w in (True, False))
    for name in both.covariances:
        for i in (1, 2):
            a, b = (s.between(s.correlation(name), i) for s in (both, cross))
            assert_within(a, b, torch.tensor(2 * 264 * 2**-24 * 2))


def test_all_probes_are_more_rows() -> None:
    last, every = (collected(Convs, probes=p) for p in ("last", "all"))
    assert last.count("stream") == 41 * 4
    assert every.count("stream") == 41 * (4 + 16)
    assert last.count("inner") == every.count("inner") == 41 * 16


class Twice(nn.Module):
    """One value goes into two layers, the sum of their results into a third."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + torch.relu(self.a(x)) * torch.sigmoid(self.b(x)))


def test_a_value_that_several_layers_read_counts_once() -> None:
    models = trained(Twice)
    spaces = mk.discover_spaces(models[0], torch.zeros(2, 5))
    (stream,) = spaces.movable.values()
    assert [p.module for p in stream.probes] == ["a", "b", "head"]
    for probes, rows in (("all", 2 * 41), ("last", 41)):
        got = collect_statistics(models, inputs(Mlp), spaces, probes=probes)
        assert got.count(stream.name) == rows


def test_queries_and_keys_both_count() -> None:
    assert collected(Attention).count("keys") == 2 * 41 * 7
    assert collected(Attention).count("values") == 41 * 7


# ---- outputs of layers, for REPAIR -------------------------------------------------------------


class Biased(nn.Module):
    """Convolutions with and without a bias, one of them depthwise, and no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.plain = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point, self.fc = nn.Conv2d(6, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.plain(torch.relu(self.stem(x))))
        x = torch.relu(self.point(torch.relu(self.depthwise(x))))
        return self.fc(x.mean((2, 3)))


class Normed(nn.Module):
    """BatchNorm as a call of a function: no module that has statistics to reset."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.batch_norm(self.conv(x), self.mean, self.variance)
        return self.fc(torch.relu(x).mean((2, 3)))


LAYERS: dict[type[nn.Module], list[str]] = {
    Mlp: ["fc1", "fc2"],
    Attention: ["embed", "qkv", "out"],
    Convs: [],  # BatchNorm is reset
    Biased: ["stem", "point"],  # a depthwise one makes no features, it keeps them
    Normed: ["conv"],
}


@pytest.mark.parametrize("kind", LAYERS, ids=lambda k: k.__name__)
def test_outputs_of_layers_have_mean_and_variance(kind: type[nn.Module]) -> None:
    models, xs = trained(kind), images(kind)
    spaces = SPACES[kind]() if kind in SPACES else mk.discover_spaces(models[0], xs[0])
    stats = collect_statistics(models, named(xs, kind), spaces)
    for layer, (node, moments) in zip(LAYERS[kind], stats.outputs.items(), strict=True):
        for model, found in zip(models, moments, strict=True):
            _, y = call_of(model, layer, xs)
            exact = y.double()
            n, largest = len(y), y.abs().amax(0).double()
            spread = exact.var(0, correction=0)
            assert found.rows == n, node
            assert_within(found.mean, exact.mean(0), (2 * n + 4) * 2.0**-53 * largest)
            bound = 264 * 2**-24 * spread + (2 * n + 128) * 2**-53 * largest**2
            assert_within(found.variance, spread, bound)


def images(kind: type[nn.Module]) -> list[Tensor]:
    """Of each kind what it takes."""
    return inputs(kind) if kind in SHAPES else inputs(Convs)


def call_of(model: nn.Module, layer: str, xs: list[Tensor]) -> list[Tensor]:
    """Rows of what a layer takes and returns, for all batches."""
    found: list[tuple[Tensor, Tensor]] = []
    look = model.get_submodule(layer).register_forward_hook(lambda m, x, y: found.append((*x, y)))
    with torch.no_grad():
        for x in xs:
            model(x)
    look.remove()
    each = [torch.cat(v) for v in zip(*found, strict=True)]
    each = [v.movedim(1, -1) if v.ndim == 4 else v for v in each]
    return [v.reshape(-1, v.shape[-1]) for v in each]


@pytest.mark.parametrize("side", [1, 2, 7])
def test_maps_around_a_depthwise_convolution(side: int) -> None:
    """Also of one pixel; every channel of both models in its place."""
    models, g = trained(Biased), torch.Generator().manual_seed(1)
    xs = [torch.randn(n, 3, side, side, generator=g) for n in (40, 23)]
    stats = collect_statistics(models, xs, mk.discover_spaces(models[0], xs[0]))
    for space, reader in (("stem", "plain"), ("plain", "point")):
        assert stats.spaces[space].probes[-1].module == reader
        x = torch.cat([call_of(model, reader, xs)[0] for model in models], -1)
        assert stats.count(space) == len(x) == 63 * side**2
        check_covariance(stats.covariances[space].covariance(), x, x)


# ---- batches -----------------------------------------------------------------------------------


def test_batches_may_be_pairs_mappings_loaders_and_callables() -> None:
    models, expected = trained(Mlp), collected(Mlp)
    spaces = mlp_spaces()
    xs = inputs(Mlp)
    pairs = [(x, torch.zeros(len(x))) for x in xs]
    data = torch.utils.data.TensorDataset(torch.cat(xs), torch.zeros(41))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    for batches in (pairs, [list(p) for p in pairs], iter(xs), lambda: iter(xs), loader):
        got = collect_statistics(models, batches, spaces)
        for name in spaces:
            assert_bytes_equal(got.correlation(name), expected.correlation(name))


def test_labels_in_a_mapping_are_left_out() -> None:
    models = trained(Attention)
    batches = [{"x": x, "labels": torch.zeros(len(x))} for x in inputs(Attention)]
    got = collect_statistics(models, batches, attention_spaces())
    for name in got.spaces:
        assert_bytes_equal(got.correlation(name), collected(Attention).correlation(name))


def test_a_batch_of_one_counts() -> None:
    models = trained(Convs)
    got = collect_statistics(models, inputs(Convs, (16, 1, 1)), convs_spaces())
    assert got.count("inner") == 18 * 16


def test_several_passes_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def folders() -> list[Path]:
        return list(tmp_path.glob("mergekern-statistics-*"))

    expected, models = collected(Mlp), trained(Mlp)
    looked: list[int] = []

    def batches() -> Iterator[Tensor]:
        looked.append(1)
        yield from inputs(Mlp)

    got = collect_statistics(models, batches, mlp_spaces(), memory=8 * 16**2)
    assert len(looked) == 2
    for name in got.spaces:
        assert_bytes_equal(got.correlation(name), expected.correlation(name))
    for node, moments in got.outputs.items():
        for a, b in zip(moments, expected.outputs[node], strict=True):
            assert a.rows == b.rows == 41
            assert_bytes_equal(a.variance, b.variance)
    assert list(got.covariances) == ["one", "two"]
    assert len(folders()) == 2
    got.save(tmp_path / "s.safetensors")
    back = Statistics.load(tmp_path / "s.safetensors", mlp_spaces(), models)
    assert_bytes_equal(back.correlation("two"), expected.correlation("two"))
    del got
    gc.collect()
    assert not folders()


def test_nothing_is_left_behind_by_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rounds: list[int] = []

    def batches() -> Iterator[Tensor]:
        rounds.append(len(list(tmp_path.iterdir())))
        yield from inputs(Mlp) if len(rounds) == 1 else ()

    with refused(OP, "there are no batches"):
        collect_statistics(trained(Mlp), batches, mlp_spaces(), memory=8 * 16**2)
    assert rounds == [0, 1]
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_accumulators_that_are_done_leave_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start of a pass there are none but its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alive: list[int] = []

    def batches() -> Iterator[Tensor]:
        gc.collect()
        of_spaces = [o for o in gc.get_objects() if type(o) is mk.Covariance]
        alive.append(sum(c._dims() in ([16], [12]) for c in of_spaces))
        yield from inputs(Mlp)

    collect_statistics(trained(Mlp), batches, mlp_spaces(), memory=8 * 16**2)
    assert alive == [1, 1]


def test_training_mode_and_gradients_are_left_as_they_were() -> None:
    models = [m.train() for m in trained(Convs)]
    before = {k: x.clone() for k, x in models[0].state_dict().items()}
    spaces = convs_spaces()
    got = collect_statistics(models, inputs(Convs), spaces)
    assert all(m.training for model in models for m in model.modules())
    for key, x in models[0].state_dict().items():
        assert_bytes_equal(x, before[key])
    assert_bytes_equal(got.correlation("inner"), collected(Convs).correlation("inner"))


# ---- masks -------------------------------------------------------------------------------------


def padding() -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [
        torch.arange(7) < torch.randint(1, 8, (len(x), 1), generator=g) for x in inputs(Attention)
    ]


@pytest.mark.parametrize("by_name", [True, False])
def test_rows_of_padding_do_not_count(by_name: bool) -> None:
    models = trained(Attention)
    spaces = attention_spaces(masked=True)
    batches = [
        {"x": x, "attention_mask": m.float()}
        for x, m in zip(inputs(Attention), padding(), strict=True)
    ]
    mask: Any = "attention_mask" if by_name else lambda batch: batch["attention_mask"] > 0
    got = collect_statistics(models, batches, spaces, mask=mask)
    kept = torch.cat(padding()).flatten()
    expected = rows(models, torch.cat(inputs(Attention)))
    for name, x in expected.items():
        chosen = x[kept.repeat(len(x) // len(kept))]
        assert got.count(name) == len(chosen)
        check_covariance(got.covariances[name].covariance(), chosen, chosen)


class Transposed(nn.Module):
    """Tokens first inside, batch second; then flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.fc1(x.transpose(0, 1)))
        return self.fc2(y.reshape(-1, 4)).mean(0, keepdim=True)


def test_a_mask_follows_the_order_of_the_rows() -> None:
    """As many samples as tokens, so a mask in the wrong order would fit."""
    from mergekern.align.tracing.program import Program

    models = trained(Transposed)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 7, 5, generator=g)
    marks = torch.arange(7) < torch.arange(1, 8)[:, None]
    program = Program(models[0], torch.zeros(2, 7, 5), "spaces")
    probe = Probe("linear_1", 0, (1,), each(4), "fc2")
    spaces = Spaces([Space("hidden", 4, (), (probe,))], program)
    got = collect_statistics(models, [x], spaces, mask=lambda batch: marks)
    with torch.no_grad():
        features = torch.cat([torch.relu(m.fc1(x)) for m in models], -1)[marks]
    assert got.count("hidden") == 28
    check_covariance(got.covariances["hidden"].covariance(), features, features)


def test_masks_that_do_not_fit_are_refused() -> None:
    models = trained(Attention)
    spaces = attention_spaces()
    batch = named(inputs(Attention), Attention)[:1]
    with refused(OP, "mask names no input"):
        collect_statistics(models, batch, spaces, mask="attention_mask")
    for mask, words in (
        (torch.ones(16, 7), "none of tokens"),
        (torch.ones(16, dtype=torch.bool), "none of tokens"),
        (torch.ones(16, 6, dtype=torch.bool), "'embed'"),
    ):
        with refused(OP, "mask", words):
            collect_statistics(models, batch, spaces, mask=lambda _, mask=mask: mask)


# ---- refusals ----------------------------------------------------------------------------------


def test_arguments_that_are_refused() -> None:
    models, xs = trained(Mlp), inputs(Mlp)
    spaces = mlp_spaces()
    for words, call in (
        ("probes is unknown", {"probes": "first"}),
        ("got 100; expected 2048 bytes", {"memory": 100}),
        ("space one of 8 features in 2 models", {"memory": 100}),
    ):
        with refused(OP, words):
            collect_statistics(models, xs, spaces, **call)
    with refused("covariance", "nan is unknown"):
        collect_statistics(models, xs, spaces, nan="ignore")
    with refused(OP, "nothing to compare"):
        collect_statistics(models[:1], xs, spaces)
    with refused(OP, "there are no batches"):
        collect_statistics(models, [], spaces)
    with refused(OP, "there are no batches", "not read before"):
        used = iter(xs)
        list(used)
        collect_statistics(models, used, spaces)
    with refused(OP, "there are no inputs", "got int"):
        collect_statistics(models, [3], spaces)
    with refused(OP, "space lonely is read nowhere"):
        lonely = Spaces([*spaces.values(), Space("lonely", 3, ())], spaces.program)
        collect_statistics(models, xs, lonely)


def test_an_iterator_for_several_passes_is_refused_before_it_is_read() -> None:
    models, batches = trained(Mlp), iter(inputs(Mlp))
    with refused(OP, "batches can be read once only", "2 passes"):
        collect_statistics(models, batches, mlp_spaces(), memory=8 * 16**2)
    assert len(list(batches)) == 3


def test_fixed_spaces_are_left_alone() -> None:
    models = trained(Mlp)
    spaces = mlp_spaces()
    fixed = Space("input", 5, (), fixed="it is the input")
    got = collect_statistics(models, inputs(Mlp), Spaces([fixed, *spaces.values()], spaces.program))
    assert list(got.covariances) == ["one", "two"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_with_model_and_module(value: float) -> None:
    models = trained(Mlp)
    with torch.no_grad():
        models[1].fc2.bias[0] = value
    spaces = mlp_spaces()
    with refused(OP, "models[1] has NaN or infinite activations", "'fc2'", "16 such rows"):
        collect_statistics(models, inputs(Mlp), spaces)
    zero = collect_statistics(models, inputs(Mlp), spaces, nan="zero")
    assert zero.dead("two") == [0, 1] or zero.dead("two")[1] >= 1
    assert zero.correlation("two").isfinite().all()


def test_models_of_another_architecture_are_refused() -> None:
    models = trained(Mlp)
    spaces = mlp_spaces()

    class Deeper(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    class Wider(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.fc2, self.fc3 = nn.Linear(8, 7), nn.Linear(7, 3)

    class Otherwise(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    class Longer(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x)] * 2)

    for kind, words in (
        (Deeper, ("another architecture", "got extra.bias [2]; expected no extra.bias")),
        (Wider, ("another architecture", "got fc2.weight [7, 8]; expected fc2.weight [6, 8]")),
        (Convs, ("another architecture", "got bn.bias [4]; expected no bn.bias")),
        (Otherwise, ("computes something else", "apart")),
        (Longer, ("computes something else", "outputs [[4, 3]]")),
    ):
        with refused(OP, "models[1]", *words):
            collect_statistics([models[0], seeded(kind, 3)], inputs(Mlp), spaces)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: there is no GPU")
def test_another_device_is_refused() -> None:
    models = trained(Mlp)
    spaces = mlp_spaces()
    with refused(OP, "batch is on another device"):
        collect_statistics(models, [x.cuda() for x in inputs(Mlp)], spaces)


def test_meta_devices_stand_for_other_ones() -> None:
    models = trained(Mlp)
    spaces = mlp_spaces()
    with refused(OP, "a batch is on another device", "got meta"):
        collect_statistics(models, [x.to("meta") for x in inputs(Mlp)], spaces)
    with refused(OP, "fc1.weight of models[1] is on another device", "got meta"):
        collect_statistics([models[0], models[1].to("meta")], inputs(Mlp), spaces)


# ---- results -----------------------------------------------------------------------------------


def test_dead_features_are_counted_and_correlate_with_none() -> None:
    models = trained(Mlp)
    with torch.no_grad():
        models[0].fc1.bias[2] = models[1].fc1.bias[:2] = -1e6
    for within in (True, False):
        got = collect_statistics(models, inputs(Mlp), mlp_spaces(), within=within)
        alive = [(torch.relu(m.fc1(torch.cat(inputs(Mlp)))) > 0).any(0) for m in models]
        assert got.dead("one") == [int((~a).sum()) for a in alive]
        assert min(got.dead("one")) >= 1
        assert (got.between(got.correlation("one"), 1)[2] == 0).all()


def test_an_unknown_space_is_refused() -> None:
    with refused("statistics", "space is unknown", "one, two"):
        collected(Mlp).correlation("three")


@pytest.mark.parametrize("within", [True, False])
def test_saved_statistics_come_back(within: bool, tmp_path: Path) -> None:
    path, models = tmp_path / "s.safetensors", trained(Convs)
    stats = collected(Convs, within=within)
    stats.save(path)
    got = Statistics.load(path, convs_spaces(), models)
    assert (got.within, got.fingerprints) == (within, stats.fingerprints)
    assert list(got.covariances) == list(stats.covariances)
    for name in stats.covariances:
        assert got.count(name) == stats.count(name)
        assert_bytes_equal(got.correlation(name), stats.correlation(name))
    assert list(got.outputs) == list(stats.outputs)
    for node, moments in stats.outputs.items():
        for a, b in zip(got.outputs[node], moments, strict=True):
            assert a.rows == b.rows
            assert_bytes_equal(a.mean, b.mean)
            assert_bytes_equal(a.variance, b.variance)


def test_statistics_of_others_are_refused(tmp_path: Path) -> None:
    path, models = tmp_path / "s.safetensors", trained(Mlp)
    spaces = mlp_spaces()
    collected(Mlp).save(path)
    other = seeded(Mlp, 9)
    digits = re.compile(r"got SHA-256 [0-9a-f]{12}; expected [0-9a-f]{12}")
    with refused("Statistics.load", "models[1] is not the one"):
        Statistics.load(path, spaces, [models[0], other])
    with pytest.raises(ArgumentError, match=digits):
        Statistics.load(path, spaces, [models[1], models[0]])
    with refused("Statistics.load", "got 1 models"):
        Statistics.load(path, spaces, models[:1])
    with torch.no_grad():
        models[1].fc3.bias[0] += 1e-6
    with refused("Statistics.load", "models[1]"):
        Statistics.load(path, spaces, models)
    narrower = Spaces([spaces["one"]], spaces.program)
    with refused("Statistics.load", "of other spaces"):
        Statistics.load(path, narrower)
    save_file(dict(load_file(path).items()), tmp_path / "plain.safetensors")
    with refused("Statistics.load", "no statistics"):
        Statistics.load(tmp_path / "plain.safetensors", spaces)


def test_progress_is_shown_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    collected(Mlp, progress=True)
    shown = capsys.readouterr()
    assert "statistics, pass 1 of 1" in shown.err
    assert not shown.out
