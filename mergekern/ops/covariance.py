"""covariance: second moments of rows of activations, batch by batch."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import check, dispatch
from ..errors import ArgumentError
from . import _rows
from ._cost import Cost

_OP = "covariance"
_BLOCK = 256  # rows of a result that are scaled or mirrored at a time
Side = Tensor | Sequence[Tensor]


def covariance(
    x: Tensor,
    y: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    nan: str = "error",
    backend: str = "auto",
) -> Tensor:
    """C[i, j] = mean over rows of (x_i - mean x_i) (y_j - mean y_j); without y, of x with itself.

    Shapes: x [..., d_x], y [..., d_y] with as many rows, any strides; mask bool [...] or [rows]:
    rows where it is False do not count. The result is float64 [d_x, d_y], exactly symmetric
    without y. It is the biased covariance (1/n), as ZipIt's.
    Result: |error| <= (264 u s_i s_j + (2 n + 128) 2**-53 a_i a_j) for n rows, where s is a
    feature's standard deviation, a its largest magnitude and u = 2**-24, for float64 inputs and the
    backend torch 2**-53. The backends cuda and triton have 2**13 in the place of 264 for 16-bit
    inputs, a bound on what tensor cores cut off, of which emulated ones take up to 1e-5 s_i s_j.
    Rows are centred before they are multiplied, in float32 (float64 for float64 inputs), but for
    16-bit features of these backends with |mean| <= 4 s; sums of 256 products (cuda: 32, triton:
    64, both 512 of 16-bit inputs) are promoted to float64, in which chunks
    merge by Chan's formula. A large mean costs nothing: mean / s = 100 is as exact as 0. A feature
    that is constant has the variance 0 exactly. Means are within (2 n + 4) 2**-53 a. The backend
    `cpu` gives the same bits for any number of threads and any layout. float64 inputs whose squares
    leave float64 give infinities or NaN.
    NaN and infinities: nan="error" raises before anything is added; nan="zero" counts them as 0.
    Cost: two reads of x; n d (d + 1) flops, with y 2 n d_x d_y. Memory beside the result: a packed
    chunk of rows, 16 MiB, 8 bytes per row, and 16 per feature and chunk (1024 rows, fewer of many
    features). The backend torch copies a tensor whose leading axes are not one in memory.
    Raises: ArgumentError for no rows at all, NaN or infinities (naming rows), or inputs that do not
    fit. Fewer rows than features warn.
    Source: `CovarianceMetric` of ZipIt (Stoica et al., 2305.03053); Chan, Golub and LeVeque (1983).

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 5.0]])
    >>> covariance(x)
    tensor([[2.6667, 2.0000],
            [2.0000, 2.0000]], dtype=torch.float64)
    >>> covariance(x, x[:, :1], mask=torch.tensor([True, True, False]))
    tensor([[1.],
            [0.]], dtype=torch.float64)
    """
    return _of(x, y, mask, nan, backend).covariance()


def correlation(
    x: Tensor,
    y: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    eps: float = 0.0,
    nan: str = "error",
    backend: str = "auto",
) -> Tensor:
    """R[i, j] = C[i, j] / max(s_i s_j, eps), C the covariance and s the standard deviations.

    Arguments as those of `covariance`. A feature of variance 0 has the correlation 0 with all,
    itself included; the diagonal of others is exactly 1 with eps=0. eps=1e-7 is ZipIt's clamp,
    which shrinks correlations of features with s_i s_j < 1e-7. Results are clipped to [-1, 1]. The
    relative errors of both variances, halved, add to that of the covariance over s_i s_j.

    >>> import torch
    >>> correlation(torch.tensor([[1.0, 2.0, 7.0], [3.0, 1.0, 7.0], [3.0, 1.0, 7.0]]))
    tensor([[ 1., -1.,  0.],
            [-1.,  1.,  0.],
            [ 0.,  0.,  0.]], dtype=torch.float64)
    """
    return _of(x, y, mask, nan, backend).correlation(eps)


def _of(x: Tensor, y: Tensor | None, mask: Tensor | None, nan: str, backend: str) -> Covariance:
    xs = [_rows.matrix(_OP, v, name) for v, name in ((x, "x"), (y, "y")) if v is not None]
    moments = Covariance(*(v.shape[-1] for v in xs), device=xs[0].device, nan=nan, backend=backend)
    moments.update(*xs, mask=mask)
    return moments


class Covariance:
    """The moments behind `covariance` and `correlation`, added up over batches.

    dim_x features, and where dim_y is given another dim_y of the same rows: then only the products
    of one with the other are formed, beside the variances of each. `nan`, numbers and cost as in
    `covariance`; batches may differ in dtype and number of rows. A batch that is refused adds
    nothing. Memory: 8 dim_x**2 bytes, or 8 dim_x dim_y.

    >>> import torch
    >>> moments = Covariance(2)
    >>> for batch in torch.tensor([[[1.0, 2.0], [3.0, 2.0]], [[5.0, 5.0], [3.0, 3.0]]]):
    ...     moments.update(batch)
    >>> moments.count, moments.mean
    (4, tensor([3., 3.], dtype=torch.float64))
    >>> moments.covariance()
    tensor([[2.0000, 1.5000],
            [1.5000, 1.5000]], dtype=torch.float64)
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int | None = None,
        *,
        device: torch.device | str = "cpu",
        nan: str = "error",
        backend: str = "auto",
    ) -> None:
        dims = [_dim(d, name) for d, name in ((dim_x, "dim_x"), (dim_y, "dim_y")) if d is not None]
        check.choice(_OP, "nan", nan, ("error", "zero"))
        dispatch.select(backend, _OP, torch.device(device), torch.float64)
        self._nan, self._backend = nan, backend
        self.count, self._warned = 0, False
        self._means = [_zeros(device, d) for d in dims]
        self._products = _zeros(device, dims[0], dims[-1])
        self._squares = [_zeros(device, d) for d in dims] if len(dims) == 2 else []

    def update(self, x: Side, y: Side | None = None, *, mask: Tensor | None = None) -> None:
        """Adds the rows of x [..., dim_x] (and y [..., dim_y]) where `mask` is not False.

        No rows add nothing. Either side may be a list of tensors of as many rows each, which count
        as one: the features of the first, then those of the second, and so on.
        """
        xs = self._batch(x, y)
        first = xs[0][0]
        rows = None if mask is None else _rows.selected(_OP, mask, first)
        n = first.shape[:-1].numel() if rows is None else len(rows)
        chosen = dispatch.select(self._backend, _OP, first.device, first.dtype)
        kernel = dispatch.load(chosen, _OP)
        if not n:
            return
        moments = self._products, self._means, self._squares
        if not kernel(*moments, self.count, xs, rows, self._nan == "zero"):
            raise _rows.not_finite(_OP, xs, rows)
        self.count += n

    def _batch(self, x: Side, y: Side | None) -> list[list[Tensor]]:
        """The checked tensors of each side, as many sides as there are means."""
        if (y is None) != (len(self._means) == 1):
            got, expected = ("y", "no y") if y is not None else ("no y", "y")
            raise ArgumentError.of(_OP, "y does not fit dim_y", got, expected)
        xs = [_tensors(side, name) for side, name in ((x, "x"), (y, "y")) if side is not None]
        first = xs[0][0]
        for side, mean, name in zip(xs, self._means, ("x", "y")):
            width = sum(v.shape[-1] for v in side)
            if width != len(mean):
                what = f"{name} has another number of features"
                raise ArgumentError.of(_OP, what, width, len(mean))
            for v in side:
                if v.device != mean.device:
                    what = f"{name} is on another device"
                    raise ArgumentError.of(_OP, what, v.device, mean.device)
                if v.dtype != first.dtype:
                    got, expected = check.name_of(v.dtype), check.name_of(first.dtype)
                    raise ArgumentError.of(_OP, f"{name} differs from x in dtype", got, expected)
                n, expected_n = v.shape[:-1].numel(), first.shape[:-1].numel()
                if n != expected_n:
                    raise ArgumentError.of(_OP, f"{name} differs from x in rows", n, expected_n)
        return xs

    def merge(self, other: Covariance) -> None:
        """Adds the rows that `other` has seen, by Chan's formula in float64.

        In any order and grouping within the bound of `covariance`.
        """
        if not isinstance(other, Covariance):
            raise ArgumentError.of(_OP, "other is none", type(other).__name__, "a Covariance")
        for what, got, expected in (
            ("sizes", other._dims(), self._dims()),
            ("device", other._products.device, self._products.device),
        ):
            if got != expected:
                raise ArgumentError.of(_OP, f"other differs in {what}", got, expected)
        if not other.count:
            return
        share = other.count / (self.count + other.count)
        deltas = [b - a for a, b in zip(self._means, other._means)]
        weighted = [d * (self.count * share) for d in deltas]
        self._products.add_(other._products).addr_(weighted[0], deltas[-1])
        for mine, its, w, d in zip(self._squares, other._squares, weighted, deltas):
            mine.add_(its).addcmul_(w, d)
        for mean, d in zip(self._means, deltas):
            mean.add_(d, alpha=share)
        self.count += other.count

    # ---- results -------------------------------------------------------------------------------

    def _dims(self) -> list[int]:
        return [len(mean) for mean in self._means]

    def _some(self) -> int:
        """The number of rows, at least one."""
        if not self.count:
            raise ArgumentError.of(_OP, "there are no rows", 0, "at least one")
        return self.count

    @property
    def mean(self) -> Tensor:
        """Another name of mean_x."""
        return self.mean_x

    @property
    def mean_x(self) -> Tensor:
        """Of x, float64."""
        self._some()
        return self._means[0].clone()

    @property
    def mean_y(self) -> Tensor:
        """Of y (of x where there is no dim_y), float64."""
        self._some()
        return self._means[-1].clone()

    @property
    def variance_x(self) -> Tensor:
        """Biased, of x, float64."""
        return (self._squares[0] if self._squares else self._products.diagonal()) / self._some()

    @property
    def variance_y(self) -> Tensor:
        """Biased, of y (of x where there is no dim_y), float64."""
        return (self._squares[1] if self._squares else self._products.diagonal()) / self._some()

    def covariance(self) -> Tensor:
        """float64 [dim_x, dim_x] or [dim_x, dim_y]; see `mergekern.covariance`."""
        out = self._products / self._some()
        if self.count < max(self._dims()) and not self._warned:
            self._warned = True
            few = f"got {self.count}; expected {max(self._dims())} or more"
            warnings.warn(f"{_OP}: fewer rows than features; {few}", stacklevel=2)
        return out if self._squares else _mirror(out)

    def second_moment(self) -> Tensor:
        """M[i, j] = mean over rows of x_i y_j, not centred; float64, symmetric without y.

        |error| <= 264 u s_i s_j + (6 n + 140) 2**-53 a_i a_j, letters as in `covariance`: that of
        the covariance and of the product of the means.
        """
        out = torch.addr(self._products / self._some(), self._means[0], self._means[-1])
        return out if self._squares else _mirror(out)

    def correlation(self, eps: float = 0.0) -> Tensor:
        """float64 [dim_x, dim_x] or [dim_x, dim_y]; see `mergekern.correlation`."""
        eps = check.number(_OP, "eps", eps)
        if eps < 0:
            raise ArgumentError.of(_OP, "eps is negative", eps, "0 or more")
        out = self.covariance()
        x, y = self.variance_x.sqrt(), self.variance_y.sqrt()
        for i in range(0, len(out), _BLOCK):
            scale = torch.outer(x[i : i + _BLOCK], y).clamp_(min=eps)
            block = out[i : i + _BLOCK]
            block.div_(scale)[scale == 0] = 0
        if not self._squares and not eps:
            out.diagonal()[(x > 0) & (x < math.inf)] = 1
        return out.clamp_(-1, 1)

    # ---- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The accumulators themselves, by name; of products without y the upper triangle counts."""
        state = {"count": torch.tensor(self.count), "products": self._products}
        for name, tensors in (("mean", self._means), ("squares", self._squares)):
            state.update({f"{name}_{side}": t for side, t in zip("xy", tensors)})
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` of one of the same sizes returned, on any device."""
        mine = self.state_dict()
        if sorted(state) != sorted(mine):
            raise ArgumentError.of(_OP, "state has other names", sorted(state), sorted(mine))
        for name, t in mine.items():
            got, expected = ((v.dtype, tuple(v.shape)) for v in (state[name], t))
            if got != expected:
                raise ArgumentError.of(_OP, f"{name} does not fit", got, expected)
        count = int(state["count"])
        if count < 0:
            raise ArgumentError.of(_OP, "count is negative", count, "0 or more")
        for name, t in mine.items():
            t.copy_(state[name])
        self.count = count


def _tensors(side: Any, name: str) -> list[Tensor]:
    """Those of one side, at least one."""
    if not isinstance(side, (list, tuple)):
        return [_rows.matrix(_OP, side, name)]
    if not side:
        raise ArgumentError.of(_OP, f"{name} is an empty list", 0, "one tensor or more")
    return [_rows.matrix(_OP, x, f"{name}[{i}]") for i, x in enumerate(side)]


def _dim(value: Any, name: str) -> int:
    try:
        dim = operator.index(value)
    except TypeError:
        dim = 0
    if dim < 1 or isinstance(value, bool):
        raise ArgumentError.of(_OP, f"{name} is no number of features", repr(value), "1 or more")
    return dim


def _zeros(device: torch.device | str, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device)


def _mirror(out: Tensor) -> Tensor:
    """The upper triangle in the place of the lower one."""
    for i in range(0, len(out), _BLOCK):
        j = i + _BLOCK
        corner = out[i:j, i:j]
        corner.copy_(corner.triu() + corner.triu(1).T)
        out[j:, i:j] = out[i:j, j:].T
    return out


def cost(n: int, dim_x: int, itemsize: int, dim_y: int | None = None) -> Cost:
    """Reads the rows twice; one triangle of the products, or all of two sides'."""
    flops = n * dim_x * (dim_x + 1) if dim_y is None else 2 * n * dim_x * dim_y
    return Cost(2 * n * (dim_x + (dim_y or 0)) * itemsize, flops)
