"""WUDI and RegMean against FusionBench's own classes and functions, and both against float64."""

from __future__ import annotations

import copy
import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekern.integrations import fusion_bench as dropin

from accuracy import assert_bits_equal, assert_within
from refusal import refused
from required import peer

host = peer("fusion_bench", "fusion-bench")
wudi = peer("fusion_bench.method.wudi.wudi", "fusion-bench")
regmean = peer("fusion_bench.method.regmean.regmean", "fusion-bench")
plusplus = peer("fusion_bench.method.regmean_plusplus.regmean_plusplus", "fusion-bench")

U = 2.0**-24
ZERO = torch.zeros((), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread's progress bars and fabric's choice of a device have no place in a test."""
    monkeypatch.setattr(wudi, "tqdm", _Quiet)


class _Quiet:
    def __init__(self, each: Any, **_: Any) -> None:
        self.each = each

    def __iter__(self) -> Any:
        return iter(self.each)

    @staticmethod
    def write(_: str) -> None:
        pass


# ---- WUDI ------------------------------------------------------------------------------------


def task_vectors(n: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(n)
    shapes = {
        "fc.weight": (24, 40),
        "head.weight": (40, 16),
        "fc.bias": (24,),
        "conv": (4, 3, 2, 2),
    }
    return [
        {k: 1e-3 * torch.randn(s, generator=g).to(dtype) for k, s in shapes.items()}
        for _ in range(n)
    ]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_wudi_merging(n: int) -> None:
    """Within 1e-6 of FusionBench's matrices, and no further than they from its own in float64."""
    vectors = task_vectors(n)
    theirs = wudi.wudi_merging(copy.deepcopy(vectors), accelerator="cpu")
    got = dropin.wudi_merging(vectors, accelerator="cpu")
    exact = wudi.wudi_merging([{k: x.double() for k, x in v.items()} for v in vectors], "cpu")
    assert list(got) == list(theirs)
    for key, x in got.items():
        other, oracle = theirs[key].detach(), exact[key].detach()
        own, its = (x - oracle).norm(), (other - oracle).norm()
        assert_within((x - other).double().norm(), ZERO, 1e-6 * other.double().norm())
        assert own <= its + U * oracle.norm() / 8, key
    assert not any(x.requires_grad for x in got.values())


def test_excluded_matrices_are_averaged() -> None:
    vectors = task_vectors(3)
    given = {"accelerator": "cpu", "iter_num": 20, "exclude_keys": ["head.weight"]}
    theirs = wudi.wudi_merging(copy.deepcopy(vectors), **given)
    got = dropin.wudi_merging(vectors, **given)
    for key, x in got.items():
        bound = 4 * U * sum(v[key].abs() for v in vectors).double() + 1e-6 * x.double().norm()
        assert_within(x, theirs[key].detach().double(), bound)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 30), nn.LayerNorm(30), nn.Linear(30, 5)
        self.register_buffer("ids", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(torch.tanh(self.fc1(x))))


def pool(size: float = 1e-2) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    base = MLP()
    made: dict[str, nn.Module] = {"_pretrained_": base}
    for name in "abc":
        made[name] = copy.deepcopy(base)
        for p in made[name].parameters():
            p.data += size * torch.randn_like(p)
    return made


@pytest.mark.parametrize("excluded", [None, ["fc1.weight"]])
def test_wudi_algorithm(excluded: list[str] | None) -> None:
    models = pool()
    for m in models.values():
        del m.ids  # FusionBench divides them
    states = []
    for cls in (wudi.WUDIMerging, dropin.WUDIMerging):
        algorithm = cls(iter_num=40, exclude_keys=excluded)
        merged = algorithm.run(host.BaseModelPool(copy.deepcopy(models)))
        states.append(merged.state_dict())
    base = models["_pretrained_"].state_dict()
    for key, x in states[0].items():
        away = (x - base[key]).double().norm()
        bound = 1e-6 * away + 4 * U * x.double().abs()
        assert_within(states[1][key], x.double(), bound)


def test_wudi_copies_equal_integers_and_takes_zero_task_vectors() -> None:
    models = pool()
    models["c"] = copy.deepcopy(models["_pretrained_"])
    algorithm = dropin.WUDIMerging(iter_num=5)
    got = algorithm.run(host.BaseModelPool(copy.deepcopy(models))).state_dict()
    assert_bits_equal(got["ids"], torch.arange(3))
    assert all(x.isfinite().all() for x in got.values())
    models["b"].extra = nn.Parameter(torch.ones(2))
    with refused("wudi", "extra"):
        dropin.WUDIMerging(iter_num=5).run(host.BaseModelPool(models))


# ---- RegMean ---------------------------------------------------------------------------------


def layer(n: int) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(n)
    ws = [torch.randn(9, 14, generator=g) for _ in range(n)]
    xs = [torch.randn(200, 14, generator=g) + 0.5 for _ in range(n)]
    return ws, [x.T @ x / 200 for x in xs]


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("ratio", [1.0, 0.9])
def test_regmean_params_merge(ratio: float, transpose: bool) -> None:
    ws, gs = layer(3)
    ws = ws if transpose else [w.T for w in ws]
    theirs = plusplus.regmean_params_merge(ws, gs, ratio, transpose)
    got = dropin.regmean_params_merge(ws, gs, ratio, transpose, "fc", "cpu")
    exact = plusplus.regmean_params_merge(
        [w.double() for w in ws], [g.double() for g in gs], ratio, transpose
    )
    assert got.shape == theirs.shape
    assert (got - exact).norm() <= (theirs - exact).norm()
    # theirs: an inverse and two products in float32, of a condition of 50 at most
    assert torch.linalg.cond(sum(gs)) < 50
    assert_within(got, theirs.double(), 16 * 14 * U * 50 * exact.abs().max().expand_as(exact))


def test_merging_with_regmean_weights() -> None:
    ws, gs = layer(2)
    params = {
        "fc.weight": ws,
        "fc.bias": [w[:, 0] for w in ws],
        "weight": ws,
        "ids": 2 * [ws[0].int()],
    }
    lists = [{"fc": g} for g in gs]
    got = dropin.merging_with_regmean_weights(params, lists, 0.95)
    params.pop("ids")  # FusionBench fails on these
    theirs = regmean.merging_with_regmean_weights(params, lists, 0.95)
    assert_bits_equal(got.pop("ids"), ws[0].int())
    assert list(got) == list(theirs)
    for key, x in theirs.items():
        assert_within(got[key], x.double(), 16 * 14 * U * 50 * x.double().abs().max().expand_as(x))


@pytest.mark.parametrize("which", [0, 1])
def test_a_layer_without_a_gram_matrix_in_one_model_is_refused(which: int) -> None:
    ws, gs = layer(2)
    lists = [{"fc": g} for g in gs]
    lists[which] = {}
    with refused("regmean", "fc has a Gram matrix in some models only", "all or none"):
        dropin.merging_with_regmean_weights({"fc.weight": ws}, lists)


def test_gram_matrices_of_16_bits_are_taken() -> None:
    ws, gs = layer(2)
    got = dropin.regmean_params_merge(ws, [g.bfloat16() for g in gs], 0.5)
    same = dropin.regmean_params_merge(ws, [g.bfloat16().float() for g in gs], 0.5)
    assert_bits_equal(got, same)


def with_data(cls: type) -> Any:
    """An algorithm for CLIP that needs no texts: what is after the encoder does not matter here."""

    class Encoders(cls):  # type: ignore[misc, valid-type]
        _clip_processor = staticmethod(lambda image: image)

        def on_regmean_start(self) -> None:
            pass

        def compute_logits(self, module: nn.Module, batch: Any, task: str) -> Tensor:
            return module(batch[0])

    return Encoders(
        dataloader_kwargs={"batch_size": 8},
        num_regmean_examples=24,
        exclude_param_names_regex=[".*post_layernorm"],
        reduce_non_diagonal_ratio=0.95,
        weight_transpose=True,
    )


def encoders(transformers: Any) -> dict[str, nn.Module]:
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    torch.manual_seed(0)
    base = transformers.CLIPVisionModel(config).eval()
    made = {"_pretrained_": base}
    for name in "ab":
        made[name] = copy.deepcopy(base)
        for p in made[name].parameters():
            p.data += 0.05 * torch.randn_like(p)
    return made


def test_regmean_for_clip() -> None:
    """As FusionBench's class on the same images in the same order."""
    transformers = peer("transformers", "transformers")
    clip = importlib.import_module("fusion_bench.method.regmean.clip_regmean")
    models = encoders(transformers)
    g = torch.Generator().manual_seed(1)
    images = {
        n: [{"image": torch.randn(3, 16, 16, generator=g), "label": 0} for _ in range(30)]
        for n in "ab"
    }

    class Pool(host.BaseModelPool):
        def load_train_dataset(self, name: str, *args: Any, **kwargs: Any) -> Any:
            return images[name]

    states = []
    for cls in (clip.RegMeanAlgorithmForCLIP, dropin.RegMeanAlgorithmForCLIP):
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fabric, on devices that are not used
            merged = with_data(cls).run(Pool(copy.deepcopy(models)))
        states.append(merged.state_dict())
    for key, x in states[0].items():
        condition = 200  # of Gram matrices of which 0.05 of the diagonal is kept
        bound = 16 * 24 * U * condition * x.double().abs().max().expand_as(x)
        assert_within(states[1][key], x.double(), bound)
    base = models["_pretrained_"].state_dict()
    changed = [k for k, x in states[1].items() if not torch.equal(x, base[k])]
    assert all("post" not in k for k in changed)
    layer = next(m for m in models["b"].modules() if isinstance(m, nn.Linear))
    layer.bias = None
    with warnings.catch_warnings(), refused("regmean", "model 1 has other tensors"):
        warnings.simplefilter("ignore")
        with_data(dropin.RegMeanAlgorithmForCLIP).run(Pool(copy.deepcopy(models)))
    assert len(changed) > 20
