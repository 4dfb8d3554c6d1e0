"""Which backend serves a call: one table, one function that says why not, one that selects.

A backend is a module of `mergekern.backends` with functions named as the ops. One asked for by
name never falls back; "auto" takes the first of ORDER (for some ops ORDER_OF) that has no reason
against it. Reasons rest on facts known before the call; nothing here catches an error of a kernel.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .check import FLOATS, name_of
from .errors import BackendError

OPS = (
    "weighted_sum",
    "weighted_rows",
    "merge_deltas",
    "kth_magnitude",
    "rank_mask",
    "variance_mask",
    "gram",
    "coefficient_gradients",
    "covariance",
    "permute",
    "zip_match",
    "zip_weights",
)
BACKENDS = ("reference", "torch", "cpu", "cuda", "triton")

# Tried in this order. The order for CUDA is the design's guess until rows of a real GPU stand
# under bench/results; on a CPU, `bench/` shows `cpu` ahead of `torch` for every op.
ORDER = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
# Where another one comes first: on Hopper Triton multiplies by wgmma, csrc/cuda by the instructions
# of Ampere, which do not reach the full rate there. Not measured either.
ORDER_OF = {("covariance", "cuda"): ("triton", "cuda", "torch")}

# Kernels for GPUs: zip_match is one search, which runs on the host.
_ON_GPU = tuple(op for op in OPS if op != "zip_match")
KERNELS = {"cuda": _ON_GPU, "triton": _ON_GPU}  # the others serve every op


_REMEDIES = {
    "_cpu": "built without a C++ compiler (MERGEKERN_BUILD=cpu shows the error), or imported from "
    "a source folder that was not built",
    "_cuda": "built without nvcc; reinstall with MERGEKERN_BUILD=cuda where nvcc is on PATH",
}


def emulating() -> bool:
    """Whether CUDA kernels run on CPU tensors: MERGEKERN_HOST_CUDA names a folder with a _cuda that
    tests/kernels/build_host_cuda.py made."""
    return bool(os.environ.get("MERGEKERN_HOST_CUDA"))


def _emulated() -> ModuleType | str:
    folder = os.environ["MERGEKERN_HOST_CUDA"]
    found = importlib.machinery.PathFinder.find_spec("_cuda", [folder])
    if found is None or found.origin is None:
        return f"MERGEKERN_HOST_CUDA names {folder}, where build_host_cuda.py has built nothing"
    spec = importlib.util.spec_from_file_location("mergekern._cuda", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _compiled(module: str) -> ModuleType | str:
    """The compiled module, or the sentence why there is none."""
    if module == "_cuda" and emulating():
        return _emulated()
    if importlib.util.find_spec(f"mergekern.{module}") is None:
        return _REMEDIES[module]
    try:
        return importlib.import_module(f"mergekern.{module}")
    except ImportError as error:
        return f"mergekern.{module} does not load ({error}); reinstall mergekern"


def compiled(module: str) -> ModuleType:
    """mergekern._cpu or mergekern._cuda, for the backend files."""
    found = _compiled(module)
    if isinstance(found, str):
        raise BackendError(found)
    return found


def _why_not_cpu(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"serves CPU tensors; got one on {device}"
    found = _compiled("_cpu")
    return found if isinstance(found, str) else None


def _why_not_cuda(device: torch.device) -> str | None:
    found = _compiled("_cuda")
    if isinstance(found, str):
        return found
    reason: str = found.why_not()
    if reason:
        return reason
    if emulating():
        if device.type == "cpu":
            return None
        return f"MERGEKERN_HOST_CUDA is set, which serves CPU tensors; got one on {device}"
    if device.type != "cuda":
        return f"serves CUDA tensors; got one on {device}"
    return _too_old(device)


def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"serves GPUs of capability 8.0 on; got {major}.{minor}"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreting():
        if device.type == "cpu":
            return None
        return f"TRITON_INTERPRET is set, which serves CPU tensors; got one on {device}"
    if device.type == "cuda":
        return _too_old(device)
    return f"serves CUDA tensors (CPU ones only under TRITON_INTERPRET=1); got one on {device}"


_WHY_NOT = {"cpu": _why_not_cpu, "cuda": _why_not_cuda, "triton": _why_not_triton}


def why_not(
    backend: str, op: str, device: torch.device | str, dtype: torch.dtype | None = None
) -> str | None:
    """None if `backend` can serve `op` there, else one sentence that begins with its name.

    >>> why_not("torch", "weighted_sum", "cpu", torch.int64)
    'torch: weighted_sum takes float32, float16, bfloat16, float64; got int64'
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        return f"{backend}: no such backend; expected auto or one of {', '.join(BACKENDS)}"
    reason = None
    if op not in KERNELS.get(backend, OPS):
        reason = f"has no kernel for {op}; use backend='auto' or 'torch'"
    elif backend in _WHY_NOT:
        reason = _WHY_NOT[backend](device)
    if reason is None and dtype is not None and op != "permute" and dtype not in FLOATS:
        reason = f"{op} takes {', '.join(map(name_of, FLOATS))}; got {name_of(dtype)}"
    return None if reason is None else f"{backend}: {reason}"


def requested(backend: str) -> str:
    """`backend`, with MERGEKERN_BACKEND in the place of "auto"."""
    return os.environ.get("MERGEKERN_BACKEND", "auto") if backend == "auto" else backend


def select(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that serves this call; BackendError if none can."""
    backend = requested(backend)
    if backend != "auto":
        reason = why_not(backend, op, device, dtype)
        if reason:
            raise BackendError(f"{op}: {reason}")
        return backend
    reasons = []
    for candidate in ORDER_OF.get((op, device.type), ORDER.get(device.type, ("torch",))):
        reason = why_not(candidate, op, device, dtype)
        if reason is None:
            return candidate
        reasons.append(reason)
    raise BackendError(f"{op}: no backend for {name_of(dtype)} on {device}: {'; '.join(reasons)}")


@functools.cache
def load(backend: str, op: str, part: str | None = None) -> Callable[..., Any]:
    """The function of that name in that backend, or `part` of it; imports it on first use."""
    home = "reference" if backend == "reference" else f"backends.{backend}.{op}"
    module = importlib.import_module(f"mergekern.{home}")
    function: Callable[..., Any] = getattr(module, part or op)
    return function
