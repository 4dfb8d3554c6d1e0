"""RegMean of one layer of four models, and the second moments of what goes into the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from mergekern.align.input_moments import InputMoments
from mergekern.methods import REGISTRY, Inputs
from mergekern.ops import covariance
from mergekern.ops._cost import Cost

import peers

TASKS = 4


def layer(timed: bool, out: int, into: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, and second moments of inputs of large and of small features."""
    out, into = (out, into) if timed else (out // 32, into // 32)
    g = torch.Generator().manual_seed(0)
    size = 10.0 ** (torch.rand(into, generator=g) - 0.5)
    grams = []
    for _ in range(TASKS):
        x = torch.randn(2 * into, into, generator=g) * size
        grams.append(x.T @ x / len(x))
    return [torch.randn(out, into, generator=g) for _ in range(TASKS)], grams


@pytest.mark.parametrize(("out", "into"), [(768, 768), (3072, 768)])
def bench_regmean(row, timed: bool, out: int, into: int) -> None:
    """In float64, sums and a Cholesky solve; fusion_bench: in float32, sums and an inverse.

    error: the distance to an LU solve in float64, over that of FusionBench.
    """
    ws, grams = layer(timed, out, into)
    inputs = Inputs(ws, None, "w", 0, torch.float32, "auto")
    given = REGISTRY["regmean"].arguments({"gram": grams}, TASKS)
    n, k = ws[0].shape
    right = sum(w.double() @ g.double() for w, g in zip(ws, grams))
    exact = torch.linalg.solve(sum(g.double() for g in grams), right.T).T
    theirs = peers.fusion_bench_regmean(ws, grams)
    call = theirs["fusion_bench"][0] if theirs else lambda: exact.float()
    away = [float((x.double() - exact).norm()) for x in (_merged(inputs, given), call())]
    row(
        lambda: _merged(inputs, given),
        cost=Cost(TASKS * (n + k) * k * 4, TASKS * 2 * n * k * k + k**3 // 3 + 2 * n * k * k),
        error=away[0] / away[1],
        peers=theirs,
    )


def _merged(inputs: Inputs, given: Mapping[str, object]) -> Tensor:
    return REGISTRY["regmean"].merge(inputs, **given)


def by_hooks(
    model: nn.Module, run: Callable[[], object], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """As one writes it in torch: a product of each layer's inputs."""
    found: dict[str, Tensor] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).to(dtype)
            found[name] = found.get(name, 0) + x.T @ x

        return hook

    hooks = [
        m.register_forward_pre_hook(look(name))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


def bench_input_moments(row, timed: bool) -> None:
    """16 images through one layer of CLIP ViT-B/16, the forward pass with it.

    torch: hooks that form the product of each layer's inputs. error: of a diagonal element, over
    1e-6 of it.
    """
    transformers = pytest.importorskip("transformers", reason="transformers: not installed")
    sizes = {} if timed else {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.CLIPVisionConfig(num_hidden_layers=1, patch_size=16, **sizes)
    torch.manual_seed(0)
    model = transformers.CLIPVisionModel(config).eval()
    images = torch.randn(16 if timed else 2, 3, 224, 224)
    layers = {n: [m] for n, m in model.named_modules() if isinstance(m, nn.Linear)}

    @torch.no_grad()
    def forward() -> object:
        return model(images)

    def call() -> InputMoments:
        moments = InputMoments("model", "error", "auto")
        with moments.watching(layers):
            forward()
        return moments

    exact = by_hooks(model, forward, torch.float64)
    error, costs = 0.0, []
    for names, found in call().groups():
        mine, own = found.second_moment().diagonal(), exact[names[0]].diagonal() / found.count
        error = max(error, float(((mine - own).abs() / own).max()) / 1e-6)
        costs.append(covariance.cost(found.count, len(mine), 4))
    cost = Cost(sum(c.bytes for c in costs), sum(c.flops for c in costs))
    row(call, cost=cost, error=error, torch=lambda: by_hooks(model, forward))
