"""rank_mask: exact ranks within rows, and draws that depend on nothing but their number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergekern as mk
from mergekern import MagPrune, reference
from mergekern.check import accumulator, name_of

import cases
from cases import CATALOGUE, Case, values
from refusal import refused

OP = "rank_mask"
RULE = MagPrune(0.5, 0.3, seed=11, name="layer.weight", model=2)


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    flat = np.unpackbits(bits.cpu().numpy(), count=math.prod(shape))
    return torch.from_numpy(flat.astype(bool)).reshape(shape)


def expected_mask(x: Tensor, base: Tensor | None, rule: MagPrune, first: int = 0) -> Tensor:
    """From the definition, with torch's stable sort."""
    acc = accumulator(x.dtype)
    d = x.cpu().to(acc) if base is None else x.cpu().to(acc) - base.cpu().to(acc)
    rows, nan = (v.movedim(1, -1) if x.ndim > 1 else v.reshape(1, -1) for v in (d.abs(), d.isnan()))
    order = torch.where(nan, 0, rows).argsort(dim=-1, stable=True)
    last = nan.gather(-1, order).int().argsort(dim=-1, stable=True)  # NaN above everything
    order = order.gather(-1, last)
    ranks = order.argsort(dim=-1)
    limits = torch.from_numpy(rule.limits(rows.shape[-1]).astype(np.int64))[ranks]
    limits = limits.movedim(-1, 1) if x.ndim > 1 else limits.reshape(x.shape)
    draws = [reference._draw(rule.key, first + e) for e in range(x.numel())]
    return torch.tensor(draws, dtype=torch.int64).reshape(x.shape) < limits


def check(x: Tensor, base: Tensor | None, backend: str, rule: MagPrune = RULE) -> None:
    got = mk.rank_mask(x, rule, base=base, backend=backend)
    mask = expected_mask(x, base, rule)
    assert torch.equal(unpacked(got.mask.bits, tuple(x.shape)), mask)
    tail = np.unpackbits(got.mask.bits.cpu().numpy())[x.numel() :]
    assert not tail.any()
    acc = accumulator(x.dtype)
    d = x.cpu().to(acc) if base is None else x.cpu().to(acc) - base.cpu().to(acc)
    for norm, part in ((got.everything, d), (got.kept, d[mask])):
        exact = float(part.double().abs().sum())
        if math.isfinite(exact):  # a float64 sum of n terms of one sign
            assert abs(norm - exact) <= x.numel() * 2.0**-52 * exact
        else:
            assert math.isnan(norm) == math.isnan(exact)


@pytest.mark.parametrize(
    "case", [c for c in CATALOGUE if c.n == 3 and math.prod(c.shape) < 5000], ids=str
)
def test_catalogue(case: Case, backend: str, device: str) -> None:
    x, base, _ = case.tensors(device)
    check(x, base, backend)
    check(x, None, backend)


SHAPES = [
    (),
    (0,),
    (1,),
    (7,),
    (1, 1),
    (5, 1),  # rows of one element: Linear(1, 5)
    (1, 9),
    (3, 0, 2),
    (8, 1, 3, 3),  # depthwise
    (6, 5, 3, 3),
    (11, 4, 1, 1),
    (17, 33),
    (9, 1000),
    (3, 5000),
]


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "equal", "nan", "infinite", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], kind: str, backend: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, base = (values(shape, dtype, kind, seed=s).to(device) for s in (1, 2))
        check(x, base, backend)


def test_rows_run_along_axis_1_of_strided_tensors(backend: str, device: str) -> None:
    wide = values((40, 6, 5), torch.float32).to(device)
    for x in (wide.permute(2, 0, 1), wide[::2, :, 1:4], wide.transpose(0, 2)):
        check(x, None, backend)


def test_hard_rows(backend: str, device: str) -> None:
    """Many below the bins, all in one bin but unequal, few distinct values, one outlier."""
    g = torch.Generator().manual_seed(3)
    n = 3000
    rows = [
        torch.rand(n, generator=g) * 1e-20,
        torch.cat([torch.rand(n - 1, generator=g) * 1e-12, torch.ones(1)]),
        1 + torch.rand(n, generator=g) * 1e-6,
        torch.randint(0, 3, (n,), generator=g).float(),
        torch.exp(20 * torch.randn(n, generator=g)),
        torch.zeros(n),
        torch.arange(n).float().flip(0),
    ]
    x = torch.stack(rows).to(device)
    check(x, None, backend)
    check(x.double(), None, backend)
    check(x[1:2, :700], None, backend)


def test_a_part_continues_the_draws_of_the_whole(backend: str, device: str) -> None:
    x = values((24, 9), torch.float32).to(device)
    whole = unpacked(mk.rank_mask(x, RULE, backend=backend).mask.bits, (24, 9))
    for begin, end in ((0, 5), (5, 24), (3, 4)):
        part = mk.rank_mask(x[begin:end], RULE, first=begin * 9, backend=backend)
        assert torch.equal(unpacked(part.mask.bits, (end - begin, 9)), whole[begin:end])


@pytest.mark.parametrize("threads", ["1", "3"])
def test_threads_and_chunks_change_nothing(
    threads: str, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = values((61, 37), torch.bfloat16)
    expected = mk.rank_mask(x, RULE, backend="cpu").mask.bits
    monkeypatch.setenv("MERGEKERN_THREADS", threads)
    monkeypatch.setattr(cpu_backend, "CHUNK", 37 * 8)
    assert torch.equal(mk.rank_mask(x, RULE, backend="cpu").mask.bits, expected)


def test_chances_follow_the_ranks(backend: str, device: str) -> None:
    """Kept shares of the lowest and highest quarter against their binomial bounds."""
    rows, n = 200, 64
    x = torch.arange(1, n + 1).float().repeat(rows, 1).to(device)
    rule = MagPrune(0.5, 0.25, seed=5)
    mask = unpacked(mk.rank_mask(x, rule, backend=backend).mask.bits, (rows, n))
    chance = torch.from_numpy(rule.limits(n).astype(np.float64)) / 65536
    for part in (slice(0, n // 4), slice(3 * n // 4, n)):
        p, count = chance[part], rows
        mean, sigma = float(p.sum() * count), float((p * (1 - p) * count).sum().sqrt())
        assert abs(float(mask[:, part].sum()) - mean) < 5 * sigma


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3e-30, math.inf, math.nan]), max_size=40),
    st.integers(1, 5),
)
def test_property_small(numbers: list[float], width: int) -> None:
    rows = len(numbers) // width
    x = torch.tensor(numbers[: rows * width], dtype=torch.float32).reshape(rows, width)
    for name in ("torch", "cpu"):
        if not mk.dispatch.why_not(name, OP, "cpu"):
            got = unpacked(mk.rank_mask(x, RULE, backend=name).mask.bits, (rows, width))
            assert torch.equal(got, expected_mask(x, None, RULE))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_agrees_with_the_reference(dtype: torch.dtype, backend: str, device: str) -> None:
    x, base = Case(shape=(5, 23), dtype=dtype, values="mixed", n=2).tensors(device)
    got = mk.rank_mask(x, RULE, base=base, backend=backend)
    bits = torch.zeros((x.numel() + 7) // 8, dtype=torch.uint8)
    reference.rank_mask(bits, x.cpu(), base.cpu(), RULE, 0)
    assert torch.equal(got.mask.bits.cpu(), bits)


X = torch.ones(2, 3)


def test_refusals() -> None:
    with refused(OP, "density -+ epsilon is out of range", "0.2 to 1.2"):
        mk.rank_mask(X, MagPrune(0.7, 0.5))
    with refused(OP, "density -+ epsilon"):
        mk.rank_mask(X, MagPrune(0.1, 0.2))
    with refused(OP, "density -+ epsilon"):
        mk.rank_mask(X, MagPrune(0.5, -0.1))
    with refused(OP, "density -+ epsilon"):
        mk.rank_mask(X, MagPrune(math.nan, 0.1))
    with refused(OP, "base differs from x in shape"):
        mk.rank_mask(X, RULE, base=torch.ones(3, 2))
    with refused(OP, "int64"):
        mk.rank_mask(X.long(), RULE)
