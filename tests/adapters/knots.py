"""KnOTS' own code, from a checkout of its repository that MERGEKERN_KNOTS points to."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

needed = pytest.mark.skipif(
    "MERGEKERN_KNOTS" not in os.environ,
    reason="KnOTS: MERGEKERN_KNOTS does not point to a checkout",
)


class _Anything(ModuleType):
    """Stands for a module that a file imports and these functions do not use."""

    def __getattr__(self, name: str) -> Any:
        return None


def merged(
    matrices: Sequence[Mapping[str, Tensor]], topk: float, scale: float
) -> dict[str, Tensor]:
    """KnOTS-TIES of task vectors by its SVDMerger.apply_svd, ties_masking and masked_merge."""
    own = ("task_merger", "masking_ops", "utils")
    with (
        mock.patch.dict(sys.modules, {"utils": _Anything("utils")}),
        mock.patch.object(sys, "path", [os.environ["MERGEKERN_KNOTS"], *sys.path]),
    ):
        for name in own[:2]:
            sys.modules.pop(name, None)
        merger, masking = (importlib.import_module(name) for name in own[:2])
        svd = merger.SVDMerger.__new__(merger.SVDMerger)
        object.__setattr__(svd, "device", "cpu")
        u, _, parts, _ = svd.apply_svd([dict(m) for m in matrices])
        keys = sorted(u)
        rows = [torch.cat([p[k].reshape(-1) for k in keys]) for p in parts]
        mask = masking.ties_masking(rows, topK=topk)
        flat = masking.masked_merge(torch.vstack(rows) * mask, "mean", weights=[scale])
    sizes = [parts[0][k].numel() for k in keys]
    return {
        k: u[k] @ x.view(parts[0][k].shape)
        for k, x in zip(keys, torch.split(flat, sizes), strict=True)
    }
