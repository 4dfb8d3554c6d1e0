"""Many tensors in one buffer: torch.cat to the bit, and few launches on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mergekern as mk
from mergekern import dispatch
from mergekern.check import FLOATS, name_of
from mergekern.ops.permute import end_to_end

import cases
from accuracy import assert_bytes_equal
from cases import values
from required import unavailable
from serving import device_of

PERMUTE = "permute"  # of which it is a part
SIZES = (0, 1, 8, 64, 3, 1031, 8, 16, 0, 3000, 128)


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """The others take torch.cat itself."""
    name: str = request.param
    reason = dispatch.why_not(name, PERMUTE, device_of(name))
    if reason:
        unavailable(name, reason)
    return name


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_it_is_cat(dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    sides = [
        [cases.LAYOUTS[layout](values((2, n), dtype, seed=s).to(device)) for n in SIZES]
        for s in range(3)
    ]
    sides.append([x.to(torch.float64) for x in sides[0][::2]])  # another number, another dtype
    got = end_to_end(sides, backend)
    for buffer, xs in zip(got, sides, strict=True):
        assert_bytes_equal(buffer, torch.cat([x.reshape(-1) for x in xs]))


@pytest.mark.parametrize("sizes", [(0, 0), (512,), (16, 48)], ids=str)
def test_a_few(sizes: tuple[int, ...], backend: str, device: str) -> None:
    xs = [values((n,), torch.bfloat16).to(device) for n in sizes]
    (got,) = end_to_end([xs], backend)
    assert_bytes_equal(got, torch.cat(xs))


class _Work(TorchDispatchMode):
    """Operators of torch that start kernels on a GPU."""

    VIEWS = ("detach", "view", "_reshape_alias", "split_with_sizes", "as_strided", "alias", "slice")
    HOST = ("empty", "new_empty", "lift_fresh", "promote_types", "_to_copy")  # or a copy to the GPU

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in self.VIEWS + self.HOST:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What would start a kernel: functions of _cuda, and operators of torch."""
    from mergekern.backends.cuda.runtime import _cuda

    work = _Work()

    def counted(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def call(**given: Any) -> None:
            work.seen.append(name)
            kernel(**given)

        return call

    for name in ("permute", "weighted_sum", "merge_deltas"):
        monkeypatch.setattr(_cuda, name, counted(name, getattr(_cuda, name)))
    with work:
        yield work.seen


@pytest.mark.unpoisoned  # a fill would count
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("cut", [0, 1], ids=["whole words", "odd sizes too"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_600_small_tensors_take_three_launches(
    method: str, cut: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(64 - cut, 48 - cut * (i % 5)) for i in range(600)]
    base, *models = (
        {str(i): values(s, torch.bfloat16, seed=m).to(device) for i, s in enumerate(shapes)}
        for m in range(4)
    )
    given: dict[str, Any] = {"weight": 0.3}
    if method == "task_arithmetic":
        given["base"] = base
    expected = mk.merge_state_dicts(models, method, backend="torch", **given)
    module = importlib.import_module("mergekern.methods.merge")
    monkeypatch.setattr(module, "_BUFFER", 1 << 40)  # as on a GPU
    with launches(monkeypatch) as seen:
        got = mk.merge_state_dicts(models, method, backend=backend, **given)
    kernel = "merge_deltas" if "base" in given else "weighted_sum"
    assert seen == ["permute"] * (1 + cut) + [kernel]
    for key, x in expected.items():
        assert_bytes_equal(got[key], x)
