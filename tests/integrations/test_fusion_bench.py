"""The FusionBench drop-ins: FusionBench's own results, bit for bit where both compute in float32.

Each test runs FusionBench's class and ours on copies of one pool and one seed; `calls` proves that
ours was computed by mergekern's ops.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekern import BackendError
from mergekern.integrations import fusion_bench as dropin
from mergekern.integrations.fusion_bench import vectors

from accuracy import assert_bits_equal, assert_within, half_ulp
from refusal import refused
from required import peer
from serving import Calls

host = peer("fusion_bench", "fusion-bench")
peer("fusion_bench.method.emr_merging", "fusion-bench")

U = 2.0**-24
NAMES = ("_pretrained_", "a", "b", "c")
TIES = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
DARE = {"scaling_factor": 0.3, "sparsity_ratio": 0.6, "only_on_linear_weights": False}

State = dict[str, Tensor]


def theirs(name: str) -> type:
    return getattr(importlib.import_module(f"fusion_bench.method.{dropin._CLASSES[name][1]}"), name)


def ours(name: str) -> type:
    return getattr(dropin, name)


class MLP(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(13, 31)
        self.norm = nn.BatchNorm1d(31) if norm else nn.LayerNorm(31)
        self.last = nn.Linear(31, 7, bias=False)
        self.filters = nn.Conv2d(5, 5, 3, groups=5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x))) * self.scale


def plain(shape: torch.Size, g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g)


def coarse(shape: torch.Size, g: torch.Generator) -> Tensor:
    """Multiples of 1/4: equal magnitudes, zeros and exact cancellation."""
    return torch.randint(-3, 4, shape, generator=g) / 4


def models(
    fill: Callable[..., Tensor] = plain,
    dtype: torch.dtype = torch.float32,
    norm: bool = False,
    n: int = 3,
) -> dict[str, nn.Module]:
    """A base and n models beside it."""
    g = torch.Generator().manual_seed(0)
    base = MLP(norm)
    for p in base.parameters():
        p.data = fill(p.shape, g)
    made = {"_pretrained_": base}
    for i in range(n):
        model = made[chr(ord("a") + i)] = copy.deepcopy(base)
        for p in model.parameters():
            p.data = p.data + fill(p.shape, g)
    return {name: model.to(dtype) for name, model in made.items()}


def run(cls: type, pool: Mapping[str, nn.Module], **parameters: Any) -> Any:
    """The result of a class on a copy of the pool, under one seed."""
    torch.manual_seed(5)
    return cls(**parameters).run(host.BaseModelPool(copy.deepcopy(dict(pool))))


def both(name: str, pool: Mapping[str, nn.Module], **parameters: Any) -> tuple[State, State]:
    result = run(theirs(name), pool, **parameters).state_dict()
    after = torch.get_rng_state()
    own = run(ours(name), pool, **parameters).state_dict()
    assert torch.equal(torch.get_rng_state(), after)
    assert own.keys() == result.keys()
    return own, result


def assert_same(got: State, expected: State) -> None:
    for key, value in expected.items():
        assert_bits_equal(got[key], value)


# ---- the classes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", dropin._CLASSES)
def test_a_class_is_a_subclass_with_the_same_constructor(name: str) -> None:
    assert issubclass(ours(name), theirs(name))
    assert ours(name) is ours(name)
    assert ours(name).__name__ == name
    assert inspect.signature(ours(name)) == inspect.signature(theirs(name))
    assert ours(name).run is not theirs(name).run
    assert name in dir(dropin)


def test_hydra_finds_a_class_by_its_path(calls: Calls) -> None:
    instantiate = importlib.import_module("hydra.utils").instantiate
    target = "mergekern.integrations.fusion_bench.TaskArithmeticAlgorithm"
    algorithm = instantiate({"_target_": target, "scaling_factor": 0.5})
    result = algorithm.run(host.BaseModelPool(models()))
    expected = run(theirs("TaskArithmeticAlgorithm"), models(), scaling_factor=0.5)
    assert_same(result.state_dict(), expected.state_dict())
    assert ("cpu", "merge_deltas") in calls or ("torch", "merge_deltas") in calls


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchAlgorithm"):
        _ = dropin.NoSuchAlgorithm


def test_without_fusion_bench_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(vars(dropin), "ModelStock", raising=False)
    monkeypatch.setitem(sys.modules, "fusion_bench", None)
    for name in [m for m in sys.modules if m.startswith("fusion_bench.")]:
        monkeypatch.delitem(sys.modules, name)
    with refused("fusion_bench", "pip install", error=BackendError, sentence=False):
        _ = dropin.ModelStock


def test_importing_it_does_not_import_fusion_bench() -> None:
    code = (
        "import sys, mergekern.integrations.fusion_bench as f; print('fusion_bench' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- the same bits in float32 ----------------------------------------------------------------

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SimpleAverageAlgorithm", {}),
    ("WeightedAverageAlgorithm", {"normalize": False, "weights": [0.3, -0.5, 0.9]}),
    ("WeightedAverageAlgorithm", {"normalize": True, "weights": [0.3, 0.5, 0.9]}),
    ("TaskArithmeticAlgorithm", {"scaling_factor": 0.3}),
    *(
        ("TiesMergingAlgorithm", TIES | {"merge_func": f, "threshold": k})
        for f in ("sum", "mean", "max", "dis-mean")
        for k in (20, 0.2, 50, 0, 99)
    ),
    ("DareTaskArithmetic", DARE),
    ("DareTaskArithmetic", DARE | {"rescale": False}),
    ("DareTaskArithmetic", DARE | {"only_on_linear_weights": True}),
    ("DareTaskArithmetic", DARE | {"sparsity_ratio": 0.0}),
    *(
        ("DareTiesMerging", DARE | TIES | {"rescale": True, "merge_func": f, "threshold": k})
        for f in ("sum", "mean", "max")
        for k in (20, 90)
    ),
    ("DareTiesMerging", DARE | TIES | {"rescale": False, "only_on_linear_weights": True}),
]


def positive_zeros(state: State) -> State:
    """FusionBench multiplies by 0 what it drops, so its zeros have either sign."""
    return {name: x + 0.0 for name, x in state.items()}


@pytest.mark.parametrize("fill", [plain, coarse])
@pytest.mark.parametrize(
    ("name", "parameters"), CASES, ids=lambda p: p if isinstance(p, str) else ""
)
def test_bits(
    name: str, parameters: dict[str, Any], fill: Callable[..., Tensor], calls: Calls
) -> None:
    got, expected = both(name, models(fill), **parameters)
    assert_same(positive_zeros(got), positive_zeros(expected))
    assert "merge_deltas" in {op for _, op in calls}


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("merge_func", ["sum", "mean", "max"])
def test_bits_of_ties_for_other_numbers_of_models(n: int, merge_func: str) -> None:
    pool = models(coarse, n=n)
    got, expected = both("TiesMergingAlgorithm", pool, **TIES | {"merge_func": merge_func})
    assert_same(positive_zeros(got), positive_zeros(expected))


class One(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


@pytest.mark.parametrize("merge_func", ["sum", "mean", "max"])
@pytest.mark.parametrize("others", [[1.0, 2.0, 3.0], [-1.0, -2.0, 3.0], [-1.0, 1.0, 3.0]])
def test_a_tied_vote_takes_the_sign_of_the_majority(others: list[float], merge_func: str) -> None:
    """Element 0 cancels exactly; the other sums elect +, - or, as many of each, neither."""
    last = 3.0 if others[0] > 0 else -3.0
    a, b = [4.0, *others[:2], last, 0.5], [-4.0, *others[:2], last, -0.5]
    if others == [-1.0, 1.0, 3.0]:
        a, b = [4.0, -1.0, 1.0], [-4.0, -1.0, 1.0]
    pool = {"_pretrained_": One([0.0] * len(a)), "a": One(a), "b": One(b)}
    got, expected = both(
        "TiesMergingAlgorithm", pool, **TIES | {"merge_func": merge_func, "threshold": 60}
    )
    assert_same(positive_zeros(got), positive_zeros(expected))


def test_how_many_are_kept() -> None:
    """FusionBench keeps int(K d) + 1 and all ties: of 1 to 1000, K = 20 keeps 201."""
    values = [float(i + 1) for i in range(1000)]
    pool = {"_pretrained_": One([0.0] * 1000), "a": One(values)}
    got, expected = both("TiesMergingAlgorithm", pool, **TIES)
    assert int((got["w"] != 0).sum()) == 201
    assert_same(got, expected)


@pytest.mark.parametrize("threshold", [1, 1.0, 100])
def test_a_threshold_that_keeps_everything(
    threshold: float, caplog: pytest.LogCaptureFixture
) -> None:
    """FusionBench raises; here nothing is trimmed, and the log says so."""
    pool = models()
    with pytest.raises(RuntimeError):
        run(theirs("TiesMergingAlgorithm"), pool, **TIES | {"threshold": threshold})
    with caplog.at_level(logging.WARNING):
        got = run(ours("TiesMergingAlgorithm"), pool, **TIES | {"threshold": threshold})
    assert "keeps everything" in caplog.text
    base, *states = (m.state_dict() for m in pool.values())
    for key, value in got.state_dict().items():
        taus = torch.stack([s[key] - base[key] for s in states])
        agree = torch.where(taus.sum(0) > 0, taus > 0, taus < 0)
        merged = torch.zeros_like(value)
        for tau, mask in zip(taus, agree):
            merged = merged + torch.where(mask, tau, 0)
        assert_bits_equal(value, base[key] + 0.3 * merged)


def test_the_threshold_is_that_of_the_whole_model() -> None:
    """Against a sort of the flat vector, for each rank, with ties, zeros and NaN."""
    g = torch.Generator().manual_seed(0)
    pairs = [(coarse(torch.Size(s), g), coarse(torch.Size(s), g)) for s in [(7,), (3, 5), (), (0,)]]
    pairs.append((torch.tensor([math.nan, 1e30]), torch.zeros(2)))
    for dtype in (torch.float32, torch.float64):
        typed = [(x.to(dtype), b.to(dtype)) for x, b in pairs]
        size = torch.cat([(x - b).abs().reshape(-1) for x, b in typed])
        order = size.sort(descending=True).values  # NaN first
        for rank in range(1, len(order) + 1):
            found = vectors.global_threshold(lambda typed=typed: iter(typed), rank)
            assert found.value == order[rank - 1] or found.value != found.value
            assert (found.value != found.value) == (rank == 1)
            assert found.cut == len(order)
            if rank > 1:
                assert found.above == int((~(size <= found.value)).sum())
                assert found.equal == int((size == found.value).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_majority_sees_differences_of_half_a_unit(dtype: torch.dtype) -> None:
    """Models one unit beside the base, tiny, huge or of the other sign, at every scale."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(4000, generator=g) * 10 ** (20 * torch.rand(4000, generator=g) - 10)
    base[::3] = torch.exp2(base[::3].log2().nan_to_num(0).round())  # units change at powers of 2
    base[::7] = 0
    base = base.to(dtype)
    up = torch.nextafter(base, torch.tensor(math.inf, dtype=dtype))
    down = torch.nextafter(base, torch.tensor(-math.inf, dtype=dtype))
    kinds = torch.stack([base, up, down, -base, base * 1e-30, base * 1e6, 2 * base])
    for n in (1, 2, 3):
        pick = torch.randint(len(kinds), (n, 4000), generator=g)
        xs = [kinds.gather(0, p[None])[0] for p in pick]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = torch.zeros(4000, dtype=wide)
        for x in xs:
            total += x.to(wide) - base.to(wide)
        expected = int((total > 0).sum()) - int((total < 0).sum())
        entry = vectors.Entry("w", base, xs, [None] * n)
        assert vectors.majority([entry], dtype, None) == expected


# ---- narrow types ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SimpleAverageAlgorithm", {}),
        ("WeightedAverageAlgorithm", {"normalize": True, "weights": [0.3, 0.5, 0.9]}),
        ("TaskArithmeticAlgorithm", {"scaling_factor": 0.3}),
    ],
)
def test_16_bit_models_are_rounded_once(
    name: str, parameters: dict[str, Any], dtype: torch.dtype
) -> None:
    """Within half a unit of the float64 result (and float32's rounding), so never behind."""
    pool = models(dtype=dtype)
    got, expected = both(name, pool, **parameters)
    base, *states = (m.state_dict() for m in pool.values())
    weights = [w / 1.7 for w in (0.3, 0.5, 0.9)] if "weights" in parameters else [1 / 3] * 3
    errors = [0.0, 0.0]
    for key in got:
        xs = [s[key].double() for s in states]
        exact = sum(w * x for w, x in zip(weights, xs))
        size = sum(x.abs() for x in xs)
        if "scaling_factor" in parameters:
            origin = base[key].double()
            exact = origin + 0.3 * sum(x - origin for x in xs)
            size = 4 * origin.abs() + size
        assert isinstance(exact, Tensor)
        assert_within(got[key], exact, half_ulp(exact, dtype) * (1 + 1e-3) + 8 * U * size)
        for i, state in enumerate((got, expected)):
            errors[i] += float((state[key].double() - exact).abs().sum())
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("merge_func", ["sum", "mean", "max"])
def test_bits_of_ties_of_coarse_16_bit_models(merge_func: str) -> None:
    """Where no difference has to be rounded, FusionBench's bits in 16-bit models as well."""
    pool = models(coarse, dtype=torch.bfloat16)
    parameters = TIES | {"merge_func": merge_func, "scaling_factor": 0.5}
    got, expected = both("TiesMergingAlgorithm", pool, **parameters)
    if merge_func == "mean":  # its quotient is rounded twice there
        base = pool["_pretrained_"].state_dict()
        for key, value in expected.items():
            error = half_ulp(value, torch.bfloat16) * 4 + half_ulp(base[key], torch.bfloat16) * 4
            assert_within(got[key], value.double(), error)
    else:
        assert_same(positive_zeros(got), positive_zeros(expected))


# ---- buffers, shapes, names ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [CASES[0], CASES[1], CASES[3], CASES[4], ("DareTaskArithmetic", DARE)],
)
def test_equal_integers_are_copied(name: str, parameters: dict[str, Any]) -> None:
    pool = models(norm=True)
    for model in pool.values():
        model.norm.num_batches_tracked.fill_(2**24 + 1)  # no float32
    got = run(ours(name), pool, **parameters).state_dict()
    assert_bits_equal(got["norm.num_batches_tracked"], torch.tensor(2**24 + 1))
    if "Dare" not in name:
        got.pop("norm.num_batches_tracked")
        expected = run(theirs(name), pool, **parameters).state_dict()
        assert_same(positive_zeros(got), {k: positive_zeros(expected)[k] for k in got})


def test_integers_that_differ_are_averaged_and_cut_off() -> None:
    pool = models(norm=True)
    for i, model in enumerate(pool.values()):
        model.norm.num_batches_tracked.fill_(10 * i)
    pool["c"].norm.num_batches_tracked.fill_(32)
    got, expected = both("SimpleAverageAlgorithm", pool)
    assert_same(got, expected)
    assert int(got["norm.num_batches_tracked"]) == 20


def test_other_names_and_shapes_are_refused() -> None:
    pool = models()
    pool["b"].extra = nn.Parameter(torch.ones(2))
    with refused("simple average", "extra"):
        run(ours("SimpleAverageAlgorithm"), pool)
    pool = models()
    pool["b"].last.weight = nn.Parameter(torch.ones(7, 30))
    with refused("ties", "last.weight", "[7, 30]"):
        run(ours("TiesMergingAlgorithm"), pool, **TIES)


@pytest.mark.parametrize(
    ("key", "value"), [("threshold", -1), ("threshold", 101), ("merge_func", "min")]
)
def test_parameters_out_of_range_are_refused(key: str, value: Any) -> None:
    with refused("ties", key):
        run(ours("TiesMergingAlgorithm"), models(), **TIES | {key: value})
    with refused("dare", "sparsity_ratio"):
        run(ours("DareTaskArithmetic"), models(), **DARE | {"sparsity_ratio": 1.5})
    with refused("weighted average", "weights"):
        run(ours("WeightedAverageAlgorithm"), models(), normalize=True, weights=[1.0])


def test_removed_keys_keep_the_base_and_leave_the_threshold() -> None:
    """FusionBench cannot load such a state dict unless it is T5's; then it ties the embeddings."""
    pool = models()
    got = run(ours("TiesMergingAlgorithm"), pool, **TIES | {"remove_keys": ["last.weight"]})
    assert_bits_equal(got.last.weight.data, pool["_pretrained_"].last.weight.data)
    for model in pool.values():
        del model.last
    _, expected = both("TiesMergingAlgorithm", pool, **TIES)
    assert_same({k: v for k, v in got.state_dict().items() if k in expected}, expected)


class T5(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.transformer = nn.Module()
        for name in ("shared", "encoder"):
            setattr(self.transformer, name, nn.Module())
            getattr(self.transformer, name).weight = nn.Parameter(w.clone())


def test_tied_embeddings_of_t5_follow_the_shared_one() -> None:
    g = torch.Generator().manual_seed(0)
    pool = {name: T5(torch.randn(6, 5, generator=g)) for name in NAMES}
    removed = {"remove_keys": ["transformer.encoder.weight"]}
    got, expected = both("TiesMergingAlgorithm", pool, **TIES | removed)
    assert_same(got, expected)
    assert_bits_equal(got["transformer.encoder.weight"], got["transformer.shared.weight"])


@pytest.mark.parametrize("name", ["DareTaskArithmetic", "DareTiesMerging"])
def test_draws_follow_the_memory_of_a_transposed_parameter(name: str) -> None:
    pool = models()
    for model in pool.values():
        weight = model.first.weight
        weight.data = weight.data.t().contiguous().t()
    parameters = DARE if name == "DareTaskArithmetic" else DARE | TIES | {"rescale": True}
    assert_same(*map(positive_zeros, both(name, pool, **parameters)))


def test_frozen_parameters_keep_the_base_but_take_draws() -> None:
    pool = models()
    for model in pool.values():
        model.first.weight.requires_grad_(False)
    got, expected = both("DareTaskArithmetic", pool, **DARE)
    assert_same(positive_zeros(got), positive_zeros(expected))
    assert_bits_equal(got["first.weight"], pool["_pretrained_"].first.weight.data)


def test_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "LIMIT", 50)
    for name, parameters in (
        ("TiesMergingAlgorithm", TIES | {"merge_func": "mean"}),
        ("DareTiesMerging", DARE | TIES | {"rescale": True}),
        ("DareTaskArithmetic", DARE),
    ):
        got, expected = both(name, models(), **parameters)
        assert_same(positive_zeros(got), positive_zeros(expected))


@pytest.mark.parametrize("inplace", [False, True])
def test_inplace_is_whose_weights_are_overwritten(inplace: bool) -> None:
    for name, target, parameters in (
        ("SimpleAverageAlgorithm", "a", {}),
        ("TaskArithmeticAlgorithm", "_pretrained_", {"scaling_factor": 0.3}),
    ):
        pool = models()
        before = copy.deepcopy(pool)
        result = ours(name)(inplace=inplace, **parameters).run(host.BaseModelPool(pool))
        assert (result is pool[target]) is inplace
        for key in pool:
            if key != target or not inplace:
                assert_same(pool[key].state_dict(), before[key].state_dict())


def test_a_lazy_state_dict_becomes_its_module(tmp_path: Path) -> None:
    """A pool of checkpoints that are read tensor by tensor."""
    save = importlib.import_module("safetensors.torch").save_file
    pool, lazy = models(), {}
    for name, model in pool.items():
        (tmp_path / name).mkdir()
        save(model.state_dict(), tmp_path / name / "model.safetensors")
        with torch.device("meta"):
            meta = MLP()
        lazy[name] = host.LazyStateDict(str(tmp_path / name), meta_module=meta, device="cpu")

    class Pool(host.BaseModelPool):
        def load_model(self, name: str, *args: Any, **kwargs: Any) -> Any:
            return lazy[name]

    for name, parameters in (
        ("TaskArithmeticAlgorithm", {"scaling_factor": 0.3}),
        ("TiesMergingAlgorithm", TIES),
    ):
        got = ours(name)(**parameters).run(Pool({n: {"_target_": "x"} for n in NAMES}))
        assert_same(got.state_dict(), run(theirs(name), pool, **parameters).state_dict())


# ---- MagMax, EMR, Model Stock ----------------------------------------------------------------


@pytest.mark.parametrize("fill", [plain, coarse])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_magmax(fill: Callable[..., Tensor], dtype: torch.dtype) -> None:
    pool = models(fill, dtype, norm=True)
    got, expected = both("MagMaxAlgorithm", pool, scaling_factor=0.4)
    assert_same(positive_zeros(got), positive_zeros(expected))


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # FusionBench's own
def test_emr() -> None:
    """Unified vectors and masks in bits; rescalers within the rounding of FusionBench's sums."""
    pool = models()
    got, expected = (run(c, pool) for c in (ours("EMRMerging"), theirs("EMRMerging")))
    assert_same(
        positive_zeros(got.unified_task_vector.state_dict()),
        positive_zeros(expected.unified_task_vector.state_dict()),
    )
    count = sum(p.numel() for p in MLP().parameters())
    for task in NAMES[1:]:
        a, b = got.modulators[task], expected.modulators[task]
        assert_same(a.mask.state_dict(), b.mask.state_dict())
        bound = 2 * count * U * b.rescaler.double()
        assert_within(a.rescaler.data, b.rescaler.double(), bound)


def test_emr_says_that_buffers_must_be_equal() -> None:
    pool = models(norm=True)
    run(ours("EMRMerging"), pool)  # FusionBench fails on the integers that are equal
    pool["b"].norm.running_mean.fill_(1)
    with refused("emr", "norm.running_mean"):
        run(ours("EMRMerging"), pool)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_model_stock(n: int, dtype: torch.dtype, calls: Calls) -> None:
    """Never further from the float64 result than FusionBench, and within n + 8 roundings of it."""
    pool = models(n=n, dtype=dtype)
    got, expected = both("ModelStock", pool, ignore_keys=["last.weight"])
    assert {"gram", "weighted_sum"} <= {op for _, op in calls}
    base, *states = ({k: v.double() for k, v in m.state_dict().items()} for m in pool.values())
    errors = [0.0, 0.0]
    for key, b in base.items():
        xs = [s[key] for s in states]
        mean = sum(xs) / n
        assert isinstance(mean, Tensor)
        angles = [
            torch.acos(
                ((x - b) * (y - b)).sum()
                / (((x - b) ** 2).sum().sqrt() * ((y - b) ** 2).sum().sqrt() + 1e-8)
            )
            for i, x in enumerate(xs)
            for y in xs[i + 1 :]
        ]
        cosine = torch.stack(angles).mean().clamp(-math.pi, math.pi).nan_to_num(0).cos()
        t = n * cosine / ((n - 1) * cosine + 1 + 1e-8)
        exact = mean if key == "last.weight" else t * mean + (1 - t) * b
        size = t.abs() * sum(x.abs() for x in xs) + (1 - t).abs() * b.abs() + mean.abs()
        unit = 2.0**-53 if dtype == torch.float64 else U
        if key != "scale":  # of one element: the angle is 0 or pi but for rounding
            limit = half_ulp(exact, dtype) * (1 + 1e-3) + (n + 8) * unit * size + 1e-12 * size
            assert_within(got[key], exact, limit)
            for i, state in enumerate((got, expected)):
                errors[i] += float((state[key].double() - exact).abs().sum())
    assert errors[0] <= errors[1] * (1 + 1e-6)


def test_model_stock_of_one_model_is_refused() -> None:
    with refused("model stock", "at least 2"):
        run(ours("ModelStock"), models(n=1))


def test_model_stock_saves_where_it_is_told(tmp_path: Path) -> None:
    saved = []

    class Pool(host.BaseModelPool):
        def save_model(self, model: nn.Module, path: str, **kwargs: Any) -> None:
            saved.append((path, kwargs))

    result = ours("ModelStock")(model_save_path=str(tmp_path)).run(Pool(models()))
    assert isinstance(result, MLP)
    assert saved == [(str(tmp_path), {})]
