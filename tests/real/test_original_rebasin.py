"""Git Re-Basin's PyTorch port and its drop-in on two real encoders."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekern.integrations import git_rebasin

from accuracy import assert_bytes_equal
from cifar import weights
from rebasin import port


def axes(params: dict[str, Tensor]) -> git_rebasin.Axes:
    """Of the encoders of cifar5: stages share the space of their residual stream."""
    spaces = {"conv1": "S1", "bn1": "S1", "fc": None}
    for stage in (1, 2, 3):
        for block in range(3):
            name = f"layer{stage}.{block}"
            inner = {f"{name}.conv1": f"{name}.I", f"{name}.bn1": f"{name}.I"}
            outer = [f"{name}.conv2", f"{name}.bn2", f"{name}.downsample.0", f"{name}.downsample.1"]
            spaces |= inner | dict.fromkeys(outer, f"S{stage}")
    found: git_rebasin.Axes = {}
    for key, x in params.items():
        module = key.rpartition(".")[0]
        before: str | None = None
        if x.ndim > 1 and module == "fc":
            before = "S3"
        elif x.ndim > 1 and module != "conv1":
            stage, block = int(module[5]), int(module[7])
            before = f"S{stage - 1}" if block == 0 and stage > 1 else f"S{stage}"
            before = f"{module[:8]}.I" if module.endswith("conv2") else before
        found[key] = ((spaces[module], before) + (None,) * (x.ndim - 2))[: x.ndim]
    return found


def test_permutations_of_the_port() -> None:
    a, b = (weights(f"cifar5/{m}.safetensors") for m in ("a", "b"))
    a, b = ({k: x for k, x in s.items() if x.is_floating_point()} for s in (a, b))
    ps = git_rebasin.permutation_spec_from_axes_to_perm(axes(a))
    assert len(ps.perm_to_axes) == 12
    found = []
    for module in (port(), git_rebasin):
        torch.manual_seed(0)
        perm = module.weight_matching(ps, a, b)
        found.append((perm, module.apply_permutation(ps, perm, b)))
    (theirs, their_weights), (mine, my_weights) = found
    assert any(index.tolist() != sorted(index.tolist()) for index in mine.values())
    for p, index in theirs.items():
        assert mine[p].tolist() == index.long().tolist()
    for key, x in their_weights.items():
        assert_bytes_equal(my_weights[key], x)
