"""KnOTS' own code, from a checkout of its repository that MERGEKERN_KNOTS points to."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

AT_HAND = "MERGEKERN_KNOTS" in os.environ
needed = pytest.mark.skipif(
    not AT_HAND, reason="KnOTS: MERGEKERN_KNOTS does not point to a checkout"
)


class _Anything(ModuleType):
    """Stands for a module that a file imports and these functions do not use."""

    def __getattr__(self, name: str) -> Any:
        return None


@contextlib.contextmanager
def original() -> Iterator[dict[str, ModuleType]]:
    """Its modules by name, imported afresh; what they say is not shown."""
    own = ("task_merger", "masking_ops", "merging_functions")
    with (
        mock.patch.dict(sys.modules, {"utils": _Anything("utils")}),
        mock.patch.object(sys, "path", [os.environ["MERGEKERN_KNOTS"], *sys.path]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        for name in own:
            sys.modules.pop(name, None)
        yield {name: importlib.import_module(name) for name in own}


def svd_merger(modules: Mapping[str, ModuleType]) -> Any:
    """An SVDMerger without models, for its methods."""
    svd = modules["task_merger"].SVDMerger.__new__(modules["task_merger"].SVDMerger)
    object.__setattr__(svd, "device", "cpu")
    return svd


class Merged(NamedTuple):
    tensors: dict[str, Tensor]
    mask: Tensor  # [tasks, elements of all parts]


def merged(
    matrices: Sequence[Mapping[str, Tensor]], topk: float, scale: float
) -> dict[str, Tensor]:
    """KnOTS-TIES of task vectors by its SVDMerger.apply_svd, ties_masking and masked_merge."""
    with original() as modules:
        return merged_by(modules, matrices, topk, scale).tensors


def merged_by(
    modules: Mapping[str, ModuleType],
    matrices: Sequence[Mapping[str, Tensor]],
    topk: float,
    scale: float,
) -> Merged:
    """The same with modules that may be changed."""
    masking = modules["masking_ops"]
    u, _, parts, _ = svd_merger(modules).apply_svd([dict(m) for m in matrices])
    keys = sorted(u)
    rows = [torch.cat([p[k].reshape(-1) for k in keys]) for p in parts]
    mask = masking.ties_masking(rows, topK=topk)
    flat = masking.masked_merge(torch.vstack(rows) * mask, "mean", weights=[scale])
    sizes = [parts[0][k].numel() for k in keys]
    tensors = {
        k: u[k] @ x.view(parts[0][k].shape)
        for k, x in zip(keys, torch.split(flat, sizes), strict=True)
    }
    return Merged(tensors, mask)
