"""What is refused of a GPU's tensors, in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mergekern as mk
from mergekern import dispatch

from refusal import refused
from required import unavailable

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_old_gpus_are_not_served(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type("Module", (), {"why_not": staticmethod(lambda: "")})
    monkeypatch.setattr(dispatch, "_compiled", lambda name: module)
    monkeypatch.setattr(dispatch, "emulating", lambda: False)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = dispatch.why_not(backend, "weighted_sum", "cuda:0")
    if reason == "triton: triton is not installed":
        unavailable(backend, reason)
    assert reason == f"{backend}: serves GPUs of capability 8.0 on; got 7.5"
    with refused("weighted_sum", reason, error=mk.BackendError, sentence=False):
        dispatch.select(backend, "weighted_sum", torch.device("cuda:0"), torch.float32)
    # Under auto the next one serves.
    assert dispatch.select("auto", "weighted_sum", torch.device("cuda:0"), torch.float32) == "torch"


CALLS: dict[str, Any] = {
    "weighted_sum": lambda x, y: mk.weighted_sum([x, y], [0.5, 0.5]),
    "merge_deltas": lambda x, y: mk.merge_deltas(x, [y], [0.5]),
    "gram": lambda x, y: mk.gram([x, y]),
    "coefficient_gradients": lambda x, y: mk.coefficient_gradients(x, [y]),
    "covariance": lambda x, y: mk.covariance(x, y),
    "kth_magnitude": lambda x, y: mk.kth_magnitude(x, 3, base=y),
}


@on_gpu
@pytest.mark.parametrize("op", CALLS)
def test_tensors_on_two_devices(op: str) -> None:
    x = torch.ones(8, 4)
    for pair in ((x, x.cuda()), (x.cuda(), x)):
        with refused(op, "device"):
            CALLS[op](*pair)


@on_gpu
def test_too_little_memory_says_how_much_is_needed() -> None:
    free = torch.cuda.mem_get_info()[0]
    x = torch.ones(1, dtype=torch.bfloat16, device="cuda").expand(free // 2, 2)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        mk.weighted_sum([x, x], [0.5, 0.5])
