"""What every op of the C++ backend stands on: threads, chunks and views of tensors.

Kernels are serial and own nothing; threads, chunks and scratch live here. MERGEKERN_THREADS sets
the number of threads (default: torch.get_num_threads()). Chunk borders do not depend on it, so
results do not either.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ...check import threads as threads
from ...dispatch import compiled

_cpu = compiled("_cpu")
_DTYPES = {
    torch.float32: _cpu.DType.f32,
    torch.float64: _cpu.DType.f64,
    torch.float16: _cpu.DType.f16,
    torch.bfloat16: _cpu.DType.bf16,
}

CHUNK = 1 << 18  # elements of one task of the pool: large against its overhead, small against L3

STREAM = 1 << 24  # bytes from which on outputs are written past the caches

# ---- threads ---------------------------------------------------------------------------------

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)  # a forked child has none of the pool's threads


def parallel(task: Callable[[int], None], count: int) -> None:
    """task(0) ... task(count - 1), in any order; the caller works too."""
    global _pool, _pool_size
    workers = min(threads(), count)
    if workers <= 1:
        for i in range(count):
            task(i)
        return
    if _pool is None or _pool_size < workers - 1:
        _pool, _pool_size = ThreadPoolExecutor(workers - 1, "mergekern"), workers - 1
    numbers = itertools.count()

    def work() -> None:
        while (i := next(numbers)) < count:
            task(i)

    futures = [_pool.submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:
        for future in futures:
            if not future.cancel():  # one that has not begun has nothing left to do
                future.result()


def chunks(kernel: Callable[[int, int], None], total: int, chunk: int = CHUNK) -> None:
    """kernel(begin, end) for every chunk of `total` elements."""
    if total <= chunk:
        if total:
            kernel(0, total)
        return
    parallel(lambda i: kernel(i * chunk, min(total, (i + 1) * chunk)), -(-total // chunk))


def tasks(
    sizes: Sequence[tuple[int, int]], room: int, together: int
) -> list[list[tuple[int, int, int]]]:
    """Pieces (number, first row, last row + 1) of things of (rows, elements of a row), by task.

    A task holds about `room` elements: of one large thing, in multiples of `together` rows, or of
    several small ones.
    """
    found: list[list[tuple[int, int, int]]] = []
    left = 0
    for number, (rows, width) in enumerate(sizes):
        step = max(1, room // max(1, width) // together) * together
        for begin in range(0, rows, step):
            end = min(rows, begin + step)
            if (end - begin) * width > left:
                found.append([])
                left = room
            found[-1].append((number, begin, end))
            left -= (end - begin) * width
    return found


# ---- views -----------------------------------------------------------------------------------


def collapse(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """The same elements in the same order with as few dimensions as possible."""
    sizes: list[int] = []
    steps: list[int] = []
    for size, step in zip(shape, strides):
        if size == 1:
            continue
        if sizes and steps[-1] == size * step:
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)
    return (sizes, steps) if sizes else ([1], [1])


def view(x: Tensor, *, output: bool = False, stream: bool = False) -> object:
    if x.is_contiguous():
        shape, strides = [x.numel()], [1]
    else:
        shape, strides = collapse(x.shape, x.stride())
    return _cpu.View(
        data=x.data_ptr(),
        dtype=_DTYPES[x.dtype],
        shape=shape,
        strides=strides,
        stream=stream or (output and x.nbytes >= STREAM),
    )


def matrix(x: Tensor) -> object:
    """A view of two dimensions, whatever they could be collapsed to."""
    return _cpu.View(
        data=x.data_ptr(),
        dtype=_DTYPES[x.dtype],
        shape=list(x.shape),
        strides=list(x.stride()),
        stream=False,
    )


def optional_view(x: Tensor | None) -> object:
    return None if x is None else view(x)
