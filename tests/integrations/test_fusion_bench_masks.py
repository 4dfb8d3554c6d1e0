"""emr, magmax, TALL masks, consensus and fisher against FusionBench.

Where the same float32 steps are taken the bits are equal; elsewhere both are compared with
float64, and our largest error is at most theirs.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mergekern as mk
from mergekern.check import name_of

from accuracy import assert_bits_equal, assert_within, half_ulp
from required import peer

emr_utils = peer("fusion_bench.method.emr_merging.utils", "fusion-bench")
magmax = peer("fusion_bench.method.magmax.magmax", "fusion-bench")
tall = peer("fusion_bench.method.tall_mask.utils", "fusion-bench")
fisher = peer("fusion_bench.method.fisher_merging.fisher_merging", "fusion-bench")

SHAPES = {"w": (67, 131), "conv": (24, 1, 3, 3), "b": (67,), "s": ()}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def state_dicts(
    n: int, dtype: torch.dtype = torch.float32, ties: bool = False
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(n)

    def tensor(shape: tuple[int, ...], scale: float) -> Tensor:
        if ties:
            return torch.randint(-3, 4, shape, generator=g) / 64
        return scale * torch.randn(shape, generator=g)

    base = {k: tensor(s, 0.05).to(dtype) for k, s in SHAPES.items()}
    models = [
        {k: (base[k].float() + tensor(s, 0.01)).to(dtype) for k, s in SHAPES.items()}
        for _ in range(n)
    ]
    return base, models


def unpacked(mask: mk.Mask, like: Tensor) -> Tensor:
    flat = np.unpackbits(mask.bits.numpy())[: like.numel()]
    return torch.from_numpy(flat.astype(bool)).reshape(like.shape)


def module(tensors: dict[str, Tensor]) -> nn.Module:
    made = nn.Module()
    for name, x in tensors.items():
        made.register_parameter(name, nn.Parameter(x.clone(), requires_grad=False))
    return made


# ---- EMR -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_emr(n: int, ties: bool) -> None:
    """float32: unified vector and masks the same; rescalers no farther from float64."""
    base, models = state_dicts(n, ties=ties)
    taus = [{k: m[k] - base[k] for k in base} for m in models]
    unified, masks, rescalers = emr_utils.emr_merge(taus)
    mine = mk.emr_state_dicts(base, models)
    for key, x in base.items():
        assert_bits_equal(mine[key].unified, unified[key].reshape(x.shape))
        for i, mask in enumerate(masks[key]):
            assert torch.equal(unpacked(mine[key].masks[i], x), mask)
    for i, tau in enumerate(taus):
        before = sum(float(t.double().abs().mean()) for t in tau.values())
        after = sum(float((unified[k].double() * masks[k][i]).abs().mean()) for k in tau)
        exact = before / after
        errors = abs(mine["w"].rescale[i] - exact), abs(float(rescalers[i]) - exact)
        assert errors[0] <= max(errors[1], 1e-14)
        for key, x in base.items():
            theirs = x + unified[key] * masks[key][i] * rescalers[i]
            approximation = mine[key].model(x, i)
            value = x.double() + unified[key].double() * masks[key][i] * exact
            # The rescaler and its product rounded, then the sum; theirs has a rescaler of its own.
            term = (value - x.double()).abs()
            off = term * abs(float(rescalers[i]) / exact - 1)
            once = 2.0**-22 * term + half_ulp(value.abs() + term, torch.float32)
            assert_within(approximation, value, once)
            assert_within(theirs, value, once + off)


def test_emr_of_an_unchanged_model() -> None:
    """theirs: 0 / 0, and so a model of NaN."""
    base, models = state_dicts(2)
    models[1] = base
    taus = [{k: m[k] - base[k] for k in base} for m in models]
    assert emr_utils.emr_merge(taus)[2][1].isnan()
    mine = mk.emr_state_dicts(base, models)
    for key, x in base.items():
        assert_bits_equal(mine[key].model(x, 1), x)


# ---- MagMax ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_magmax(scale: float, dtype: torch.dtype, ties: bool) -> None:
    base, models = state_dicts(4, dtype, ties)
    merged = magmax.magmax_merge(module(base), [module(m) for m in models], scale)
    theirs = merged.state_dict()
    like = mk.merge_state_dicts(models, "magmax", base=base, scale=scale, host="fusion_bench")
    mine = mk.merge_state_dicts(models, "magmax", base=base, scale=scale)
    for key, x in base.items():
        assert_bits_equal(like[key], theirs[key])
        ds = torch.stack([m[key].double() - x.double() for m in models])
        size = ds.abs()
        top = size.max(0).values
        # An equal magnitude of the other sign is another choice, not an error.
        clear = ~((size >= top * (1 - 2.0**-7)) & (ds != ds.gather(0, size.argmax(0)[None]))).any(0)
        exact = x.double() + scale * ds.gather(0, size.argmax(0)[None])[0]
        errors = [
            float((y[key].double() - exact)[clear].abs().max())
            for y in (mine, theirs)
            if clear.any()
        ] or [0.0, 0.0]
        print(f"{name_of(dtype)} {key}: max error {errors[0]:.3e}, theirs {errors[1]:.3e}")
        assert errors[0] <= errors[1]


# ---- TALL masks and Consensus ----------------------------------------------------------------


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[k].reshape(-1) for k in sorted(tensors)])


@pytest.mark.parametrize("factor", [0.2, 0.4, 1.0])
@pytest.mark.parametrize("n", [2, 5])
def test_tall_masks_and_files(n: int, factor: float, tmp_path: Any) -> None:
    """Both are the float64 mask where float32 leaves no doubt; the file is theirs."""
    base, models = state_dicts(n)
    origin, xs = flat(base), torch.stack([flat(m) for m in models])
    theirs = tall.generate_task_masks(xs - origin, xs, origin, tall_mask_lambda=factor)
    taus = xs.double() - origin.double()
    left, right = taus.abs(), (taus.sum(0) - taus).abs() * factor
    size = origin.double().abs() + xs.double().abs().sum(0) * 2
    clear = (left - right).abs() > (2 * n + 4) * 2.0**-24 * size
    assert clear.double().mean() > 0.99
    masks = {k: mk.tall_masks(base[k], [m[k] for m in models], lambda_=factor) for k in base}
    for i in range(n):
        mine = torch.cat([unpacked(masks[k][i], base[k]).reshape(-1) for k in sorted(base)])
        for got in (mine, theirs[i]):
            assert torch.equal(got[clear[i]], (left > right)[i][clear[i]])
        wrong = [int((got != (left > right)[i]).sum()) for got in (mine, theirs[i])]
        print(f"model {i}: {wrong[0]} bits beside float64, theirs {wrong[1]}")
        assert wrong[0] <= wrong[1]
        mk.save_masks(tmp_path / "mine.npy", {k: m[i] for k, m in masks.items()}, base)
        assert np.load(tmp_path / "mine.npy").tobytes() == np.packbits(mine.numpy()).tobytes()
        packed = np.packbits(theirs[i].numpy())  # as tall_masks stores them
        read = mk.load_masks(packed, base)
        back = torch.cat([unpacked(read[k], base[k]).reshape(-1) for k in sorted(base)])
        assert torch.equal(back, theirs[i])


@pytest.mark.parametrize("k", [0, 1, 2, 3, 6])
def test_consensus_mask(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same masks, the same consensus."""
    base, models = state_dicts(5)
    masks = {
        key: mk.tall_masks(x, [m[key] for m in models], lambda_=0.4) for key, x in base.items()
    }
    loaded = {
        i: {key: unpacked(masks[key][i], x).to(torch.uint8) for key, x in base.items()}
        for i in range(5)
    }
    monkeypatch.setattr(tall, "load_tall_mask", lambda *args: loaded)
    theirs = tall.construct_consensus_mask(base, k, types.SimpleNamespace())
    mine = {key: mk.consensus_mask(masks[key], k, x.numel()) for key, x in base.items()}
    assert torch.equal(flat({key: unpacked(mine[key], x) for key, x in base.items()}), theirs)
    # And the method is the task vector under that mask, within one rounding of the sum.
    merged = mk.merge_state_dicts(models, "consensus", base=base, lambda_=0.4, k=k, scale=0.3)
    for key, x in base.items():
        tau = sum((m[key] - x for m in models[1:]), models[0][key] - x)
        assert_bits_equal(merged[key], mk.masked(x, tau, mine[key], 0.3))


# ---- Fisher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_fisher(dtype: torch.dtype, normalize: bool) -> None:
    """Theirs fails for a tensor without axes; of 16-bit models it is float32, rounded here."""
    models = [{k: x for k, x in m.items() if x.ndim} for m in state_dicts(3, dtype)[1]]
    g = torch.Generator().manual_seed(7)
    fishers = [
        {k: ((i + 1) * torch.randn(x.shape, generator=g).square()).to(dtype) for k, x in m.items()}
        for i, m in enumerate(models)
    ]
    weight = [0.5, 0.3, 0.2]
    theirs = fisher.merging_with_fisher_weights(
        {k: [m[k] for m in models] for k in models[0]},
        fishers,
        torch.tensor(weight),
        normalize,
        1e-6,
    )
    mine = mk.merge_state_dicts(
        models, "fisher", fisher=fishers, weight=weight, normalize=normalize, minimal=1e-6
    )
    norms = [sum(float(f.double().square().sum()) for f in d.values()) ** 0.5 for d in fishers]
    for key in models[0]:
        c = [w / (s + 1e-6) if normalize else w for w, s in zip(weight, norms, strict=True)]
        shares = [v * (d[key].double() + 1e-6) for v, d in zip(c, fishers, strict=True)]
        exact = sum(s * m[key].double() for s, m in zip(shares, models, strict=True)) / sum(shares)
        errors = [float((y[key].to(dtype).double() - exact).abs().max()) for y in (mine, theirs)]
        print(f"{name_of(dtype)} {key}: max error {errors[0]:.3e}, theirs {errors[1]:.3e}")
        assert errors[0] <= errors[1]
        assert mine[key].dtype == dtype
