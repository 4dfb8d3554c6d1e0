"""Who serves a call, and the sentence where nobody does."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mergekern as mk
from mergekern import BackendError, dispatch
from mergekern.errors import ArgumentError

from refusal import refused
from serving import UNDER_TEST, Calls, device_of, serving

X = torch.ones(3)


def call(op: str, backend: str = "auto") -> object:
    """One small call of each op."""
    return {
        "weighted_sum": lambda: mk.weighted_sum([X], [1], backend=backend),
        "weighted_rows": lambda: mk.weighted_rows([X], torch.ones(3, 1), backend=backend),
        "merge_deltas": lambda: mk.merge_deltas(X, [X], [1], backend=backend),
        "kth_magnitude": lambda: mk.kth_magnitude(X, 1, backend=backend),
        "rank_mask": lambda: mk.rank_mask(X, mk.MagPrune(0.5, 0.1), backend=backend),
        "variance_mask": lambda: mk.variance_mask([X], 0.5, backend=backend),
        "gram": lambda: mk.gram([X], backend=backend),
        "coefficient_gradients": lambda: mk.coefficient_gradients(X, [X], backend=backend),
        "covariance": lambda: mk.covariance(X[:, None], backend=backend),
        "permute": lambda: mk.permute(X, {0: [2, 1, 0]}, backend=backend),
        "zip_match": lambda: mk.zip_match(torch.eye(2), [1, 1], backend=backend),
        "zip_weights": lambda: mk.zip_weights([X], backend=backend),
    }[op]()


# ---- selection -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", dispatch.OPS)
def test_auto_takes_the_first_that_has_no_reason_against_it(op: str, calls: Calls) -> None:
    call(op)
    free = [b for b in dispatch.ORDER["cpu"] if dispatch.why_not(b, op, "cpu") is None]
    assert calls.backends() == {free[0]}


@pytest.mark.parametrize("op", dispatch.OPS)
def test_auto_falls_back_on_a_fact_known_before(
    op: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch._WHY_NOT, "cpu", lambda device: "is on holiday")
    call(op)
    assert calls.backends() == {"torch"}
    with refused(op, "cpu: is on holiday", error=BackendError, sentence=False):
        call(op, "cpu")


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_environment_replaces_auto(
    backend: str, op: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_BACKEND", backend)
    call(op)
    assert calls.backends() == {backend}
    calls.clear()
    call(op, "torch")
    assert calls.backends() == {"torch"}


@pytest.mark.parametrize("op", dispatch.OPS)
def test_an_unknown_backend_is_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(op, "fastest: no such backend", "torch", error=BackendError, sentence=False):
        call(op, "fastest")
    monkeypatch.setenv("MERGEKERN_BACKEND", "fastest")
    with refused(op, "fastest: no such backend", error=BackendError, sentence=False):
        call(op)


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_without_that_kernel_says_so(backend: str, op: str) -> None:
    reason = dispatch.why_not(backend, op, device_of(backend))
    if op in dispatch.KERNELS[backend]:
        assert reason is None or reason.startswith(f"{backend}: ")
    else:
        assert reason is not None
        with refused(op, f"{backend}: ", error=BackendError, sentence=False):
            call(op, backend)


def test_a_backend_named_for_the_wrong_device_does_not_fall_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("MERGEKERN_HOST_CUDA", raising=False)
    with refused("weighted_sum", "triton: ", error=BackendError, sentence=False):
        call("weighted_sum", "triton")
    with refused("weighted_sum", "cuda: ", error=BackendError, sentence=False):
        call("weighted_sum", "cuda")


def test_emulated_kernels_say_whom_they_serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MERGEKERN_HOST_CUDA", str(tmp_path))
    absent = f"MERGEKERN_HOST_CUDA names {tmp_path}, where build_host_cuda.py has built nothing"
    assert dispatch._compiled.__wrapped__("_cuda") == absent
    emulated = SimpleNamespace(why_not=lambda: "", emulated=True)
    monkeypatch.setattr(dispatch, "_compiled", lambda module: emulated)
    assert dispatch.why_not("cuda", "weighted_sum", "cpu") is None
    expected = "cuda: MERGEKERN_HOST_CUDA is set, which serves CPU tensors; got one on cuda"
    assert dispatch.why_not("cuda", "weighted_sum", "cuda") == expected


@pytest.mark.parametrize("backend", UNDER_TEST)
def test_a_reason_is_one_sentence_that_begins_with_the_name(backend: str) -> None:
    for op, device, dtype in itertools.product(
        dispatch.OPS, ("cpu", "cuda", "meta"), (None, torch.float32, torch.int64)
    ):
        reason = dispatch.why_not(backend, op, device, dtype)
        if reason is not None:
            assert reason.startswith(f"{backend}: ")
            assert "\n" not in reason
            assert not reason.endswith(".")


def test_every_op_has_the_two_backends_of_any_machine() -> None:
    for op in dispatch.OPS:
        assert {"torch", "cpu"} <= set(serving(op))


@pytest.mark.parametrize("op", dispatch.OPS)
def test_a_kernel_that_fails_fails(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" does not catch an error and try the next one."""

    def broken(backend: str, *_: str) -> Any:
        def kernel(*args: object) -> None:
            raise ZeroDivisionError(backend)

        return kernel

    monkeypatch.setattr(dispatch, "load", broken)
    with pytest.raises(ZeroDivisionError):
        call(op)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_seventeen_separate_axes(backend: str) -> None:
    """Axes that no view can merge, more of them than any model has."""
    reason = dispatch.why_not(backend, "weighted_sum", "cpu")
    if reason:
        pytest.skip(reason)
    x = torch.ones((2,) * 17).permute(*range(17)[::-1])
    x[(0,) * 17] = 3.0
    assert torch.equal(mk.weighted_sum([x], [2], backend=backend), 2 * x)
    assert torch.equal(mk.merge_deltas(x, [x + 1], [1], backend=backend), x + 1)
    assert mk.kth_magnitude(x, 1, backend=backend)[:3] == (3.0, 0, 1)
    assert mk.gram([x], backend=backend).item() == x.numel() + 8


# ---- threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", ["1", "2", "5"])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_each_task_runs_once(
    count: int, threads: str, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_THREADS", threads)
    done: list[int] = []
    cpu_backend.parallel(done.append, count)
    assert sorted(done) == list(range(count))


def test_tasks_run_at_the_same_time(cpu_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks that wait for each other end only if three threads work."""
    monkeypatch.setenv("MERGEKERN_THREADS", "3")
    meeting = threading.Barrier(3, timeout=20)
    cpu_backend.parallel(lambda i: meeting.wait(), 3)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_an_error_in_a_task_comes_back(
    threads: str, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_THREADS", threads)
    for bad in (0, 7, 15):

        def task(i: int, bad: int = bad) -> None:
            if i == bad:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            cpu_backend.parallel(task, 16)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", ""])
def test_a_bad_number_of_threads_is_refused(
    text: str, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_THREADS", text)
    with pytest.raises(ArgumentError, match="MERGEKERN_THREADS"):
        cpu_backend.threads()


def test_the_default_is_the_number_of_torch(
    cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MERGEKERN_THREADS", raising=False)
    assert cpu_backend.threads() == torch.get_num_threads()


def test_ops_from_many_threads_at_once(cpu_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are re-entrant and callers share the pool."""
    monkeypatch.setenv("MERGEKERN_THREADS", "2")
    xs = [torch.full((600_000,), float(i)) for i in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            got = mk.weighted_sum([xs[i], xs[i]], [1, 2], backend="cpu")
            if not bool((got == 3.0 * i).all()):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork: not on this system")
def test_a_forked_child_makes_its_own_pool(
    cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As data loaders do; the threads of the parent's pool do not exist in the child."""
    monkeypatch.setenv("MERGEKERN_THREADS", "2")
    x = torch.ones(600_000)
    mk.weighted_sum([x], [2], backend="cpu")
    child = os.fork()
    if child == 0:
        ok = cpu_backend._pool is None
        done: list[int] = []
        cpu_backend.parallel(done.append, 10)
        os._exit(0 if ok and sorted(done) == list(range(10)) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_covariance_on_a_gpu_is_tritons_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one with Hopper's instructions; the order of other ops is another."""
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    gpu = torch.device("cuda:0")
    assert dispatch.select("auto", "covariance", gpu, torch.bfloat16) == "triton"
    assert dispatch.select("auto", "gram", gpu, torch.bfloat16) == "cuda"
