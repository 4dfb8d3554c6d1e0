"""Tables in device memory, through which a GPU kernel reaches any number of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ON_HOST = 1 << 16  # programs up to which their owners are listed on the host


def upload(
    values: Sequence[float] | np.ndarray, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A 1-d table on `device`, enqueued on its current stream.

    From pinned memory, because a copy from pageable memory waits for everything in the stream;
    torch keeps the pinned buffer until the copy is done.
    """
    if device.type == "cpu":  # interpreted or emulated kernels
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor begins at a multiple of 16 bytes, as wide loads and stores need."""
    return all(x.data_ptr() % 16 == 0 for x in tensors)


def owners(counts: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """int32, for each of sum(counts) programs the entry that it belongs to."""
    total = int(sum(counts))
    if total <= _ON_HOST:  # a copy takes less than the launches below
        return upload(np.repeat(np.arange(len(counts)), counts), torch.int32, device)
    repeats = upload(counts, torch.int64, device)
    return torch.repeat_interleave(repeats, output_size=total).to(torch.int32)
