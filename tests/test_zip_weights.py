"""zip_weights: the bits of its arithmetic on every backend, and near the matrices it stands for."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

import mergekern as mk
from mergekern import reference
from mergekern.check import name_of, sum_accumulator

import cases
import zipit
from accuracy import assert_bits_equal, assert_within, half_ulp
from cases import values
from refusal import refused

OP = "zip_weights"
F64 = torch.float64

# ---- layers and labels -----------------------------------------------------------------------


def labels_of(kind: str, sizes: list[int], seed: int = 0) -> Tensor:
    """Labels of features of several models, one after another.

    permutation: a feature of every model in each group. zip: any features, some groups without one
    of a model. heap: half of all features in one group, in falling order.
    """
    total, groups = sum(sizes), max(1, min(sizes))
    g = torch.Generator().manual_seed(seed)
    if kind == "permutation":
        return torch.cat([torch.randperm(size, generator=g) for size in sizes])
    if kind == "zip":
        more = torch.randint(0, groups, (total - groups,), generator=g)
        return torch.cat([torch.arange(groups), more])[torch.randperm(total, generator=g)]
    number = torch.arange(total)
    rest = number // 2 % ((groups + 1) // 2)
    return torch.where(number % 2 == 0, torch.zeros_like(rest), rest).flip(0)


@dataclasses.dataclass(frozen=True)
class Layer:
    """Tensors of n models; `growth` more features in every further model."""

    shape: tuple[int, ...]
    rows: str | None = "zip"
    cols: str | None = "zip"
    axes: tuple[int, int] = (0, 1)
    n: int = 2
    growth: int = 0
    dtype: torch.dtype = torch.float32
    values: str = "normal"

    def __str__(self) -> str:
        parts = [cases.shape_id(self.shape), self.rows, self.cols, f"n{self.n}+{self.growth}"]
        return "-".join([*map(str, parts), str(self.axes), name_of(self.dtype), self.values])

    def labelled(self) -> dict[int, str]:
        axes = [a % max(1, len(self.shape)) for a in self.axes]
        return {a: k for a, k in zip(axes, (self.rows, self.cols)) if k}

    def tensors(self, device: str = "cpu") -> list[Tensor]:
        made = []
        for i in range(self.n):
            grown = dict.fromkeys(self.labelled(), self.growth * i)
            shape = tuple(size + grown.get(a, 0) for a, size in enumerate(self.shape))
            made.append(values(shape, self.dtype, self.values, i).to(device))
        return made

    def arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {"axes": self.axes}
        for name, kind, axis in zip(("rows", "cols"), (self.rows, self.cols), self.axes):
            if kind:
                sizes = [x.shape[axis] for x in self.tensors()]
                found[name] = labels_of(kind, sizes, seed=axis)
        return found


SHAPES = [
    Layer((37, 29)),
    Layer((40, 24), "permutation", "permutation"),
    Layer((24, 17), "heap", "heap"),
    Layer((17, 5, 3, 3)),
    Layer((16, 8, 1, 1), "permutation", "zip"),
    Layer((19, 1, 3, 3), "zip", None),
    Layer((19, 3, 4, 4), "heap", None),
    Layer((33,), "zip", None),
    Layer((1,), "zip", None),
    Layer((5, 31), None, "zip"),
    Layer((5, 31), None, None),
    Layer((), None, None),
    Layer((11, 30), "zip", None, (1, 0)),
    Layer((2, 7, 30), "zip", None, (-1, 0)),
    Layer((1, 1, 30), "zip", None, (2, 0)),
    Layer((6, 30, 3), None, "heap"),
    Layer((20, 30), "zip", "heap", (1, 0)),
    Layer((20, 12, 2, 2), "zip", "permutation", (1, 0)),
]
PLACES = (1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 300)  # columns that trade places
CATALOGUE = tuple(
    dict.fromkeys(
        [
            *SHAPES,
            *(dataclasses.replace(s, n=3, growth=2) for s in SHAPES if s.rows != "permutation"),
            *(Layer((21, 19), n=n, dtype=d) for n in (1, 2, 3, 4, 9) for d in cases.DTYPES),
            *(Layer((21, 3, 3), dtype=d, values=v) for d in cases.DTYPES for v in cases.VALUES),
            *(Layer((21, 19), "zip", None, values=v) for v in ("zeros", "mixed", "huge")),
            *(Layer((r, c)) for r in (1, 3, 4, 5, 7, 8, 9) for c in (1, 3, 4, 5, 255, 256, 257)),
            *(Layer((r, 5), dtype=torch.bfloat16) for r in (7, 8, 9, 16, 17)),
            *(Layer((3, c), "zip", None) for c in (255, 256, 257, 513)),
            *(Layer((r,), "heap", None, n=3, dtype=d) for r in (255, 257) for d in cases.DTYPES),
            *(Layer((21,), "zip", None, dtype=d, values="mixed") for d in cases.DTYPES),
            *(Layer((r, c), "permutation", "permutation") for r in (1, 5, 8) for c in PLACES),
            *(Layer((9, c), None, "permutation", n=3) for c in PLACES),
            *(Layer((40, 70), "zip", "permutation", dtype=d) for d in cases.DTYPES),
            *(
                Layer((17, 70), "permutation", "permutation", n=n, dtype=d, values=v)
                for d in cases.DTYPES
                for n, v in ((1, "normal"), (2, "mixed"), (2, "zeros"), (3, "mixed"))
            ),
            # Rows that GPU kernels add up in shared memory, at once or not, and longer ones.
            Layer((5, 40, 3, 3), growth=1),
            Layer((7, 90, 2, 2), "zip", "heap", (1, 0)),
            Layer((3, 300), None, "zip"),
            Layer((2, 4500), dtype=torch.bfloat16),
            Layer((2, 6200)),
        ]
    )
)


def split(labels: Tensor, xs: list[Tensor], axis: int) -> list[list[int]]:
    return [part.tolist() for part in labels.split([x.shape[axis] for x in xs])]


def divisors(x: Tensor, axis: int, counts: Tensor) -> Tensor:
    return counts.view([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])


def in_order(
    xs: list[Tensor],
    *,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    axes: tuple[int, int] = (0, 1),
    weights: list[float] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The specified arithmetic, one feature after another, in the accumulator that is promised."""
    xs, n = [x.cpu() for x in xs], len(xs)
    acc, ndim = sum_accumulator(xs[0].dtype), xs[0].ndim
    factors = [1.0 if weights is None else n * weights[i] for i in range(n)]
    named = {a % ndim: labels for a, labels in zip(axes, (rows, cols)) if labels is not None}
    first, second = ([*sorted(named), None, None])[:2]
    total = None
    for i, x in enumerate(xs):
        part = x.to(acc) * torch.tensor(factors[i], dtype=acc)
        if second is not None or (first is not None and math.prod(x.shape[:first]) == 1):
            part = summed(part, split(named[first], xs, first)[i], first, named[first])
            last = second
        else:
            last = first
        shape = list(part.shape)
        if last is not None:
            shape[last] = int(named[last].max()) + 1
        total = torch.full(shape, -0.0, dtype=acc) if total is None else total
        if last is None:
            total = total + part
            continue
        for c, h in enumerate(split(named[last], xs, last)[i]):
            total.select(last, h).add_(part.select(last, c))
    assert total is not None
    d = torch.tensor(float(n), dtype=acc)
    if rows is not None:
        d = divisors(total, axes[0], (torch.bincount(rows).double() + eps).to(acc))
    return (total / d).to(xs[0].dtype)


def summed(x: Tensor, labels: list[int], axis: int, every: Tensor) -> Tensor:
    """Slices of one group added up, the first as it is; zeros where there is none."""
    slices: list[Tensor | None] = [None] * (int(every.max()) + 1)
    for r, g in enumerate(labels):
        before = slices[g]
        slices[g] = x.select(axis, r) if before is None else before + x.select(axis, r)
    zeros = torch.full_like(x.select(axis, 0), -0.0)
    return torch.stack([zeros if s is None else s for s in slices], axis)


def by_matrices(
    xs: list[Tensor],
    *,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    axes: tuple[int, int] = (0, 1),
    weights: list[float] | None = None,
    eps: float = 0.0,
    dtype: torch.dtype = F64,
) -> Tensor:
    """N w_i M_i W_i U_i with matrices of zeros and ones, as the formula reads."""
    n = len(xs)
    w = [1 / n] * n if weights is None else weights
    total: Any = 0
    for i, x in enumerate(xs):
        y = x.to(dtype) * (n * w[i])
        for axis, labels in zip(axes, (rows, cols)):
            if labels is None:
                continue
            sizes = [x.shape[axis] for x in xs]
            u = one_hot(labels, int(labels.max()) + 1).to(dtype).split(sizes)[i]
            y = torch.tensordot(y, u, dims=([axis], [0])).movedim(-1, axis)
        total = total + y
    if rows is None:
        return total / n
    return total / divisors(total, axes[0], (torch.bincount(rows).double() + eps).to(dtype))


def bound(xs: list[Tensor], **arguments: Any) -> Tensor:
    """The docstring's, with the most terms of any element, and as much again for the oracle."""
    dtype = xs[0].dtype
    n, terms = len(xs), 1
    for name, axis in zip(("rows", "cols"), arguments.get("axes", (0, 1))):
        if name in arguments:
            size = sum(x.shape[axis] for x in xs)
            terms *= min(size, int(torch.bincount(arguments[name]).max()))
    weights = arguments.pop("weights", None) or [1 / n] * n
    magnitude = by_matrices([x.abs() for x in xs], weights=[abs(w) for w in weights], **arguments)
    unit = 2.0**-24 if sum_accumulator(dtype) == torch.float32 else 2.0**-53
    exact = by_matrices(xs, weights=weights, **arguments)
    rounding = (1.0001 * (terms * n + 3) * unit + 4 * (terms * n + 3) * 2.0**-53) * magnitude
    return rounding + half_ulp(exact.abs() + rounding, dtype)


# ---- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", CATALOGUE, ids=str)
def test_bits_of_the_specified_arithmetic(layer: Layer, backend: str, device: str) -> None:
    xs, arguments = layer.tensors(device), layer.arguments()
    got = mk.zip_weights(xs, **arguments, backend=backend)
    assert got.is_contiguous()
    assert_bits_equal(got, in_order(xs, **arguments))
    weights = [0.7, -0.3, 1.1, 0.6, 0.1, 0.2, 0.3, 0.4, 0.5][: layer.n]
    got = mk.zip_weights(xs, **arguments, weights=weights, eps=1e-5, backend=backend)
    assert_bits_equal(got, in_order(xs, **arguments, weights=weights, eps=1e-5))


@pytest.mark.parametrize("layer", [*SHAPES, *CATALOGUE[len(SHAPES) : len(SHAPES) + 30]], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_near_the_product_of_matrices(layer: Layer, eps: float, backend: str, device: str) -> None:
    xs, arguments = layer.tensors(), layer.arguments()
    got = mk.zip_weights([x.to(device) for x in xs], **arguments, eps=eps, backend=backend)
    assert_within(got, by_matrices(xs, **arguments, eps=eps), bound(xs, **arguments, eps=eps))
    weights = [0.7, -0.3, 1.1, 0.6, 0.1, 0.2, 0.3, 0.4, 0.5][: layer.n]
    arguments |= {"weights": weights, "eps": eps}
    got = mk.zip_weights([x.to(device) for x in xs], **arguments, backend=backend)
    assert_within(got, by_matrices(xs, **arguments), bound(xs, **arguments))


@pytest.mark.parametrize("layer", SHAPES, ids=str)
def test_the_reference_is_an_oracle_too(layer: Layer) -> None:
    xs, arguments = layer.tensors(), layer.arguments()
    got = mk.zip_weights(xs, **arguments, backend="reference")
    assert_within(got, by_matrices(xs, **arguments), bound(xs, **arguments))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_the_reference_has_the_bits(dtype: torch.dtype) -> None:
    layer = Layer((9, 8, 3), n=3, dtype=dtype)
    xs, arguments = layer.tensors(), layer.arguments()
    rows, cols = arguments["rows"], arguments["cols"]
    parts = [labels.split([size] * 3) for labels, size in ((rows, 9), (cols, 8))]
    factors = [3 * 0.7, -3 * 0.1, 3 * 0.4]
    counts = torch.bincount(rows).double() + 1e-5
    out = torch.empty(int(rows.max()) + 1, int(cols.max()) + 1, 3, dtype=dtype)
    acc = sum_accumulator(dtype)
    rows_, cols_ = ([[*labels]] for labels in parts)
    reference.zip_weights([out], [xs], rows_, cols_, [factors], [counts], [True], acc=acc)
    assert_bits_equal(out, in_order(xs, **arguments, weights=[0.7, -0.1, 0.4], eps=1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_chunks_change_nothing(
    threads: int, dtype: torch.dtype, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer((75, 40), n=3, dtype=dtype)
    xs, arguments = layer.tensors(device), layer.arguments()
    expected = in_order(xs, **arguments)
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    for chunk in (1, 320, 2000, 1 << 18):
        if backend in WHERE:
            monkeypatch.setattr(f"mergekern.backends.{backend}.{WHERE[backend]}.CHUNK", chunk)
        for name in ([], ["rows"], ["cols"], ["rows", "cols"]):
            some = {k: v for k, v in arguments.items() if k in name}
            got = mk.zip_weights(xs, **some, backend=backend)
            assert_bits_equal(got, expected if len(name) == 2 else in_order(xs, **some))


WHERE = {"cpu": "runtime", "torch": "chunks"}


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("columns", [16, 257, 512])
def test_results_written_past_the_caches(
    columns: int, dtype: torch.dtype, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "cpu":
        monkeypatch.setattr("mergekern.backends.cpu.runtime.STREAM", 0)
    layer = Layer((19, columns), dtype=dtype)
    xs, arguments = layer.tensors(device), layer.arguments()
    for names in (["rows"], ["rows", "cols"]):
        some = {k: arguments[k] for k in names}
        assert_bits_equal(mk.zip_weights(xs, **some, backend=backend), in_order(xs, **some))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("layer", [s for s in SHAPES if len(s.shape) > 1], ids=str)
def test_layouts(layer: Layer, layout: str, backend: str, device: str) -> None:
    xs = [cases.LAYOUTS[layout](x) for x in layer.tensors(device)]
    got = mk.zip_weights(xs, **layer.arguments(), backend=backend)
    assert_bits_equal(got, in_order(xs, **layer.arguments()))


def test_rows_apart_in_memory(backend: str, device: str) -> None:
    layer = Layer((20, 12))
    xs = [torch.cat([x, x + 1], 1)[:, :12] for x in layer.tensors(device)]
    got = mk.zip_weights(xs, **layer.arguments(), backend=backend)
    assert_bits_equal(got, in_order(xs, **layer.arguments()))


def test_one_model_with_a_permutation_is_permute(backend: str, device: str) -> None:
    x = values((31, 17, 3), torch.float32).to(device)
    rows, cols = labels_of("permutation", [31]), labels_of("permutation", [17])
    got = mk.zip_weights([x], rows=rows, cols=cols, backend=backend)
    assert_bits_equal(got, x.cpu()[torch.argsort(rows)][:, torch.argsort(cols)])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize("alone", ["rows of one model", "columns of one model"])
def test_columns_trade_places_beside_features_without_a_partner(
    alone: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Some groups of rows lack a model; or one model has fewer columns, so that none may."""
    g = torch.Generator().manual_seed(3)
    a, b = values((21, 70), dtype, "normal", 0), values((19, 70), dtype, "normal", 1)
    rows = torch.arange(40) % 30
    cols = torch.cat([torch.arange(70), torch.randperm(70, generator=g)])
    if alone != "rows of one model":
        b, cols = b[:, :60], cols[:130] % 70
    layer = {"rows": rows, "cols": cols}
    got = mk.zip_weights([a.to(device), b.to(device)], **layer, backend=backend)
    assert_bits_equal(got, in_order([a, b], **layer))


def test_without_labels_it_is_the_average(backend: str, device: str) -> None:
    """Four models: the sum and its division by a power of two are those of weighted_sum."""
    xs = [values((31, 17), torch.float32, seed=i).to(device) for i in range(4)]
    got = mk.zip_weights(xs, backend=backend)
    assert_bits_equal(got, mk.weighted_sum(xs, [0.25] * 4, backend=backend))


def test_networks_compute_the_same_after_a_permutation(backend: str, device: str) -> None:
    """A hidden layer of two equal networks, one permuted, merged: the network again."""
    g = torch.Generator().manual_seed(0)
    first, bias, second = (torch.randn(s, generator=g) for s in ((16, 8), (16,), (4, 16)))
    order = torch.randperm(16, generator=g)
    labels = torch.cat([torch.arange(16), order])
    others = first[order], bias[order], second[:, order]
    for mine, other, key in zip((first, bias, second), others, ("rows", "rows", "cols")):
        pair = [mine.to(device), other.to(device)]
        assert_bits_equal(mk.zip_weights(pair, **{key: labels}, backend=backend), mine)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_non_finite_values_stay_in_their_groups(special: float, backend: str, device: str) -> None:
    layer = Layer((20, 12), n=3)
    xs, arguments = layer.tensors(device), layer.arguments()
    xs[1][7, 5] = special
    got = mk.zip_weights(xs, **arguments, backend=backend).cpu()
    g, h = arguments["rows"][20 + 7], arguments["cols"][12 + 5]
    assert not got[g, h].isfinite()
    got[g, h] = 0
    assert got.isfinite().all()


def test_elements_without_terms_are_zero(backend: str, device: str) -> None:
    """Group 0 of the rows is of the first model alone, group 1 of the columns of the second."""
    xs = [torch.tensor([[-1.0]], device=device), torch.tensor([[-2.0]], device=device)]
    got = mk.zip_weights(xs, rows=[0, 1], cols=[0, 1], backend=backend)
    assert_bits_equal(got, torch.tensor([[-1.0, -0.0], [-0.0, -2.0]]))


@pytest.mark.parametrize("sizes", [(0, 0), (3, 0), (0, 3)])
def test_models_without_features(sizes: tuple[int, int], backend: str, device: str) -> None:
    xs = [torch.ones(size, 2, device=device) for size in sizes]
    got = mk.zip_weights(xs, rows=torch.arange(sum(sizes)), backend=backend)
    assert_bits_equal(got, torch.ones(sum(sizes), 2))
    turned = [x.T.contiguous() for x in xs]
    got = mk.zip_weights(turned, cols=torch.arange(sum(sizes)), backend=backend)
    assert_bits_equal(got, torch.ones(2, sum(sizes)) / 2)
    crossed = [torch.ones(3, 0, device=device), torch.ones(0, 2, device=device)]
    got = mk.zip_weights(crossed, rows=[0, 1, 2], cols=[0, 1], backend=backend)
    assert_bits_equal(got, torch.full((3, 2), -0.0))


# ---- grouped convolutions --------------------------------------------------------------------


def grouped(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """Three models of four groups, 3 outputs and 2 inputs each, groups moved as blocks."""
    xs = [values((12, 2, 3, 3), dtype, seed=i) for i in range(3)]
    g = torch.Generator().manual_seed(0)
    rows, cols = [], []
    for blocks in ([0, 1, 2, 3], [2, 0, 3, 1], [1, 1, 0, 3]):  # two of the last come to one
        rows += [b * 3 + torch.randperm(3, generator=g) for b in blocks]
        cols += [b * 2 + torch.randperm(2, generator=g) for b in blocks]
    return xs, torch.cat(rows), torch.cat(cols)


def dense(x: Tensor, groups: int) -> Tensor:
    """The weight of the same convolution without groups."""
    height, width = x.shape[0] // groups, x.shape[1]
    full = x.new_zeros(x.shape[0], width * groups, *x.shape[2:])
    for b in range(groups):
        rows = slice(b * height, (b + 1) * height)
        full[rows, b * width : (b + 1) * width] = x[rows]
    return full


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_grouped_convolutions(dtype: torch.dtype, backend: str, device: str) -> None:
    xs, rows, cols = grouped(dtype)
    given = [x.to(device) for x in xs]
    weights = [0.2, 0.5, 0.3]
    got = mk.zip_weights(given, rows=rows, cols=cols, groups=4, weights=weights, backend=backend)
    assert got.shape == (12, 2, 3, 3)
    expected = in_order([dense(x, 4) for x in xs], rows=rows, cols=cols, weights=weights)
    assert_bits_equal(dense(got.cpu(), 4), expected)


def test_grouped_and_depthwise_are_one(backend: str, device: str) -> None:
    xs = [values((10, 1, 3, 3), torch.float32, seed=i).to(device) for i in range(2)]
    rows = labels_of("permutation", [10, 10])
    by_groups = mk.zip_weights(xs, rows=rows, cols=rows, groups=10, backend=backend)
    assert_bits_equal(by_groups, mk.zip_weights(xs, rows=rows, backend=backend))


def test_torn_groups_are_refused() -> None:
    xs, rows, cols = grouped()
    torn = rows.clone()
    torn[[0, 3]] = rows[[3, 0]]
    with refused(OP, "do not move groups of channels as blocks; got group 0 of xs[0]"):
        mk.zip_weights(xs, rows=torn, cols=cols, groups=4)
    with refused(OP, "do not move groups of channels as blocks"):
        mk.zip_weights(xs, rows=rows, cols=cols.roll(2), groups=4)


# ---- forms of the arguments ------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: torch.tensor(a + b),
        lambda a, b: torch.tensor(a + b, dtype=torch.int32),
        lambda a, b: a + b,
        lambda a, b: np.array(a + b),
        lambda a, b: [a, b],
        lambda a, b: (torch.tensor(a), np.array(b)),
        lambda a, b: [torch.tensor([*a, *a])[: len(a)], b],
    ],
    ids=["tensor", "int32", "list", "numpy", "lists", "mixed", "slices"],
)
def test_forms_of_labels(form: Any, backend: str, device: str) -> None:
    xs = [values((4, 3), torch.float32, seed=i).to(device) for i in range(2)]
    rows, cols = ([2, 0, 1, 1], [1, 1, 2, 0]), ([0, 1, 2], [2, 1, 0])
    got = mk.zip_weights(xs, rows=form(*rows), cols=form(*cols), backend=backend)
    flat = [torch.tensor(a + b) for a, b in (rows, cols)]
    assert_bits_equal(got, in_order(xs, rows=flat[0], cols=flat[1]))


def test_one_label_for_each_of_several_models(backend: str, device: str) -> None:
    """A list of vectors of one label each is no list of labels."""
    xs = [torch.ones(1, 2, device=device), 2 * torch.ones(1, 2, device=device)]
    got = mk.zip_weights(xs, rows=[torch.tensor([0]), torch.tensor([0])], backend=backend)
    assert_bits_equal(got, torch.full((1, 2), 1.5))


def test_numpy_inputs(backend: str, device: str) -> None:
    layer = Layer((20, 12))
    xs, arguments = layer.tensors(device), layer.arguments()
    given = [x.numpy() for x in xs] if device == "cpu" else xs
    assert_bits_equal(
        mk.zip_weights(given, **arguments, backend=backend), in_order(xs, **arguments)
    )


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
@pytest.mark.parametrize("names", [["rows"], ["cols"], ["rows", "cols"], []], ids=str)
def test_out(names: list[str], axes: tuple[int, int], backend: str, device: str) -> None:
    layer = Layer((20, 12), axes=axes)
    xs, arguments = layer.tensors(device), layer.arguments()
    some = {k: v for k, v in arguments.items() if k in [*names, "axes"]}
    expected = in_order(xs, **some)
    for step in (1, 3):
        buffer, out = cases.guarded(tuple(expected.shape), torch.float32, device, step)
        assert mk.zip_weights(xs, **some, out=out, backend=backend).data_ptr() == out.data_ptr()
        assert_bits_equal(out, expected)
        assert cases.untouched(buffer, out)
    turned = torch.empty(expected.shape[::-1], device=device).T
    assert_bits_equal(mk.zip_weights(xs, **some, out=turned, backend=backend), expected)


# ---- many tensors ----------------------------------------------------------------------------


def network(device: str) -> tuple[dict[str, list[Tensor]], dict[str, dict[str, Any]]]:
    """Three models of tensors of all kinds, labels of one space shared by those that meet in it."""
    hidden, inputs = labels_of("zip", [40] * 3, 1), labels_of("permutation", [24] * 3, 2)
    grouped_xs, rows, cols = grouped()
    xs = {
        "fc": [values((40, 24), torch.float32, seed=i) for i in range(3)],
        "bias": [values((40,), torch.float32, seed=i) for i in range(3)],
        "next": [values((7, 40), torch.bfloat16, seed=i) for i in range(3)],
        "conv": [values((40, 24, 3, 3), torch.float16, seed=i) for i in range(3)],
        "words": [values((9, 24), torch.float64, seed=i) for i in range(3)],
        "grouped": grouped_xs,
        "scale": [values((), torch.float32, seed=i) for i in range(3)],
        "head": [values((5, 3), torch.float32, seed=i) for i in range(3)],
    }
    labels: dict[str, dict[str, Any]] = {
        "fc": {"rows": hidden, "cols": inputs},
        "bias": {"rows": hidden},
        "next": {"cols": hidden},
        "conv": {"rows": hidden, "cols": inputs},
        "words": {"rows": inputs, "axes": (1, 0)},
        "grouped": {"rows": rows, "cols": cols, "groups": 4},
        "scale": {},
    }
    return {name: [x.to(device) for x in of] for name, of in xs.items()}, labels


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("chunk", [1, 2000, 1 << 18])
def test_all_tensors_of_networks(
    chunk: int, threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    xs, labels = network(device)
    weights = [0.5, 0.2, 0.3]
    one_by_one = {
        name: mk.zip_weights(of, **labels.get(name, {}), weights=weights, eps=1e-5, backend=backend)
        for name, of in xs.items()
    }
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    if backend in WHERE:
        monkeypatch.setattr(f"mergekern.backends.{backend}.{WHERE[backend]}.CHUNK", chunk)
    got = mk.zip_weights_all(xs, labels, weights=weights, eps=1e-5, backend=backend)
    assert list(got) == list(xs)
    for name, expected in one_by_one.items():
        assert_bits_equal(got[name], expected)
    out = {
        name: torch.empty(x.shape[::-1], dtype=x.dtype, device=device).T
        for name, x in got.items()
        if x.ndim == 2
    }
    some = {name: xs[name] for name in out}
    there = {name: labels[name] for name in out if name in labels}
    mk.zip_weights_all(some, there, weights=weights, eps=1e-5, out=out, backend=backend)
    for name, x in out.items():
        assert_bits_equal(x, one_by_one[name])


def test_no_networks() -> None:
    assert mk.zip_weights_all({}, {}) == {}


X = torch.zeros(4, 3)
PAIR = [X, X]
UNEVEN = [X, torch.zeros(5, 3)]
R, C = [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]
REFUSALS: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "empty": (([],), {}, "xs is empty"),
    "one tensor": ((X,), {}, "xs is no list; got one tensor"),
    "dtypes": (([X, X.half()],), {}, "xs[1] differs from xs[0] in dtype"),
    "integers": (([X.int()],), {}, "int32"),
    "axes of tensors": (([X, X[0]],), {}, "differs from xs[0] in its number of axes; got 1"),
    "sizes": ((UNEVEN,), {}, "xs[1] differs from xs[0] in axis 0, which has no labels; got 5"),
    "other sizes": (([X, X[:, :2]],), {"rows": R}, "differs from xs[0] in axis 1"),
    "sum": (
        (PAIR,),
        {"rows": R[1:]},
        "rows does not add up to the sizes; got 7 labels; expected 4",
    ),
    "sum of cols": ((PAIR,), {"cols": R}, "cols does not add up to the sizes; got 8"),
    "lists": ((PAIR,), {"rows": [R]}, "rows has the wrong length; got 1; expected 2"),
    "list": ((UNEVEN,), {"rows": [R[:4], R[:4]]}, "rows[1] does not fit xs[1]; got 4 labels"),
    "negative": ((PAIR,), {"rows": [-1, *R[1:]]}, "out of range; got -1 to 3; expected 0 to 7"),
    "large": ((PAIR,), {"rows": [8, *R[1:]]}, "out of range; got 0 to 8; expected 0 to 7"),
    "gap": ((PAIR,), {"rows": [0, 0, 2, 2, 0, 0, 2, 2]}, "without a feature; got none in group 1"),
    "no integers": ((PAIR,), {"rows": torch.zeros(8)}, "rows is no list; got float32"),
    "booleans": ((PAIR,), {"rows": torch.zeros(8).bool()}, "rows is no list; got bool"),
    "matrix": ((PAIR,), {"rows": torch.zeros(2, 4).int()}, "rows is no list; got int32 of shape"),
    "number": ((PAIR,), {"rows": 3}, "rows is no tensor"),
    "cols of a vector": (([X[0]],), {"cols": [0, 1, 2]}, "cols are labels of an axis that is not"),
    "rows of a scalar": (([X[0, 0]],), {"rows": [0]}, "rows are labels of an axis that is not"),
    "axis": ((PAIR,), {"rows": R, "axes": (2, 0)}, "got axis 2; expected one of the 2 axes"),
    "axes": ((PAIR,), {"rows": R, "axes": 0}, "axes are no pair"),
    "one axis": ((PAIR,), {"cols": C, "axes": (0,)}, "axes are no pair"),
    "same axis": ((PAIR,), {"rows": R, "cols": R, "axes": (0, 0)}, "are not the first two"),
    "last axes": (
        ([X[None]] * 2,),
        {"rows": R, "cols": C, "axes": (1, 2)},
        "axes with labels are not the first two; got (1, 2)",
    ),
    "weights": ((PAIR,), {"weights": [1]}, "weights has the wrong length; got 1; expected 2"),
    "weight": ((PAIR,), {"weights": [1, math.nan]}, "weights[1] is not finite"),
    "eps": ((PAIR,), {"eps": -1e-5}, "eps is negative"),
    "eps nan": ((PAIR,), {"eps": math.nan}, "eps is not finite"),
    "groups": ((PAIR,), {"groups": 0}, "groups is no number of groups"),
    "groups without labels": ((PAIR,), {"groups": 2, "rows": R}, "groups need labels of both axes"),
    "odd groups": (
        (PAIR,),
        {"groups": 3, "rows": R, "cols": R},
        "does not have groups of one size",
    ),
    "groups of the result": (
        (PAIR,),
        {"groups": 2, "rows": [0, 1, 2, 2, 0, 1, 2, 2], "cols": [*C, *C]},
        "rows do not give groups of channels of one size; got 3 features",
    ),
    "out shape": ((PAIR,), {"rows": R, "out": torch.zeros(3, 3)}, "out does not fit"),
    "out dtype": ((PAIR,), {"rows": R, "out": X.double()}, "out does not fit"),
    "out overlaps": ((PAIR,), {"rows": R, "out": X}, "out overlaps an input"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    args, kwargs, words = REFUSALS[what]
    with refused(OP, words):
        mk.zip_weights(*args, **kwargs)


REFUSALS_OF_ALL: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "no mapping": ((PAIR, {}), {}, "xs is no mapping; got list"),
    "labels": (({"w": PAIR}, [R]), {}, "labels is no mapping; got list"),
    "unknown name": (({"w": PAIR}, {"v": {}}), {}, "labels of no tensor; got 'v'"),
    "unknown key": (({"w": PAIR}, {"w": {"row": R}}), {}, "a key of labels['w'] is unknown"),
    "no mapping of labels": (({"w": PAIR}, {"w": R}), {}, "labels['w'] is no mapping; got list"),
    "one tensor": (({"w": X}, {}), {}, "w: xs is no list; got one tensor"),
    "sum": (({"w": PAIR}, {"w": {"rows": C}}), {}, "w: rows does not add up to the sizes; got 6"),
    "weights": (({"w": PAIR}, {}), {"weights": [1]}, "w: weights has the wrong length"),
    "eps": (({"w": PAIR}, {}), {"eps": -1}, "eps is negative"),
    "names of out": (({"w": PAIR}, {}), {"out": {}}, "out and xs differ in names; got 'w'"),
    "out is xs": (({"w": PAIR}, {}), {"out": {"w": X}}, "overlaps another tensor"),
    "out is another of xs": (
        ({"v": PAIR, "w": [X + 1]}, {}),
        {"out": {"v": X.clone(), "w": X}},
        "overlaps another tensor",
    ),
}


@pytest.mark.parametrize("what", REFUSALS_OF_ALL)
def test_refusals_of_all(what: str) -> None:
    args, kwargs, words = REFUSALS_OF_ALL[what]
    with refused("zip_weights_all", words):
        mk.zip_weights_all(*args, **kwargs)


def test_the_kernel_is_the_compiled_one(cpu_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**kwargs: object) -> None:
        raise RuntimeError("this kernel was called")

    monkeypatch.setattr(cpu_backend._cpu, OP, broken)
    with pytest.raises(RuntimeError, match="this kernel was called"):
        mk.zip_weights(PAIR, backend="cpu")


# ---- the original ----------------------------------------------------------------------------


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> Any:
    """model_merger of a checkout of ZipIt!, without what only its scripts need."""
    unused = ("fvcore", "fvcore.nn", "fvcore.nn.flop_count", "graphs", "graphs.base_graph")
    for name in (*unused, "metric_calculators", "matching_functions", "utils"):
        monkeypatch.setitem(sys.modules, name, zipit.Anything(name))
    monkeypatch.syspath_prepend(zipit.checkout())
    monkeypatch.delitem(sys.modules, "model_merger", raising=False)
    yield importlib.import_module("model_merger")
    sys.modules.pop("model_merger", None)


class Graph:
    """A module that stands alone."""

    def get_node_info(self, node: int) -> dict[str, None]:
        return {"chunk": None}

    def preds(self, node: int) -> list[int]:
        return []

    succs = preds


@zipit.needed
@pytest.mark.parametrize("n", [2, 3, 4])
def test_modules_as_in_the_original(n: int, original: Any) -> None:
    """Both sides in float32: twice the bound, and the original's eps."""
    g = torch.Generator().manual_seed(n)
    rows, cols = labels_of("zip", [24] * n, 1), labels_of("zip", [16] * n, 2)

    def matrices(labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        unmerge = one_hot(labels).float()
        merge = (unmerge / (unmerge.sum(0) + 1e-5)).T * n
        return [*merge.chunk(n, 1)], [*unmerge.chunk(n, 0)]

    make = {
        "conv2d": lambda: torch.nn.Conv2d(16, 24, 3),
        "linear": lambda: torch.nn.Linear(16, 24),
        "batchnorm2d": lambda: torch.nn.BatchNorm2d(24),
        "layernorm": lambda: torch.nn.LayerNorm(24),
    }
    for kind, module in make.items():
        modules = [module() for _ in range(n)]
        for m in modules:
            for tensor in m.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=g))
        before = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
        pieces = zip(modules, *matrices(rows), *matrices(cols))
        norm = kind in ("batchnorm2d", "layernorm")
        for m, merge, unmerge, _, unmerge_inputs in pieces:
            handle = getattr(original.MergeHandler(Graph(), merge, unmerge), f"handle_{kind}")
            handle(norm, 0, m)
            if not norm:
                inputs = original.MergeHandler(Graph(), merge, unmerge_inputs)
                getattr(inputs, f"handle_{kind}")(True, 0, m)
        for key, tensor in modules[0].state_dict().items():
            if not tensor.is_floating_point():
                continue
            expected = sum(m.state_dict()[key] for m in modules) / n
            xs = [b[key] for b in before]
            arguments = {"rows": rows, "eps": 1e-5} | ({"cols": cols} if tensor.ndim > 1 else {})
            exact = by_matrices(xs, **arguments)
            magnitude = by_matrices([x.abs() for x in xs], **arguments)
            terms = max(24, 16) * n + 4  # a matrix product adds zeros too
            limit = 2 * (bound(xs, **arguments) + terms * 2.0**-24 * magnitude)
            got = mk.zip_weights(xs, **arguments)
            assert_within(got, exact, bound(xs, **arguments))
            assert_within(got, expected.detach().double(), limit)


def test_the_catalogue_has_what_it_says() -> None:
    """Groups without a feature of some model, and groups with several of one."""
    for layer in (Layer((37, 29)), Layer((24, 17), "heap", "heap")):
        xs, arguments = layer.tensors(), layer.arguments()
        for axis, name in enumerate(("rows", "cols")):
            groups = int(arguments[name].max()) + 1
            of = [np.bincount(p, minlength=groups) for p in split(arguments[name], xs, axis)]
            assert max(map(max, of)) > 1
        assert any(not c.all() for c in of) or layer.rows == "heap"
    assert len({str(layer) for layer in CATALOGUE}) == len(CATALOGUE)
    assert {*itertools.chain(*(layer.labelled() for layer in CATALOGUE))} == {0, 1, 2}
