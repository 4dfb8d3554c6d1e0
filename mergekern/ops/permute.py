"""permute: gather along any axes in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from ._cost import Cost

OP = "permute"
Indices = dict[int, Tensor]


def permute(
    x: Tensor,
    index: Mapping[int, Any],
    *,
    require: str | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out[i, j, ...] = x[index[0][i], index[1][j], ...]; axes without an index stay.

    Shapes: x any, any strides, any dtype; index maps an axis (negative ones count from the end)
    to a 1-d sequence of positions on it. A permutation reorders, a shorter or longer one selects
    or repeats; require="permutation" refuses all but permutations. The result is contiguous unless
    `out` is given; `out` may not overlap x.
    Result: a copy of the bits of x, NaN payloads included.
    Cost: one read and one write, all axes at once.
    Raises: ArgumentError for axes that are not there or given twice, for positions out of range
    (negative ones are), for what is no permutation if one is required.
    Source: `apply_permutation` of Git Re-Basin (Ainsworth et al., 2209.04836).

    >>> import torch
    >>> permute(torch.arange(6).view(2, 3), {0: [1, 0], 1: [2, 0, 1]})
    tensor([[5, 3, 4],
            [2, 0, 1]])
    """
    return _call(OP, {"x": x}, {"x": index}, require, None if out is None else {"x": out}, backend)[
        "x"
    ]


def permute_all(
    xs: Mapping[str, Tensor],
    indices: Mapping[str, Mapping[int, Any]],
    *,
    require: str | None = None,
    out: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """{name: permute(xs[name], indices[name])}: a whole model at once.

    All tensors are done in one run of the thread pool, so many small ones cost little more than
    their bytes. Tensors of any shapes and dtypes, on one device; those without indices are copied.
    An index that several tensors share is checked and prepared once. `out` has a tensor for every
    name; none may overlap another or any of xs.
    Result, Cost, Source: as permute.
    Raises: ArgumentError as permute, and for indices of a tensor that is not there.

    >>> import torch
    >>> p = [1, 0]
    >>> layer = {"weight": torch.arange(4).view(2, 2), "bias": torch.arange(2)}
    >>> permute_all(layer, {"weight": {0: p, 1: p}, "bias": {0: p}})
    {'weight': tensor([[3, 2],
            [1, 0]]), 'bias': tensor([1, 0])}
    """
    op = "permute_all"
    check.names(op, xs, indices, out, "indices")
    return _call(op, xs, indices, require, out, backend)


def _call(
    op: str,
    xs: Mapping[str, Tensor],
    indices: Mapping[str, Mapping[int, Any]],
    require: str | None,
    out: Mapping[str, Tensor] | None,
    backend: str,
) -> dict[str, Tensor]:
    """Checks, allocates and calls one backend for all."""
    check.choice(op, "require", require, (None, "permutation"))
    tensors = {name: check.tensor(op, x, name, floating=False) for name, x in xs.items()}
    if not tensors:
        return {}
    device = next(iter(tensors.values())).device
    positions = _Positions(op, device, require)
    chosen: list[Indices] = []
    results: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if x.device != device:
            raise ArgumentError.of(op, f"{name} lies elsewhere", str(x.device), str(device))
        index = positions.read(name, x, indices.get(name, {}))
        shape = [index[d].numel() if d in index else size for d, size in enumerate(x.shape)]
        given = None if out is None else out[name]
        alone = [x] if len(tensors) == 1 else ()  # of several, `apart` compares all with all
        results[name] = check.output(op, given, x, shape=shape, inputs=alone, in_place=False)
        chosen.append(index)
    if out is not None and len(results) > 1:
        check.apart(op, results, tensors)
    first = next(iter(tensors.values()))
    kernel = dispatch.load(dispatch.select(backend, OP, device, first.dtype), OP)
    dense = [
        r if r.is_contiguous() else torch.empty(r.shape, dtype=r.dtype, device=device)
        for r in results.values()
    ]
    kernel(dense, list(tensors.values()), chosen)
    for result, made in zip(results.values(), dense, strict=True):
        if result is not made:
            result.copy_(made)
    return results


def end_to_end(tensors: Sequence[Sequence[Tensor]], backend: str) -> list[Tensor]:
    """For each sequence one vector: its tensors' elements in C order, one tensor after another.

    The tensors are checked ones, of one device, those of a sequence of one dtype. On a GPU all
    sequences are copied in a launch, or in two where some tensors do not fill words of 16 bytes.
    """
    first = tensors[0][0]
    chosen = dispatch.select(backend, OP, first.device, first.dtype)
    if chosen not in ("cuda", "triton"):
        return [torch.cat([x.reshape(-1) for x in xs]) for xs in tensors]
    sizes = [sum(x.numel() for x in xs) for xs in tensors]
    buffers = [xs[0].new_empty(size) for xs, size in zip(tensors, sizes, strict=True)]
    dispatch.load(chosen, OP, "end_to_end")(buffers, tensors)
    return buffers


class _Positions:
    """Checked indices; what several tensors share is checked once."""

    def __init__(self, op: str, device: torch.device, require: str | None) -> None:
        self.op, self.device, self.require = op, device, require
        self._known: dict[tuple[int, int], tuple[Any, Tensor]] = {}

    def read(self, name: str, x: Tensor, index: Mapping[int, Any]) -> Indices:
        """Contiguous int64 positions of each axis of x that `index` has."""
        op = self.op
        of = "" if op == OP else f" of {name}"
        if not isinstance(index, Mapping):
            got, expected = type(index).__name__, "a mapping of axes to positions"
            raise ArgumentError.of(op, f"index{of} is no mapping", got, expected)
        chosen: Indices = {}
        for axis, positions in index.items():
            if not hasattr(axis, "__index__") or not -x.ndim <= axis < x.ndim:
                raise ArgumentError.of(
                    op, "no such axis", f"{axis}{of}", f"one of the {x.ndim} axes of {name}"
                )
            d = axis % x.ndim
            if d in chosen:
                raise ArgumentError.of(op, "an axis is given twice", f"{d}{of}", "each axis once")
            key = (id(positions), x.shape[d])
            if key not in self._known:
                what = f"index of axis {d}{of}"
                self._known[key] = positions, self._checked(what, positions, x.shape[d])
            chosen[d] = self._known[key][1]
        return chosen

    def _checked(self, what: str, positions: Any, size: int) -> Tensor:
        i = check.integers(self.op, what, positions)
        if i.numel():
            low, high = (int(v) for v in torch.aminmax(i))
            if low < 0 or high >= size:
                expected = f"0 to {size - 1}"
                raise ArgumentError.of(
                    self.op, f"{what} is out of range", f"{low} to {high}", expected
                )
        if self.require == "permutation":
            distinct = int((torch.bincount(i, minlength=size) > 0).sum())
            if len(i) != size or distinct != size:
                got = f"{len(i)} positions, {distinct} of them distinct"
                expected = f"each of 0 to {size - 1} once"
                raise ArgumentError.of(self.op, f"{what} is no permutation", got, expected)
        return i.to(self.device)


def cost(out_numel: int, itemsize: int) -> Cost:
    """One read and one write of what the result holds."""
    return Cost(2 * out_numel * itemsize, 0)
