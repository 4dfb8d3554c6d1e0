"""wudi against Adam on its loss in float64, wudi_exact against least squares, and their edges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mergekern as mk
from mergekern.check import name_of
from mergekern.methods import REGISTRY

from accuracy import assert_bits_equal, assert_within, half_ulp
from engine.models import read_folder, tensors, write_folder
from refusal import refused

U = 2.0**-24
# What `wudi` promises of the merged task vector's norm, by the models' type.
PROMISED = {torch.float32: 1e-6, torch.float64: 1e-12}
SHAPES = [(24, 40, 4), (40, 24, 2), (32, 32, 8), (16, 128, 3)]  # the last has a singular G


def family(
    out: int, into: int, n: int, size: float = 1e-3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    """A base and n models beside it."""
    g = torch.Generator().manual_seed(out + n)
    base = torch.randn(out, into, generator=g)
    xs = [base + size * torch.randn(out, into, generator=g) for _ in range(n)]
    return base.to(dtype), [x.to(dtype) for x in xs]


def by_autograd(taus: list[Tensor], steps: int) -> Tensor:
    """The formula as the paper has it."""
    stack = torch.stack(taus)
    w = stack.sum(0).requires_grad_()
    adam = torch.optim.Adam([w], lr=1e-5)
    for _ in range(steps):
        adam.zero_grad()
        loss(w, stack).backward()
        adam.step()
    return w.detach()


def loss(w: Tensor, taus: Tensor) -> Tensor:
    products = (w - taus) @ taus.transpose(1, 2)
    return (products.square().sum((1, 2)) / taus.square().sum((1, 2))).sum()


def distance(got: Tensor, expected: Tensor) -> Tensor:
    return (got.double() - expected).norm()


@pytest.mark.parametrize("dtype", PROMISED, ids=name_of)
@pytest.mark.parametrize(("out", "into", "n"), SHAPES)
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_steps_of_adam(out: int, into: int, n: int, size: float, dtype: torch.dtype) -> None:
    """Within what is promised, and float32 models no further off than the paper's form in it.

    Beside what one rounding of the task vectors does to the paper's form: where a gradient is 0
    but for rounding, Adam makes it a step, and that is up to 1e-11 here.
    """
    base, xs = family(out, into, n, size, dtype)
    taus = [x - base for x in xs]
    got = mk.merge_tensors(taus, "wudi", base=torch.zeros_like(base))
    expected = by_autograd([t.double() for t in taus], 300)
    error = distance(got, expected)
    turned = by_autograd([t.double() * (1 + 2.0**-52) for t in taus], 300)
    bound = PROMISED[dtype] * expected.norm() + 8 * distance(turned, expected)
    assert_within(error, torch.zeros(()).double(), bound)
    if dtype == torch.float32:
        assert error <= distance(by_autograd(taus, 300), expected)


def test_the_first_step_is_the_rate_times_the_sign() -> None:
    """g / (|g| + eps): 8 roundings of float32 beside that of the result."""
    base, xs = family(9, 7, 3)
    taus = torch.stack([x.double() - base for x in xs])
    w = taus.sum(0).requires_grad_()
    (g,) = torch.autograd.grad(loss(w, taus), w)
    expected = base.double() + w.detach() - 1e-3 * g / (g.abs() + 1e-8)
    got = mk.merge_tensors(xs, "wudi", base=base, steps=1, rate=1e-3)
    assert_within(got, expected, half_ulp(expected, torch.float32) * (1 + U) + 8 * U * 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
def test_no_step_is_the_sum(dtype: torch.dtype) -> None:
    base, xs = family(9, 7, 3, 1.0, dtype)
    got = mk.merge_tensors(xs, "wudi", base=base, steps=0, lambda_=0.3)
    total = sum(x.double() - base.double() for x in xs)
    size = sum(x.double().abs() + base.double().abs() for x in xs)
    expected = base.double() + 0.3 * total
    assert_within(got, expected, half_ulp(expected, dtype) * (1 + U) + 8 * 2.0**-53 * size)
    assert got.dtype == dtype


def test_16_bit_models_are_read_exactly_and_rounded_once() -> None:
    base, xs = family(20, 30, 4, 0.1, torch.bfloat16)
    wide = mk.merge_tensors(xs, "wudi", base=base, out_dtype=torch.float32)
    assert_bits_equal(wide, mk.merge_tensors([x.float() for x in xs], "wudi", base=base.float()))
    got = mk.merge_tensors(xs, "wudi", base=base)
    assert_within(got, wide.double(), half_ulp(wide, torch.bfloat16) * (1 + 2.0**-15))


@pytest.mark.parametrize("dtype", PROMISED, ids=name_of)
@pytest.mark.parametrize("method", ["wudi", "wudi_exact"])
def test_one_model_is_returned(method: str, dtype: torch.dtype) -> None:
    base, (x,) = family(30, 20, 1, 2.0**-10, dtype)
    base.mul_(2**10).round_().div_(2**10)  # so that x - base is exact
    x = base + (x * 2**12).round() / 2**12
    before = x.clone(), base.clone()
    assert_bits_equal(mk.merge_tensors([x], method, base=base), x)
    assert_bits_equal(x, before[0])
    assert_bits_equal(base, before[1])


@pytest.mark.parametrize("method", ["wudi", "wudi_exact"])
def test_a_task_vector_of_length_0_adds_nothing_to_a_matrix(method: str) -> None:
    base, xs = family(30, 20, 3)
    without = mk.merge_tensors(xs, method, base=base)
    assert without.isfinite().all()
    assert_bits_equal(mk.merge_tensors([*xs, base], method, base=base), without)
    assert_bits_equal(mk.merge_tensors([base, base], method, base=base), base)


@pytest.mark.parametrize("method", ["wudi", "wudi_exact"])
def test_tiny_and_huge_task_vectors(method: str) -> None:
    """Their squares leave float32, not what is computed of them."""
    for size in (1e-30, 1e30):
        taus = [size * t for t in family(6, 5, 2, 1.0)[1]]
        got = mk.merge_tensors(taus, method, base=torch.zeros(6, 5), **rate(method, size))
        unit = mk.merge_tensors(
            [t / size for t in taus], method, base=torch.zeros(6, 5), **rate(method, 1.0)
        )
        assert got.isfinite().all()
        if method == "wudi_exact":  # a small multiple of the condition of G
            assert_within(got / size, unit.double(), 1e-5 * unit.abs().max())


def rate(method: str, value: float) -> dict[str, float]:
    return {"rate": min(1.0, value)} if method == "wudi" else {}


@pytest.mark.parametrize("method", ["wudi", "wudi_exact"])
def test_the_order_of_models_does_not_matter(method: str) -> None:
    base, xs = family(30, 20, 5)
    got, turned = (mk.merge_tensors(m, method, base=base) for m in (xs, xs[::-1]))
    size = (got - base).double().norm()
    assert_within(distance(turned, got.double()), torch.zeros(()).double(), 1e-6 * size)


def test_a_step_is_one_product_for_any_number_of_models() -> None:
    """In flops, of which torch counts those of products that are not in place."""
    out, into = 24, 16

    def flops(n: int, steps: int) -> int:
        base, xs = family(out, into, n)
        with FlopCounterMode(display=False) as counter:
            mk.merge_tensors(xs, "wudi", base=base, steps=steps)
        return counter.get_total_flops()

    for n in (2, 8):
        assert flops(n, 40) - flops(n, 20) == 20 * (2 * out * into * into)
        assert flops(n, 0) == n * (2 * out * into * into)


# ---- wudi_exact ------------------------------------------------------------------------------


def least_squares(taus: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The least W with W unit_i^T = tau_i unit_i^T, all i, and the singular values."""
    units = [t / t.norm() for t in taus]
    a = torch.cat([u.T for u in units], 1).numpy()
    b = torch.cat([t @ u.T for t, u in zip(taus, units, strict=True)], 1)
    u, s, vt = torch.linalg.svd(torch.from_numpy(a), full_matrices=False)
    kept = s > 1e-10 * s[0]
    inverse = (vt[kept].T / s[kept]) @ u[:, kept].T
    return b @ inverse, s[kept]


@pytest.mark.parametrize(("out", "into", "n"), SHAPES)
def test_exact_is_least_squares(out: int, into: int, n: int) -> None:
    """Within condition x in x 2**-53 of the task vectors, the condition that of G."""
    base, xs = family(out, into, n, 1.0, torch.float64)
    taus = [x - base for x in xs]
    got = mk.merge_tensors(xs, "wudi_exact", base=base)
    expected, s = least_squares(taus)
    condition = float((s[0] / s[-1]) ** 2)
    size = sum(t.norm() for t in taus) + base.norm()
    bound = 8 * condition * into * 2.0**-53 * size
    assert_within(distance(got - base, expected), torch.zeros(()).double(), bound)
    stack = torch.stack(taus)
    assert loss(got - base, stack) <= loss(by_autograd(taus, 300), stack)


def test_exact_of_a_singular_matrix_is_0_where_no_task_vector_reaches() -> None:
    """Inputs that all task vectors leave alone, in integers, so that it is exactly so."""
    g = torch.Generator().manual_seed(0)
    base = torch.randint(-9, 9, (8, 12), generator=g).double()
    taus = [torch.randint(-9, 9, (8, 12), generator=g).double() for _ in range(2)]
    for t in taus:
        t[:, 3] = 0
        t[:, 7] = t[:, 6]
    got = mk.merge_tensors([base + t for t in taus], "wudi_exact", base=base) - base
    s = least_squares(taus)[1]
    bound = 8 * (s[0] / s[-1]) ** 2 * 12 * 2.0**-53 * sum(t.norm() for t in taus)
    assert_within(got[:, 3], torch.zeros(8).double(), bound)
    assert_within(got[:, 6] - got[:, 7], torch.zeros(8).double(), bound)


# ---- other tensors, whole models, refusals ---------------------------------------------------


@pytest.mark.parametrize("method", ["wudi", "wudi_exact"])
@pytest.mark.parametrize("shape", [(7,), (), (3, 4, 2, 2), (0, 5), (5, 0)])
def test_what_is_no_matrix_is_averaged(shape: tuple[int, ...], method: str) -> None:
    g = torch.Generator().manual_seed(0)
    base, *xs = (torch.randn(shape, generator=g) for _ in range(4))
    got = mk.merge_tensors(xs, method, base=base, lambda_=0.5)
    expected = mk.merge_tensors(
        xs, "task_arithmetic", base=base, weight=1.0, normalize=True, lambda_=0.5
    )
    assert_bits_equal(got, expected)


def config_of(method: str, folders: list[Path]) -> dict[str, Any]:
    base, *models = ({"model": str(f)} for f in folders)
    return {"merge_method": method, "base_model": base["model"], "models": models}


def test_checkpoints_as_in_memory(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / f"m{i}", tensors(i)) for i in range(3)]
    for method in ("wudi", "wudi_exact"):
        config = config_of(method, folders)
        mk.merge_checkpoints(config, tmp_path / method, progress=False)
        base, *models = (tensors(i) for i in range(3))
        expected = mk.merge_state_dicts(models, method, base=base)
        got = read_folder(tmp_path / method)
        for key, x in expected.items():
            assert_bits_equal(got[key], x)


def test_memory_is_planned_with_what_is_computed_with(tmp_path: Path) -> None:
    """G of 300 x 300 twice: more than the models themselves."""
    x = {"w": torch.zeros(8, 300)}
    folders = [write_folder(tmp_path / f"m{i}", x) for i in range(2)]
    for method in ("wudi", "wudi_exact"):
        plan, _ = mk.plan_merge(config_of(method, folders), tmp_path / "out")
        (task,) = plan.tasks
        assert task.scratch == REGISTRY[method].scratch({}, (8, 300)) > 16 * 300**2
        assert plan.peak == 8 * 300 * 4 * 3 + task.scratch
        with pytest.raises(mk.CheckpointError, match="scratch and result and cannot be cut"):
            mk.plan_merge(config_of(method, folders), tmp_path / "out", memory="1MiB")


def test_refusals() -> None:
    base, xs = family(4, 5, 2)
    xs[1][2, 3] = math.nan
    for method in ("wudi", "wudi_exact"):
        with refused(method, "task vector 1 of layer.3[2, 3] is not finite; got nan"):
            mk.merge_tensors(xs, method, base=base, name="layer.3")
        with pytest.raises(mk.ArgumentError, match="needs a base model"):
            mk.merge_tensors(xs, method)
        with pytest.raises(mk.BackendError, match=f"{method}: cpu"):
            mk.merge_tensors(xs, method, base=base, backend="cpu")
    with refused("wudi", "steps is out of range"):
        mk.merge_tensors(xs, "wudi", base=base, steps=-1)
    with refused("wudi", "rate is out of range"):
        mk.merge_tensors(xs, "wudi", base=base, rate=-1e-5)
