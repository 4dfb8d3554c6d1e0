"""The contract of `out` that every elementwise op keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import cases
from accuracy import assert_backend_bits
from refusal import refused

Call = Callable[..., Tensor]  # call(xs, out=...) -> result


def assert_writes_only_out(call: Call, xs: list[Tensor], expected: Tensor, backend: str) -> None:
    """Dense and strided `out` get the result; the memory around and between stays."""
    for step in (1, 3):
        buffer, out = cases.guarded(tuple(expected.shape), expected.dtype, xs[0].device, step)
        result = call(xs, out=out)
        assert result.data_ptr() == out.data_ptr()
        assert_backend_bits(out, expected, backend)
        assert cases.untouched(buffer, out)


def assert_transposed_out(call: Call, xs: list[Tensor], expected: Tensor, backend: str) -> None:
    out = torch.full(expected.shape[::-1], cases.SENTINEL, dtype=expected.dtype).to(xs[0].device)
    call(xs, out=out.permute(*range(out.ndim)[::-1]))
    assert_backend_bits(out.permute(*range(out.ndim)[::-1]), expected, backend)


def assert_in_place(call: Call, xs: list[Tensor], expected: Tensor, backend: str) -> None:
    """`out` may be any one of the inputs; the others stay."""
    for i in range(len(xs)):
        inputs = [x.clone(memory_format=torch.preserve_format) for x in xs]
        call(inputs, out=inputs[i])
        assert_backend_bits(inputs[i], expected, backend)
        for j, (y, x) in enumerate(zip(inputs, xs, strict=True)):
            assert j == i or torch.equal(y, x)


def assert_refuses_bad_out(op: str, call: Call, xs: list[Tensor]) -> None:
    """`xs` are float32 vectors of one length."""
    n = len(xs[0])
    buffer = torch.zeros(2 * n + 1)
    shifted = [buffer[1 : n + 1], *xs[1:]]
    with refused(op, "overlaps an input"):
        call(shifted, out=buffer[:n])
    with refused(op, "overlaps an input"):
        call([*xs[:-1], buffer[:n]], out=buffer[: 2 * n : 2])
    assert not buffer.any()
    with refused(op, "out overlaps itself"):
        call(xs, out=torch.zeros(1).expand(n))
    with refused(op, "out", f"[{n + 1}]", f"[{n}]"):
        call(xs, out=torch.zeros(n + 1))
    with refused(op, "out", "int32"):
        call(xs, out=torch.zeros(n, dtype=torch.int32))
    with refused(op, "out", "meta"):
        call(xs, out=torch.zeros(n, device="meta"))
    with refused(op, "out", "ndarray"):
        call(xs, out=torch.zeros(n).numpy())
    odd = torch.frombuffer(bytearray(4 * n + 1), dtype=torch.float32, offset=1)
    with refused(op, "out is misaligned"):
        call(xs, out=odd)
