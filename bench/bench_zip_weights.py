"""zip_weights: one weight of a pair, and all tensors of a pair of ViT-B."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.ops._cost import Cost
from mergekern.ops.zip_weights import cost

import vit
from inputs import half_unit, relative_error

pytestmark = pytest.mark.alignment

CHECKED = 64  # rows whose error is computed


def error_of(got: Tensor, a: Tensor, b: Tensor) -> float:
    """Against (a + b) / 2 in float64: a product, two sums and a division of float32 or wider."""
    exact, terms = (a.double() + b.double()) / 2, (a.double().abs() + b.double().abs()) / 2
    unit = 2.0**-24 if got.element_size() == 2 else 2.0**-53
    return relative_error(got, exact, 5 * unit * terms + half_unit(exact, got.dtype))


def by_matrices(xs: list[Tensor], matrices: list[list[Tensor | None]]) -> Tensor:
    """As ZipIt! does it: M_i W_i U_i with matrices in the dtype of the weights."""
    total = torch.zeros(())
    for x, (merge, unmerge) in zip(xs, matrices):
        y = x if merge is None else torch.tensordot(merge.to(x.dtype), x, 1)
        if unmerge is not None:
            y = torch.einsum("oi...,iu->ou...", y, unmerge.to(x.dtype))
        total = total + (y / len(xs) if merge is None else y)
    return total


def one_hot(order: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(order).float()


@pytest.mark.parametrize("names", ["rows", "cols", "both"])
def bench_zip_weights(row, dtype: torch.dtype, nbytes: int, names: str) -> None:
    """A pair matched one to one."""
    width = 4096 if nbytes > 1 << 24 else 64
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(nbytes // dtype.itemsize, generator=g).to(dtype) for _ in range(2))
    a, b = a.view(-1, width), b.view(-1, width)
    order = {axis: torch.randperm(a.shape[axis], generator=g) for axis in (0, 1)}
    given, back = {}, {}
    for axis, name in enumerate(("rows", "cols")):
        if names in (name, "both"):
            given[name] = torch.cat([torch.arange(a.shape[axis]), order[axis]])
            back[axis] = torch.argsort(order[axis])
    out = torch.zeros_like(a)

    def call() -> Tensor:
        return mk.zip_weights([a, b], out=out, **given)

    def matched() -> Tensor:
        moved = b
        for axis, i in back.items():
            moved = moved.index_select(axis, i)
        return moved

    call()
    row(
        call,
        cost=cost(2, a.numel(), dtype.itemsize),
        error=error_of(out[:CHECKED], a[:CHECKED], matched()[:CHECKED]),
        torch=lambda: (a + matched()) / 2,
        allowed=2.0,
    )


def bench_zip_weights_vit(row, dtype: torch.dtype, timed: bool) -> None:
    """All tensors of a ViT-B pair; the product of matrices, in float32, on one block of twelve."""
    of, sizes = vit.weights(small=not timed)
    order = vit.permutations(sizes)
    a, b = vit.tensors(of, dtype, 1), vit.tensors(of, dtype, 2)
    out = {name: torch.zeros_like(x) for name, x in a.items()}
    shared = {space: torch.cat([torch.arange(len(p)), p]) for space, p in order.items()}
    pairs = {name: [a[name], b[name]] for name in of}
    labels = {}
    for name, w in of.items():
        given = {key: shared[s] for key, s in (("rows", w.rows), ("cols", w.cols)) if s}
        labels[name] = {"axes": w.axes, **given}

    def call() -> dict[str, Tensor]:
        return mk.zip_weights_all(pairs, labels, out=out)

    got, error = call(), 0.0
    for name, w in of.items():
        there = b[name]
        for axis, p in vit.index_of(w, order).items():
            there = there.index_select(axis, torch.argsort(p))
        error = max(error, error_of(got[name][:CHECKED], a[name][:CHECKED], there[:CHECKED]))

    block = [name for name in of if name.startswith("0.")]
    plain = {name: [x.float() for x in pairs[name]] for name in block}
    spaces = {
        space: (torch.eye(len(p)), one_hot(p)) for space, p in order.items() if space[0] in "0s"
    }
    matrices = {
        name: [
            [
                None if w.rows is None else spaces[w.rows][i].T / 2,
                None if w.cols is None else spaces[w.cols][i],
            ]
            for i in range(2)
        ]
        for name, w in of.items()
        if name in plain
    }
    numel = sum(x.numel() for x in a.values())
    share = sum(a[name].numel() for name in block) / numel
    total = [cost(2, x.numel(), x.element_size()) for x in a.values()]
    row(
        call,
        cost=Cost(sum(c.bytes for c in total), sum(c.flops for c in total)),
        error=error,
        peers={
            "einsum": (lambda: [by_matrices(plain[n], matrices[n]) for n in block], share),
        },
        allowed=2.0,
    )
