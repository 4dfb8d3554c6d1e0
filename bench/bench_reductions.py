"""Every method that reduces N models to one, as a user calls it: merge_tensors, output allocated.

Limits are what must be read and written at the least: every input once, or twice where a threshold
or an angle of the whole tensor comes first, and the result once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.ops.merge_deltas import cost

import exact
from exact import Exact
from inputs import CHECKED, models
from peers import (
    PEER_ELEMENTS,
    SORT_ELEMENTS,
    Peers,
    fusion_bench_ties,
    mergekit,
    peft_ties,
    torch_ties,
)

COLUMNS = 4096  # of the matrices of methods that rank by row


class Reduction(NamedTuple):
    """One row: the call, its limit, and what is wanted of it."""

    method: str
    parameters: dict[str, Any]
    reads: int  # of every input, at the least
    allowed: float  # times the limit
    wanted: float  # times mergekit 0.1.5
    exact: Callable[..., Exact] | None  # None: random masks, the same bits on every backend
    models: int = 3
    base: bool = True
    matrices: bool = False
    local: bool = False  # an element of the result depends on the same element of the inputs only
    sorts: bool = False  # mergekit


WEIGHTS = [0.3, 0.7, 0.1]
ALL = (
    Reduction("linear", {"weight": WEIGHTS}, 1, 1.3, 25, exact.linear, base=False, local=True),
    Reduction("task_arithmetic", {"weight": 0.3}, 1, 1.3, 25, exact.task_arithmetic, local=True),
    Reduction("ties", {"weight": 1.0, "density": 0.2}, 2, 1.6, 300, exact.ties, sorts=True),
    Reduction("dare_linear", {"weight": 0.3, "density": 0.3}, 1, 3, 80, None),
    Reduction("dare_ties", {"weight": 1.0, "density": 0.3}, 1, 3, 80, None),
    Reduction(
        "breadcrumbs",
        {"weight": 0.3, "density": 0.5, "gamma": 0.01},
        2,
        2,
        200,
        exact.breadcrumbs,
        sorts=True,
    ),
    Reduction(
        "della",
        {"weight": 1.0, "density": 0.5, "epsilon": 0.15},
        1,
        20,
        50,
        None,
        matrices=True,
        sorts=True,
    ),
    Reduction("sce", {"select_topk": 0.5}, 1, 4, 150, exact.sce, sorts=True),
    Reduction("slerp", {"t": 0.3}, 2, 1.6, 5, exact.slerp, models=1),
    Reduction("nuslerp", {"weight": [0.6, 0.4]}, 2, 1.6, 8, exact.nuslerp, models=2, base=False),
    Reduction("karcher", {}, 2, 1.6, 15, exact.karcher, base=False),
    Reduction("multislerp", {"weight": WEIGHTS}, 2, 1.6, 30, exact.multislerp),
    Reduction("model_stock", {}, 2, 1.6, 15, exact.model_stock),
    Reduction("ram", {"epsilon": 1e-5}, 1, 2, 60, exact.ram, local=True),
)


@pytest.mark.parametrize("what", ALL, ids=[r.method for r in ALL])
def bench_reductions(row, dtype: torch.dtype, nbytes: int, what: Reduction) -> None:
    base, xs = models(what.models, nbytes, dtype)
    if what.matrices:
        base, *xs = [x.view(-1, COLUMNS) for x in (base, *xs)]
    origin = base if what.base else None

    def call(base: Tensor | None = origin, xs: list[Tensor] = xs, backend: str = "auto") -> Tensor:
        return mk.merge_tensors(xs, what.method, base=base, backend=backend, **what.parameters)

    plain = PLAIN.get(what.method)
    elements = SORT_ELEMENTS if what.sorts else PEER_ELEMENTS
    one_pass = cost(what.models, base.numel(), dtype.itemsize, base=what.base)
    again = (what.reads - 1) * (what.models + what.base) * base.nbytes
    row(
        call,
        cost=one_pass._replace(bytes=one_pass.bytes + again),
        error=_error(what, call, origin, xs),
        torch=plain and (lambda: plain(base, xs, **what.parameters)),
        peers={
            **mergekit(what.method, xs, origin, elements=elements, **what.parameters),
            **(_ties_peers(base, xs, what.parameters["density"]) if what.method == "ties" else {}),
        },
        result=base.nbytes,
        allowed=what.allowed,
        wanted=what.wanted,
    )


def _error(
    what: Reduction, call: Callable[..., Tensor], base: Tensor | None, xs: list[Tensor]
) -> float:
    """Of the first elements: of the result itself where it is local, else of their own merge."""
    tensors = [x.reshape(-1)[:CHECKED] for x in ([] if base is None else [base]) + xs]
    if what.exact is None:
        small = [x.reshape(-1, *xs[0].shape[1:]) for x in tensors]
        ours, again = (call(small[0], small[1:], backend) for backend in ("auto", "torch"))
        return 0.0 if torch.equal(ours, again) else float("inf")
    if not what.local:
        tensors = _related(tensors, what.models)
    first, parts = (tensors[0], tensors[1:]) if what.base else (None, tensors)
    got = call().reshape(-1)[:CHECKED] if what.local else call(first, parts)
    return what.exact(first, parts, **what.parameters).error(got, len(tensors))


def _related(tensors: list[Tensor], n: int) -> list[Tensor]:
    """The last n with half a change in common, so that the angles between them count."""
    g = torch.Generator().manual_seed(1)
    shared = 1e-3 * torch.randn(tensors[0].shape, generator=g)
    return tensors[:-n] + [(x.float() + shared).to(x.dtype) for x in tensors[-n:]]


def _ties_peers(base: Tensor, xs: list[Tensor], density: float) -> Peers:
    return {
        **peft_ties(base, xs, density),
        **fusion_bench_ties(base, xs, density),
        **torch_ties(base, xs, density),
    }


# ---- plain torch, where it is short ------------------------------------------------------------


def _torch_linear(_: Tensor, xs: list[Tensor], weight: list[float]) -> Tensor:
    return sum(w * x for w, x in zip(weight, xs)) / sum(weight)


def _torch_task_arithmetic(base: Tensor, xs: list[Tensor], weight: float) -> Tensor:
    return base + sum(weight * (x - base) for x in xs)


def _torch_dare(base: Tensor, xs: list[Tensor], weight: float, density: float) -> Tensor:
    factor = weight / density
    return base + sum(factor * (x - base) * (torch.rand_like(x) < density) for x in xs)


def _torch_slerp(base: Tensor, xs: list[Tensor], t: float) -> Tensor:
    (x,) = xs
    angle = torch.acos(torch.dot(base, x) / (base.norm() * x.norm()))
    return (torch.sin((1 - t) * angle) * base + torch.sin(t * angle) * x) / torch.sin(angle)


def _torch_ram(base: Tensor, xs: list[Tensor], epsilon: float) -> Tensor:
    d = torch.stack([x - base for x in xs])
    changed = d.abs() > epsilon
    return base + (d * changed).sum(0) / changed.sum(0).clamp(min=1)


PLAIN: dict[str, Callable[..., Tensor]] = {
    "linear": _torch_linear,
    "task_arithmetic": _torch_task_arithmetic,
    "dare_linear": _torch_dare,
    "slerp": _torch_slerp,
    "ram": _torch_ram,
}
