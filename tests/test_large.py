"""More than 2**31 elements: 64-bit counts on every way through a tensor.

The tensors are pages that are mapped but never written, so they cost address space and no memory;
all reads of untouched pages see one page of zeros. A few kernels run over the whole range (about a
second each), the others over its end, by calling the compiled function with begin and end.
"""

from __future__ import annotations

import mmap
import resource
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import Bernoulli, reference
from mergekern.backends.torch import merge_deltas as torch_backend

from accuracy import assert_bits_equal, assert_bytes_equal

pytestmark = pytest.mark.unpoisoned  # filling these tensors would need all of the memory

TWO31 = 1 << 31
N = TWO31 + (1 << 20) + 5


def sparse(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros that occupy no memory until they are written."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared pages would be made by reading
    pages = mmap.mmap(-1, numel * dtype.itemsize, flags=private)
    return torch.frombuffer(pages, dtype=dtype)


@pytest.fixture(autouse=True)
def little_memory() -> Any:
    """The peak of this process grows by less than 2 GiB in any of these tests."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2 << 20, f"peak memory grew by {grown >> 10} MiB"


def test_weighted_sum_at_the_end(cpu_backend: Any) -> None:
    x, out = sparse(N, torch.bfloat16), sparse(N, torch.bfloat16)
    begin = TWO31 - 1000  # the range crosses the border of 32 bits
    x[begin:] = torch.arange(N - begin) % 251
    view, target = cpu_backend.view(x), cpu_backend.view(out)
    cpu_backend._cpu.weighted_sum(
        out=target, xs=[view, view], weights=[1.0, 0.5], divisor=1.0, begin=begin, end=N
    )
    expected = ((torch.arange(N - begin) % 251).float() * 1.5).to(torch.bfloat16)
    assert_bits_equal(out[begin:], expected)
    assert not out[begin - 4096 : begin].any()


def test_weighted_sum_of_strided_tensors_at_the_end(cpu_backend: Any) -> None:
    """Offsets beyond 2**31 in a strided walk, for input and output."""
    rows, columns = TWO31 // 1024 + 3, 1024
    x, out = (sparse(rows * columns, torch.bfloat16).view(rows, columns).T for _ in range(2))
    total = rows * columns
    x[-1, -2000:] = torch.arange(2000) % 251
    cpu_backend._cpu.weighted_sum(
        out=cpu_backend.view(out),
        xs=[cpu_backend.view(x)],
        weights=[2.0],
        divisor=1.0,
        begin=total - 2000,
        end=total,
    )
    assert_bits_equal(out[-1, -2000:], ((torch.arange(2000) % 251) * 2).to(torch.bfloat16))


def plain_sum(cpu_backend: Any, rules: list[object], weights: list[float]) -> object:
    ones = [1.0] * len(rules)
    return cpu_backend._cpu.Recipe(
        keep=rules,
        before=weights,
        after=ones,
        weights=weights,
        alone=[],
        rescale=ones,
        elect=cpu_backend._cpu.Elect.everyone,
        zero=cpu_backend._cpu.Zero.positive,
        max=False,
        normalize=False,
        stepwise=False,
        divide=False,
        total=1.0,
        least=0.0,
        instead=1.0,
        scale=1.0,
    )


def test_merge_deltas_at_the_end(cpu_backend: Any) -> None:
    """The draws of elements beyond 2**31, and a cut among ties there."""
    x, out = sparse(N, torch.bfloat16), sparse(N, torch.bfloat16)
    begin, end = TWO31 - 100, TWO31 + 100
    x[begin:end] = 1.0
    drawn, cut = Bernoulli(0.5, seed=3, name="embed"), TWO31 + 7
    rules = [
        cpu_backend._cpu.KeepRule.random(
            k0=drawn.key[0], k1=drawn.key[1], limit=drawn.limit, first=0
        ),
        cpu_backend._cpu.KeepRule.interval(
            low=0x3F800000, low_cut=cut, high=0x7F800002, high_cut=0
        ),
    ]
    view = cpu_backend.view(x)
    scratch = torch.zeros(2 * cpu_backend._cpu.MERGE_BLOCK)
    cpu_backend._cpu.merge_deltas(
        out=cpu_backend.view(out),
        base=None,
        xs=[view, view],
        recipe=plain_sum(cpu_backend, rules, [1.0, 2.0]),
        scratch=scratch.data_ptr(),
        begin=begin,
        end=end,
    )
    expected = [
        float(reference._draw(drawn.key, e) < drawn.limit) + 2.0 * (e < cut)
        for e in range(begin, end)
    ]
    assert_bits_equal(out[begin:end], torch.tensor(expected, dtype=torch.bfloat16))


@pytest.mark.parametrize("first", [TWO31 - 20, (1 << 35) - 20, (1 << 40) + 3], ids=hex)
def test_draws_use_both_words_of_the_counter(first: int, cpu_backend: Any) -> None:
    """Element 2**35 begins block 2**32. A stride of 0 makes a view that long out of one number."""
    drawn = Bernoulli(0.5, seed=4)
    expected = [reference._draw(drawn.key, e) for e in range(first, first + 40)]
    got = torch_backend.draws(drawn.key, first, 40, torch.device("cpu"))
    assert got.tolist() == expected

    one, out = torch.ones(1), torch.zeros(1)
    rule = cpu_backend._cpu.KeepRule.random(
        k0=drawn.key[0], k1=drawn.key[1], limit=drawn.limit, first=0
    )
    x, target = (
        cpu_backend._cpu.View(
            data=t.data_ptr(), dtype=cpu_backend._cpu.DType.f32, shape=[1 << 41], strides=[0]
        )
        for t in (one, out)
    )
    scratch = torch.zeros(cpu_backend._cpu.MERGE_BLOCK)
    for e, draw in zip(range(first, first + 40), expected, strict=True):
        cpu_backend._cpu.merge_deltas(
            out=target,
            base=None,
            xs=[x],
            recipe=plain_sum(cpu_backend, [rule], [1.0]),
            scratch=scratch.data_ptr(),
            begin=e,
            end=e + 1,
        )
        assert out.item() == float(draw < drawn.limit)


def test_kth_magnitude_of_the_whole(cpu_backend: Any) -> None:
    """Counts and the cut are beyond 2**31."""
    x = sparse(N, torch.bfloat16)
    x[-3:] = torch.tensor([5.0, -7.0, 6.0])
    assert mk.kth_magnitude(x, 3, backend="cpu")[:3] == (5.0, 2, 1)
    k = N - 10
    threshold = mk.kth_magnitude(x, k, backend="cpu")
    assert threshold == (0.0, 3, N - 3, k - 3)


def test_gram_at_the_end(cpu_backend: Any) -> None:
    x = sparse(N, torch.bfloat16)
    x[TWO31 - 2 : TWO31 + 2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scratch = torch.empty(cpu_backend._cpu.gram_scratch(n=1), dtype=torch.float64)
    dots = torch.zeros(1, dtype=torch.float64)
    cpu_backend._cpu.gram(
        xs=[cpu_backend.view(x)],
        base=None,
        scratch=scratch.data_ptr(),
        dots=dots.data_ptr(),
        begin=TWO31 - 600,
        end=N,
    )
    assert dots.item() == 30.0


def test_coefficient_gradients_at_the_end(cpu_backend: Any) -> None:
    x, grad = sparse(N, torch.bfloat16), sparse(N, torch.bfloat16)
    x[TWO31 - 2 : TWO31 + 2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    grad[TWO31 - 1 : TWO31 + 1] = torch.tensor([5.0, 6.0])
    scratch = torch.empty(cpu_backend._cpu.GRAM_LANES, dtype=torch.float64)
    dots = torch.zeros(1, dtype=torch.float64)
    cpu_backend._cpu.coefficient_gradients(
        grad=cpu_backend.view(grad),
        xs=[cpu_backend.view(x)],
        base=None,
        scratch=scratch.data_ptr(),
        dots=dots.data_ptr(),
        begin=TWO31 - 600,
        end=N,
    )
    assert dots.item() == 28.0


@pytest.mark.parametrize("backend_", ["torch", "cpu"])
def test_covariance_of_rows_far_away(backend_: str, cpu_backend: Any) -> None:
    """Rows and features that lie beyond 2**31 elements."""
    x = sparse((1 << 16) * 32770, torch.bfloat16).view(32770, 1 << 16)[:, :: (1 << 16) - 1]
    x[-2:] = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    mask = torch.arange(32770) >= 32768
    got = mk.covariance(x, mask=mask, backend=backend_)
    assert_bits_equal(got, torch.tensor([[1.0, -2.0], [-2.0, 4.0]], dtype=torch.float64))


@pytest.mark.parametrize("backend_", ["torch", "cpu"])
def test_permute_rows_far_away(backend_: str, cpu_backend: Any) -> None:
    x = sparse((1 << 16) * 32769, torch.uint8).view(32769, 1 << 16)
    x[32768] = 7
    got = mk.permute(x, {0: [32768, 0, 32768]}, backend=backend_)
    expected = torch.tensor([7, 0, 7], dtype=torch.uint8)[:, None].expand(3, 1 << 16)
    assert_bytes_equal(got, expected.contiguous())


@pytest.mark.parametrize("backend_", ["torch", "cpu"])
def test_permute_with_offsets_beyond_32_bits(backend_: str, cpu_backend: Any) -> None:
    """The last axis steps over whole rows, so its offsets do not fit the short index."""
    x = sparse((1 << 16) * 32769, torch.uint8).view(32769, 1 << 16).T[:5]
    x[:, 32768] = torch.arange(1, 6, dtype=torch.uint8)
    got = mk.permute(x, {1: [32768, 1], 0: [4, 3, 2, 1, 0]}, backend=backend_)
    expected = torch.stack([torch.arange(5, 0, -1), torch.zeros(5)], 1).to(torch.uint8)
    assert_bytes_equal(got, expected)
