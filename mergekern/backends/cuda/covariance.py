"""covariance by csrc/cuda/covariance.cu and covariance_multiply.cu: the kernels of moments.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import moments
from ..moments import Operand, Rows
from .runtime import DTYPES, _cuda, place


def _described(rows: Rows, side: int) -> Any:
    return _cuda.FeatureRows(
        x=rows.x.data_ptr(),
        dtype=DTYPES[rows.x.dtype],
        offsets=rows.offsets.data_ptr(),
        n=len(rows.offsets),
        width=rows.width,
        stride=rows.x.stride(-1),
        at=rows.at,
        side=side,
        zero=rows.zero,
        wide=rows.wide(),
    )


class _Kernels:
    @staticmethod
    def measure(rows: Rows, first: Tensor, sums: Tensor, keys: Tensor) -> None:
        _cuda.measure(
            _described(rows, len(first)),
            first=first.data_ptr(),
            sums=sums.data_ptr(),
            largest=keys.data_ptr(),
            **place(keys.device),
        )

    @staticmethod
    def pack(operand: Operand, rows: Rows, end: int, shift: Tensor, scale: Tensor) -> None:
        _cuda.pack(
            _described(rows, len(scale)),
            to=operand.values.data_ptr(),
            deep=operand.deep.data_ptr(),
            shift=shift.data_ptr(),
            scale=scale.data_ptr(),
            end=end,
            padded=operand.padded,
            panels=operand.deep.shape[1],
            split=len(operand.values) > 1,
            **place(scale.device),
        )

    @staticmethod
    def multiply(
        sums: Tensor, tiles: Tensor, x: Operand, y: Operand, span: int, mixed: bool, deep: bool
    ) -> None:
        splits, count, _, width = sums.shape
        _cuda.multiply(
            sums=sums.data_ptr(),
            tiles=tiles.data_ptr(),
            x=x.values.data_ptr(),
            y=y.values.data_ptr(),
            deep_x=x.deep.data_ptr(),
            deep_y=y.deep.data_ptr(),
            dtype=DTYPES[x.values.dtype],
            n=x.values.shape[-2],
            span=span,
            padded_x=x.padded,
            padded_y=y.padded,
            panels_x=x.deep.shape[1],
            panels_y=y.deep.shape[1],
            count=count,
            splits=splits,
            width=width,
            mixed=mixed,
            deep=deep,
            **place(sums.device),
        )

    @staticmethod
    def merge(
        products: Tensor, sums: Tensor, tiles: Tensor, x: Tensor, y: Tensor, first: bool
    ) -> None:
        splits, count, _, width = sums.shape
        _cuda.merge_products(
            products=products.data_ptr(),
            sums=sums.data_ptr(),
            tiles=tiles.data_ptr(),
            x=x.data_ptr(),
            y=y.data_ptr(),
            width_x=x.shape[1],
            width_y=y.shape[1],
            count=count,
            splits=splits,
            width=width,
            triangle=x is y,
            first=first,
            **place(sums.device),
        )


def covariance(
    products: Tensor,
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    xs: list[list[Tensor]],
    rows: Tensor | None,
    zero: bool,
) -> bool:
    return moments.covariance(_Kernels, products, means, squares, count, xs, rows, zero)
