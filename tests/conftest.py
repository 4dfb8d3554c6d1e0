"""What every test shares: the backend under test, proof of who ran, and poisoned memory.

`MERGEKERN_REQUIRE=cpu,cuda,triton,build,clang` turns a skip for want of one of those into a
failure.
Triton kernels run in its interpreter unless the environment says `TRITON_INTERPRET=0` (a machine
with a GPU). CUDA kernels run on the host where `MERGEKERN_HOST_CUDA` names what
`kernels/build_host_cuda.py` made. `MERGEKERN_ON_HOST=4` runs a fourth of the cases of each
test on either, one at least.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when a kernel file is imported
# Idle threads of torch sleep: spinning, they keep our own threads, and other tests, from the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
os.environ["PYTHONSAFEPATH"] = "1"  # child processes test the installed package, not the folder

import collections
import functools
import importlib.metadata
import signal
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import mergekern
from mergekern import dispatch

from required import REQUIRED, unavailable
from serving import UNDER_TEST, Calls, device_of, on_host, serving

# A shell's background jobs ignore interrupts, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# ---- the report's header and the markers -----------------------------------------------------


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def pytest_report_header() -> list[str]:
    packages = ", ".join(f"{p} {_version(p)}" for p in ("torch", "numpy", "triton"))
    lines = [f"mergekern {mergekern.__version__}; {packages}; {torch.get_num_threads()} threads"]
    for backend in UNDER_TEST:
        reason = dispatch.why_not(backend, "weighted_sum", device_of(backend))
        required = " (required)" if backend in REQUIRED else ""
        lines.append(f"backend {reason or backend + ': available'}{required}")
    return lines


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unpoisoned: tensors larger than memory, left untouched")


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


# ---- the backend under test ------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` runs over the backends that serve the module's `OP`."""
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OP"):
        metafunc.parametrize("backend", serving(metafunc.module.OP), indirect=True)


def _test_and_backend(item: pytest.Item) -> tuple[str, str]:
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return item.nodeid.partition("[")[0], given.get("backend", "")


def _again(items: list[pytest.Item]) -> set[pytest.Item]:
    """Threads and chunks are of the CPU: a test that varies them runs once on a GPU's backend."""
    seen, again = set(), set()
    for item in items:
        given = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        varied = [given.pop(name, None) for name in ("threads", "chunk")]
        test, backend = _test_and_backend(item)
        if backend in ("cuda", "triton") and varied[0] is not None and (test, str(given)) in seen:
            again.add(item)
        seen.add((test, str(given)))
    return again


def _passed_over(items: list[pytest.Item]) -> set[pytest.Item]:
    """All but one of MERGEKERN_ON_HOST (1) of each test's cases of a GPU's kernels on the host."""
    share = int(os.environ.get("MERGEKERN_ON_HOST", "1"))
    cases = collections.defaultdict(list)
    for item in items:
        test, backend = _test_and_backend(item)
        if on_host(backend):
            cases[test, backend].append(item)
    passed_over: set[pytest.Item] = set()
    for group in cases.values():
        group.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        passed_over.update(group[-(-len(group) // share) :])
    return passed_over


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = _again(items)
    dropped |= _passed_over([item for item in items if item not in dropped])
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Records which function of which backend module ops really call."""
    recorded = Calls()
    load = dispatch.load

    def spy(backend: str, op: str, part: str | None = None) -> Callable[..., Any]:
        function = load(backend, op, part)

        @functools.wraps(function)
        def recording(*args: Any, **kwargs: Any) -> Any:
            home = function.__module__.removeprefix("mergekern.").removeprefix("backends.")
            recorded.append((home.removesuffix(f".{op}"), op))
            return function(*args, **kwargs)

        return recording

    monkeypatch.setattr(dispatch, "load", spy)
    return recorded


@pytest.fixture
def backend(request: pytest.FixtureRequest, calls: Calls) -> Iterator[str]:
    """The name of one backend; the test fails if another one, or none, served its calls."""
    name: str = request.param
    reason = dispatch.why_not(name, request.module.OP, device_of(name))
    if reason:
        unavailable(name, reason)
    yield name
    if request.node.stash.get(FAILED, False):
        return  # one failure is enough
    assert calls.backends() == {name}, f"asked for {name}, served by {sorted(calls.backends())}"


@pytest.fixture
def device(backend: str) -> str:
    return device_of(backend)


@pytest.fixture
def cpu_backend() -> Any:
    """Threads, chunks and views of the C++ backend, for tests of its inner branches."""
    reason = dispatch.why_not("cpu", "weighted_sum", "cpu")
    if reason:
        unavailable("cpu", reason)
    import mergekern.backends.cpu.runtime

    return mergekern.backends.cpu.runtime


# ---- poisoned memory -------------------------------------------------------------------------

POISON_BYTE = 0xA5


def _poison(x: torch.Tensor) -> torch.Tensor:
    if x.is_meta or not x.numel():
        return x
    if x.dtype.is_floating_point or x.dtype.is_complex:
        return x.fill_(float("nan"))
    return x.fill_(POISON_BYTE & 1 if x.dtype == torch.bool else POISON_BYTE & 0x7F)


def _poisoned_numpy(shape: Any, dtype: Any = float, *args: Any, **kwargs: Any) -> np.ndarray:
    x = np.ndarray(shape, dtype, order=args[0] if args else kwargs.get("order", "C"))
    if x.size and not x.dtype.hasobject:
        x.reshape(-1).view(np.uint8)[:] = POISON_BYTE
    return x


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN (0xA5 in numpy), so that an element left out is seen."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        allocate = getattr(owner, name)

        def poisoned(*args: Any, allocate: Callable = allocate, **kwargs: Any) -> torch.Tensor:
            return _poison(allocate(*args, **kwargs))

        monkeypatch.setattr(owner, name, poisoned)
    monkeypatch.setattr(np, "empty", _poisoned_numpy)
