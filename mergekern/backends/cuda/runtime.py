"""What the CUDA backend's files share: the compiled module, its element types, where it runs."""

from __future__ import annotations

import struct

import torch

from ...dispatch import compiled

_cuda = compiled("_cuda")
DTYPES = {
    torch.float32: _cuda.DType.f32,
    torch.float64: _cuda.DType.f64,
    torch.float16: _cuda.DType.f16,
    torch.bfloat16: _cuda.DType.bf16,
}


def bits(x: float) -> int:
    """A double among the integers of a table."""
    return int(struct.unpack("q", struct.pack("d", x))[0])


def place(device: torch.device) -> dict[str, int]:
    """The number and torch's current stream of a device, as every kernel takes them."""
    if device.type == "cpu":  # emulated
        return {"device": 0, "stream": 0}
    return {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream}
