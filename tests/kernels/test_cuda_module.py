"""The CUDA module on a machine without a device."""

from __future__ import annotations

import importlib.util
import re
import sys

from kernels.sass import run
from required import unavailable

WITHOUT_DEVICE = """
import mergekern._cpu  # registers some of the same C++ types in the same process
from mergekern import _cuda

print(_cuda.why_not())
f32 = _cuda.DType.f32
try:
    _cuda.weighted_sum(
        out=16, out_dtype=f32, xs=16, x_dtype=f32, weights=16, n=3, numel=1000, divisor=1.0,
        wide=True, device=7, stream=0,
    )
except RuntimeError as error:
    print(error)
"""


def test_loads_and_says_why_it_cannot_run() -> None:
    if importlib.util.find_spec("mergekern._cuda") is None:
        unavailable("cuda", "mergekern._cuda is not built: MERGEKERN_BUILD=cuda with nvcc on PATH")
    reason, error = run(
        [sys.executable, "-c", WITHOUT_DEVICE], CUDA_VISIBLE_DEVICES=""
    ).splitlines()
    assert re.fullmatch(
        r"no usable CUDA driver \(cudaGetDeviceCount: .+\); install one that serves CUDA \d+\.\d"
        r"|no CUDA device is visible; see CUDA_VISIBLE_DEVICES",
        reason,
    )
    assert error.startswith(
        "weighted_sum: CUDA failed on device 7 with 3 inputs of 1000 elements; got cudaError"
    )
