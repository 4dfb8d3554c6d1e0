"""tsv_m, iso_c, iso_cts and svc of whole models: what is no matrix, fused ones, files, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergekern as mk
from mergekern.adapters.adapter import Adapter, Factors
from mergekern.engine.manifest import MANIFEST
from mergekern.methods import REGISTRY
from mergekern.methods.directions import Matrices

from accuracy import assert_bits_equal, assert_within
from engine.models import write_folder
from methods.spectral_oracle import ORACLES, family
from refusal import refused

NAMES = tuple(ORACLES)


# ---- other tensors, layouts ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (4, 3, 2, 2), (2, 3, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_other_tensors_get_the_mean(name: str, shape: tuple[int, ...]) -> None:
    base, xs = family(3, *shape)
    got = mk.merge_tensors(xs, name, base=base, lambda_=0.9)
    scale = 0.9 if name == "svc" else 0.9 / 3
    plain = mk.merge_tensors(xs, "task_arithmetic", base=base, weight=1.0, lambda_=scale)
    assert_bits_equal(got, plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_with_spectral_off(name: str) -> None:
    base, xs = family(3, 9, 7)
    got = mk.merge_tensors(xs, name, base=base, spectral=False)
    scale = 1.0 if name == "svc" else 1 / 3
    plain = mk.merge_tensors(xs, "task_arithmetic", base=base, weight=1.0, lambda_=scale)
    assert_bits_equal(got, plain)


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts(name: str) -> None:
    shapes = {"w": (9, 7), "b": (7,), "conv": (4, 3, 2, 2), "scale": ()}
    families = {key: family(2, *shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    steps = torch.tensor([3])
    base = {key: f[0] for key, f in families.items()} | {"steps": steps}
    models = [{key: f[1][i] for key, f in families.items()} | {"steps": steps} for i in range(2)]
    got = mk.merge_state_dicts(models, name, base=base)
    for key, (b, xs) in families.items():
        assert_bits_equal(got[key], mk.merge_tensors(xs, name, base=b))
    assert_bits_equal(got["steps"], steps)


@pytest.mark.parametrize(
    ("key", "axis"),
    [("blocks.0.attn.qkv.weight", 0), ("in_proj_weight", 0), ("h.c_attn.weight", 1)],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_fused_qkv_is_three_matrices(name: str, key: str, axis: int) -> None:
    base, xs = family(2, *((36, 12) if axis == 0 else (12, 36)))
    got = mk.merge_tensors(xs, name, base=base, name=key, split_qkv=True)
    each = zip(*(torch.chunk(x, 3, axis) for x in (base, *xs)), strict=True)
    parts = [mk.merge_tensors(part, name, base=b) for b, *part in each]
    assert_bits_equal(got, torch.cat(parts, axis))
    assert not torch.equal(got, mk.merge_tensors(xs, name, base=base, name=key))
    other = mk.merge_tensors(xs, name, base=base, name="mlp.fc1.weight", split_qkv=True)
    assert_bits_equal(other, mk.merge_tensors(xs, name, base=base))


def test_a_qkv_of_other_parts_is_refused() -> None:
    base, xs = family(2, 20, 12)
    with refused("iso_c", "attn.qkv.weight", "[20, 12]", "[3 d, d]"):
        mk.merge_tensors(xs, "iso_c", base=base, name="attn.qkv.weight", split_qkv=True)


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_not_finite(name: str, special: float) -> None:
    base, xs = family(3, 9, 7)
    xs[1][2, 3] = special
    with refused(name, "task vector 1 of layer.w[2, 3]", str(special)):
        mk.merge_tensors(xs, name, base=base, name="layer.w")
    fused = {"base": torch.zeros(6, 2), "name": "attn.qkv.weight", "split_qkv": True}
    qkv = torch.zeros(6, 2)
    qkv[5, 1] = special
    with refused(name, "task vector 0 of third 2 of attn.qkv.weight[1, 1]"):
        mk.merge_tensors([qkv], name, **fused)
    base[4, 0] = special
    with refused(name, "task vector 0 of the tensor[4, 0]"):
        mk.merge_tensors(xs, name, base=base)


def test_results_beyond_float64() -> None:
    base = torch.zeros(3, 3, dtype=torch.float64)
    with refused("iso_c", "task vector 0", "inf"):
        mk.merge_tensors([base + 1e308], "iso_c", base=base - 1e308)


def test_arguments_out_of_range() -> None:
    base, xs = family(2, 5, 4)
    for alpha in (0, -1):
        with refused("svc", "alpha", "above 0"):
            mk.merge_tensors(xs, "svc", base=base, alpha=alpha)
    with refused("iso_cts", "common", "0 to 1"):
        mk.merge_tensors(xs, "iso_cts", base=base, common=1.5)
    with refused("tsv_m", "needs a base", sentence=False):
        mk.merge_tensors(xs, "tsv_m")


# ---- adapters, checkpoints --------------------------------------------------------------------


@pytest.mark.parametrize("seen", ["core", "knots"])
def test_adapters(seen: str) -> None:
    """The sum of low-rank task vectors flattened in its own space: no noise, and no rank added."""
    g = torch.Generator().manual_seed(0)

    def adapter() -> Adapter:
        a, b = torch.randn(2, 20, generator=g), torch.randn(30, 2, generator=g)
        return Adapter({"fc": Factors(a, b, shape=(20,))})

    both = [adapter(), adapter()]
    merged = mk.merge_adapters(both, f"{seen}_iso_c").modules["fc"].delta()
    total = sum(x.modules["fc"].delta() for x in both)
    assert isinstance(total, Tensor)
    u, s, vh = torch.linalg.svd(total.double())
    expected = s[:4].mean() * u[:, :4] @ vh[:4]
    # Parts and factors are rounded to float32: a turn by that over the least singular value.
    error = 2.0**-20 * float(s[0] / s[3]) * float(s[0])
    assert_within(merged.double(), expected, torch.tensor(error).double())


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[list[Path], list[dict[str, Tensor]]]:
    shapes = {"attn.qkv.weight": (36, 12), "fc.weight": (20, 12), "fc.bias": (20,), "embed": (9, 7)}
    families = {f"blocks.0.{key}": family(2, *shape) for key, shape in shapes.items()}
    states = [{key: base for key, (base, _) in families.items()}]
    states += [{key: xs[i] for key, (_, xs) in families.items()} for i in range(2)]
    return [write_folder(tmp_path / f"m{i}", s) for i, s in enumerate(states)], states


def test_a_configuration(checkpoints: Any, tmp_path: Path) -> None:
    """Filters turn matrices off; what is asked for is in the manifest; bits are those of a call."""
    paths, (base, *models) = checkpoints
    config = {
        "merge_method": "tsv_m",
        "base_model": str(paths[0]),
        "models": [{"model": str(p)} for p in paths[1:]],
        "parameters": {
            "lambda": 0.8,
            "split_qkv": True,
            "spectral": [{"filter": "embed", "value": False}, {"value": True}],
        },
    }
    manifest = mk.merge_checkpoints(config, tmp_path / "out", progress=False)
    assert manifest.merged == len(base)
    got = load_file(tmp_path / "out" / "model.safetensors")
    for key, b in base.items():
        options: dict[str, Any] = {"lambda": 0.8, "split_qkv": True, "spectral": "embed" not in key}
        xs = [m[key] for m in models]
        assert_bits_equal(got[key], mk.merge_tensors(xs, "tsv_m", base=b, name=key, **options))
    about = json.loads((tmp_path / "out" / MANIFEST).read_text())["tensors"]
    assert [t["arguments"]["split_qkv"] for t in about.values()] == [True] * 4
    assert [t["arguments"]["spectral"] for t in about.values()] == ["embed" not in k for k in about]


def test_a_sweep_of_lambda_merges_once(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, (base, *models) = checkpoints
    config = {
        "merge_method": "iso_cts",
        "base_model": str(paths[0]),
        "models": [{"model": str(p)} for p in paths[1:]],
    }
    sums = []
    total = Matrices.total
    monkeypatch.setattr(Matrices, "total", lambda self: sums.append(self.name) or total(self))
    sweep = {"common": [0.5, 0.8], "lambda": [0.3, 0.5, 1.0]}
    mk.merge_sweep(config, tmp_path / "out", sweep, progress=False)
    assert len(sums) == 2 * 3  # of three matrices with two shares
    for common in (0.5, 0.8):
        for scale in (0.3, 1.0):
            got = load_file(tmp_path / f"out/common={common},lambda={scale}/model.safetensors")
            for key, b in base.items():
                xs = [m[key] for m in models]
                own = mk.merge_tensors(xs, "iso_cts", base=b, common=common, lambda_=scale)
                assert_bits_equal(got[key], own)


def test_memory_of_a_merge(checkpoints: Any, tmp_path: Path) -> None:
    """A plan counts the float64 matrices; too small a limit is refused before anything is read."""
    paths, _ = checkpoints
    config = {
        "merge_method": "iso_cts",
        "base_model": str(paths[0]),
        "models": [{"model": str(p)} for p in paths[1:]],
    }
    plan, _ = mk.plan_merge(config, tmp_path / "out")
    scratch = 8 * (8 * 36 * 12 + 10 * 12 * 12)
    assert REGISTRY["iso_cts"].scratch(plan.tasks[0].arguments[0], (36, 12)) == scratch
    assert plan.peak == 36 * 12 * 4 * 4 + scratch
    with pytest.raises(mk.CheckpointError, match=r"qkv.weight needs .* scratch .* cannot be cut"):
        mk.merge_checkpoints(config, tmp_path / "out", memory=plan.peak - 1)
