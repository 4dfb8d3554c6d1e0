"""ZipIt's own code, from a checkout of its repository that MERGEKERN_ZIPIT points to."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

AT_HAND = "MERGEKERN_ZIPIT" in os.environ
needed = pytest.mark.skipif(
    not AT_HAND, reason="ZipIt: MERGEKERN_ZIPIT does not point to a checkout"
)


class Anything(ModuleType):
    """Stands for a module that a file imports and the test does not use."""

    def __getattr__(self, name: str) -> Any:
        return None


def checkout() -> str:
    """The folder; for tests marked `needed`."""
    return os.environ["MERGEKERN_ZIPIT"]


@contextlib.contextmanager
def original() -> Iterator[ModuleType]:
    """Its model_merger, imported afresh; packages that it does not use here stand in.

    Its other modules are importable inside as well.
    """
    stand_ins = ("clip", "einops", "fvcore", "fvcore.nn", "fvcore.nn.flop_count")
    own = ("matching_functions", "metric_calculators", "model_merger", "utils", "graphs")
    with (
        mock.patch.dict(sys.modules, {n: Anything(n) for n in stand_ins}),
        mock.patch.object(sys, "path", [checkout(), *sys.path]),
    ):
        for name in [n for n in sys.modules if n.split(".")[0] in own]:
            del sys.modules[name]
        yield importlib.import_module("model_merger")


def match_tensors_zipit() -> Callable[..., tuple[Tensor, Tensor]]:
    path = Path(checkout()) / "matching_functions.py"
    spec = importlib.util.spec_from_file_location("zipit_matching_functions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    unused = {n: Anything(n) for n in ("networkx", "sklearn", "sklearn.cluster")}
    with mock.patch.dict(sys.modules, unused):
        spec.loader.exec_module(module)
    return module.match_tensors_zipit


def labels(
    match: Callable[..., tuple[Tensor, Tensor]], x: Tensor, models: int, alpha: float, beta: float
) -> Tensor:
    """-1 where a feature is in no group."""
    r = 1 - 1 / models
    _, unmerge = match({"cossim": x.clone()}, r=r, a=alpha, b=beta)
    return torch.where(unmerge.any(1), (unmerge != 0).int().argmax(1), -1)
