"""zip_weights: the weights of N networks in one space of features."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ._cost import Cost
from ._labels import Labels, Part, blocks, read_labels

OP = "zip_weights"


def zip_weights(
    xs: Sequence[Tensor],
    *,
    rows: Any = None,
    cols: Any = None,
    weights: Sequence[float] | None = None,
    axes: tuple[int, int] = (0, 1),
    groups: int = 1,
    eps: float = 0.0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out[g, h, ...] = sum_i N w_i sum_(r in g) sum_(c in h) x_i[r, c, ...] / (count_g + eps).

    g and h are groups of output and of input features: r is in g where rows_i[r] = g, c is in h
    where cols_i[c] = h, and count_g is the number of output features that g has in all models. So
    outputs are averaged over their group (M_i x_i) and inputs added up in each model (x_i U_i).
    Without `rows` output features stay and the divisor is N; without `cols` input features stay.
    w_i is 1 / N, or weights[i] as given: they are not normalised.

    Shapes: N >= 1 tensors of one dtype and number of axes, any strides; the labelled axes may
    differ in size, the others not. rows, cols: labels of all models one after another (as
    zip_match gives them), or a list of N vectors of labels; they count from 0, and every group
    holds a feature of some model. axes: where output and input features lie; with both labelled,
    the first two axes in either order, else anywhere.
        linear, conv [out, in, ...]     rows, cols
        bias, norm, depthwise conv      rows
        classifier on merged features   cols
        embedding [words, features]     rows, axes=(1, 0): features come out of it
        grouped conv [out, in / groups] rows, cols, groups: labels of all input features. A group
            of channels moves as a block: its outputs and its inputs go to one group of the result.
    `out` may not overlap the inputs.

    Result: the same bits on every backend and thread count, in float64 (float32 for 16-bit inputs)
    with one rounding at the end; csrc/zip_weights.h has the order. For an element of m terms
    |error| <= (m + 3) u sum |N w_i x_i| / d, u = 2**-53 (2**-24), plus half a unit of the result's
    last place, where nothing under- or overflows. Elements without terms are -0. NaN stays in its
    groups.

    Cost: reads every input and writes the result once; no matrix of zeros and ones.
    Raises: ArgumentError for labels that do not add up to the sizes, are negative or leave a group
    empty, for sizes, dtypes or devices that differ, non-finite weights, an eps below 0, grouped
    channels that do not move as blocks.
    Source: `MergeHandler`, `get_merged_state_dict` of ZipIt! (Stoica et al., 2305.03053), which
    has eps = 1e-5.

    >>> import torch
    >>> a, b = torch.eye(2), torch.eye(2)
    >>> zip_weights([a, b], rows=[0, 1, 1, 0], cols=[[0, 1], [1, 0]])
    tensor([[1., 0.],
            [0., 1.]])
    """
    zips = _Zips(OP, weights, eps)
    zips.add("", xs, out, rows=rows, cols=cols, axes=axes, groups=groups)
    return zips.run(backend)[""]


def zip_weights_all(
    xs: Mapping[str, Sequence[Tensor]],
    labels: Mapping[str, Mapping[str, Any]],
    *,
    weights: Sequence[float] | None = None,
    eps: float = 0.0,
    out: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """{name: zip_weights(xs[name], **labels[name])}: all tensors of N networks at once.

    They are done in one run of the thread pool, so many small ones cost little more than their
    bytes. labels[name] holds any of rows, cols, axes and groups; tensors without labels are
    averaged. Labels that several tensors share (the same object) are checked and prepared once.
    `out` has a tensor for every name; none may overlap another or any of xs.
    Result, Cost, Source: as zip_weights.
    Raises: ArgumentError as zip_weights, with the name of the tensor, and for labels of a tensor
    that is not there.

    >>> import torch
    >>> layer = {"weight": [torch.eye(2), torch.eye(2)], "bias": [torch.zeros(2), torch.ones(2)]}
    >>> swap = [0, 1, 1, 0]
    >>> zip_weights_all(layer, {"weight": {"rows": swap, "cols": swap}, "bias": {"rows": swap}})
    {'weight': tensor([[1., 0.],
            [0., 1.]]), 'bias': tensor([0.5000, 0.5000])}
    """
    op = "zip_weights_all"
    check.names(op, xs, labels, out, "labels")
    zips = _Zips(op, weights, eps)
    for name, models in xs.items():
        given = labels.get(name, {})
        if not isinstance(given, Mapping):
            what, expected = f"labels[{name!r}] is no mapping", "rows, cols, axes or groups"
            raise ArgumentError.of(op, what, type(given).__name__, expected)
        for key in given:
            check.choice(op, f"a key of labels[{name!r}]", key, ("rows", "cols", "axes", "groups"))
        zips.add(name, models, None if out is None else out[name], **given)
    if out is not None:
        check.apart(op, zips.results, zips.inputs)
    return zips.run(backend)


class _Zips:
    """Checks one merge after the other, and runs them all."""

    def __init__(self, op: str, weights: Sequence[float] | None, eps: float) -> None:
        self.op, self.weights, self.eps = op, weights, check.number(op, "eps", eps)
        if self.eps < 0:
            raise ArgumentError.of(op, "eps is negative", self.eps, "0 or more")
        self.inputs: dict[str, Tensor] = {}
        self.results: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}
        self.calls: list[tuple[Any, ...]] = []
        self._labels: dict[tuple[Any, ...], tuple[Any, Labels]] = {}
        self._made: dict[tuple[Any, ...], tuple[np.ndarray | None, Tensor]] = {}

    def add(
        self,
        name: str,
        xs: Sequence[Tensor],
        out: Tensor | None,
        *,
        rows: Any = None,
        cols: Any = None,
        axes: Any = (0, 1),
        groups: Any = 1,
    ) -> None:
        op = f"{self.op}: {name}" if name else self.op
        tensors = check.tensors(op, xs, shape=False)
        n, ndim = len(tensors), tensors[0].ndim
        factors = [1.0] * n  # N w_i
        if self.weights is not None:
            factors = [n * w for w in check.numbers(op, "weights", self.weights, n)]
        merged = None if rows is None else _axis(op, "rows", axes, 0, ndim)
        unmerged = None if cols is None else _axis(op, "cols", axes, 1, ndim)
        _check_axes(op, tensors, merged, unmerged)
        _check_groups(op, groups, tensors, merged, unmerged)
        labels: dict[int, Labels] = {}
        if merged is not None:
            labels[merged] = self._read(op, "rows", rows, tensors, merged)
        if unmerged is not None:
            labels[unmerged] = self._read(op, "cols", cols, tensors, unmerged, groups)
        whole = Part(tensors, factors, labels)
        parts = [whole] if groups == 1 else blocks(op, whole, groups)
        shape = list(tensors[0].shape)
        for axis, of in labels.items():
            shape[axis] = len(of.counts) // (groups if axis == 1 else 1)
        alone = tensors if self.op == OP else ()  # of several, `apart` compares all with all
        out = check.output(op, out, tensors[0], shape=shape, inputs=alone, in_place=False)
        dense = out
        if not out.is_contiguous():
            dense = torch.empty(shape, dtype=out.dtype, device=out.device)
        for target, part in zip(dense.chunk(groups) if groups > 1 else [dense], parts, strict=True):
            self.calls.append(self._arranged(target, part, merged, n))
        self.inputs |= {f"{name}[{i}]": x for i, x in enumerate(tensors)}
        self.results[name], self.dense[name] = out, dense

    def _read(
        self, op: str, name: str, given: Any, tensors: list[Tensor], axis: int, groups: int = 1
    ) -> Labels:
        """Checks labels that several tensors share once."""
        sizes, device = [x.shape[axis] * groups for x in tensors], tensors[0].device
        key = (id(given), device, *sizes)
        if key not in self._labels:
            self._labels[key] = given, read_labels(op, name, given, sizes, device)
        return self._labels[key][1]

    def _arranged(self, out: Tensor, part: Part, merged: int | None, n: int) -> tuple[Any, ...]:
        """What a backend takes: tensors as [rows, columns, inner], labels of rows and of columns.

        Where one axis has labels, it is that of the rows, or of the columns if others come before
        it.
        """
        axes = sorted(part.labels)
        first = axes[0] if axes else 0
        before, last = math.prod(out.shape[:first]), first + max(1, len(axes))
        inner = math.prod(out.shape[last:])

        def arranged(x: Tensor) -> Tensor:
            sizes: tuple[int, ...] = x.shape[first:last] or (1,)
            if len(sizes) == 1:
                sizes = (*sizes, 1) if before == 1 else (before, *sizes)
            return x.reshape(*sizes, inner)

        in_rows = before == 1 and bool(axes)
        rows = part.labels[first].parts if in_rows else None
        cols = part.labels[axes[-1]].parts if len(axes) == 2 or (axes and not in_rows) else None
        target = arranged(out)
        counts = None if merged is None else part.labels[merged].counts
        divisors = self._divisors(counts, n, target.shape[0], out.device)
        by_row = merged is None or (in_rows and merged == first)
        return target, [*map(arranged, part.xs)], rows, cols, part.factors, divisors, by_row

    def _divisors(
        self, counts: np.ndarray | None, n: int, height: int, device: torch.device
    ) -> Tensor:
        """The features of each group and eps, or n for every row; made once for several tensors."""
        key = (id(counts), n, height, device)
        if key not in self._made:
            made = np.full(height, float(n)) if counts is None else counts + self.eps
            self._made[key] = counts, torch.from_numpy(made).to(device)
        return self._made[key][1]

    def run(self, backend: str) -> dict[str, Tensor]:
        if not self.results:
            return {}
        first = next(iter(self.results.values()))
        for name, result in self.results.items():
            if result.device != first.device:
                what = f"{name} lies elsewhere"
                raise ArgumentError.of(self.op, what, str(result.device), str(first.device))
        kernel = dispatch.load(dispatch.select(backend, OP, first.device, first.dtype), OP)
        kernel(*map(list, zip(*self.calls, strict=True)))
        for name, result in self.results.items():
            if result is not self.dense[name]:
                result.copy_(self.dense[name])
        return self.results


def _axis(op: str, name: str, axes: Any, which: int, ndim: int) -> int:
    """The axis that the labels `name` are for."""
    try:
        axis = [operator.index(a) for a in axes][which]
    except (TypeError, IndexError):
        expected = "the axis of outputs and that of inputs"
        raise ArgumentError.of(op, "axes are no pair", repr(axes), expected) from None
    if not -ndim <= axis < ndim:
        what = f"{name} are labels of an axis that is not there"
        raise ArgumentError.of(op, what, f"axis {axis}", f"one of the {ndim} axes of xs")
    return axis % ndim


def _check_axes(op: str, tensors: list[Tensor], merged: int | None, unmerged: int | None) -> None:
    """Two axes with labels are the first two; the others have one size in all models."""
    if None not in (merged, unmerged) and {merged, unmerged} != {0, 1}:
        what = "axes with labels are not the first two"
        raise ArgumentError.of(op, what, (merged, unmerged), "(0, 1) or (1, 0)")
    first = tensors[0]
    for i, x in enumerate(tensors[1:], start=1):
        if x.ndim != first.ndim:
            what = f"xs[{i}] differs from xs[0] in its number of axes"
            raise ArgumentError.of(op, what, x.ndim, first.ndim)
        for axis, (got, expected) in enumerate(zip(x.shape, first.shape, strict=True)):
            if got != expected and axis not in (merged, unmerged):
                what = f"xs[{i}] differs from xs[0] in axis {axis}, which has no labels"
                raise ArgumentError.of(op, what, got, expected)


def _check_groups(
    op: str, groups: Any, tensors: list[Tensor], merged: int | None, unmerged: int | None
) -> None:
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ArgumentError.of(op, "groups is no number of groups", repr(groups), "1 or more")
    if groups > 1 and (merged, unmerged) != (0, 1):
        got = f"rows of axis {merged} and cols of axis {unmerged}"
        raise ArgumentError.of(op, "groups need labels of both axes", got, "rows of 0, cols of 1")
    for i, x in enumerate(tensors):
        if groups > 1 and x.shape[0] % groups:
            what = f"xs[{i}] does not have groups of one size"
            raise ArgumentError.of(op, what, f"{x.shape[0]} rows", f"a multiple of {groups}")


def cost(n: int, numel: int, itemsize: int, out_numel: int | None = None) -> Cost:
    """Least traffic of n inputs of `numel` elements: a product, a sum, and a division a result."""
    results = numel if out_numel is None else out_numel
    return Cost((n * numel + results) * itemsize, 2 * n * numel + results)
