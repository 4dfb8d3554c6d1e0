"""Other tools on the same task, where they are installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from measure import Call

PEER_ELEMENTS = 1 << 25  # peers that sort take minutes on more


def _slice(x: Tensor) -> Tensor:
    return x.reshape(-1)[:PEER_ELEMENTS]


def _share(x: Tensor) -> float:
    return min(1.0, PEER_ELEMENTS / x.numel())


def mergekit(
    method: str, xs: list[Tensor], base: Tensor | None = None, **parameters: Any
) -> dict[str, tuple[Call, float]]:
    if importlib.util.find_spec("mergekit") is None:
        return {}
    from mergekit.merge_methods import merge_tensors

    tensors = [_slice(x) for x in ([] if base is None else [base]) + xs]

    def call() -> object:
        index = None if base is None else 0
        return merge_tensors(tensors, method, parameters=parameters, base_index=index)

    return {"mergekit": (call, _share(xs[0]))}


def peft_ties(xs: list[Tensor], density: float) -> dict[str, tuple[Call, float]]:
    if importlib.util.find_spec("peft") is None:
        return {}
    from peft.utils.merge_utils import ties

    tensors = [_slice(x) for x in xs]
    weights = torch.ones(len(xs))
    return {"peft": (lambda: ties(tensors, weights, density), _share(xs[0]))}
