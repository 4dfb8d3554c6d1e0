"""covariance in Triton: the kernels of moments.py, as covariance_kernels.py has them."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import moments
from ..moments import MEASURED, TILE, Operand, Rows, cdiv
from . import covariance_kernels as kernels


def _launch(
    kernel: Any,
    grid: tuple[int, int],
    first: Tensor,
    *args: Any,
    options: Mapping[str, Any] = kernels.LAUNCH,
    **constants: Any,
) -> None:
    # Triton launches on the current device and stream; its interpreter is numpy, which warns.
    with torch.cuda.device_of(first), np.errstate(all="ignore"):
        kernel[grid](first, *args, **constants, **options)


class _Kernels:
    @staticmethod
    def measure(rows: Rows, first: Tensor, sums: Tensor, keys: Tensor) -> None:
        _launch(
            kernels.measure_kernel,
            (len(keys), cdiv(rows.width, kernels.COLUMNS)),
            rows.x,
            rows.offsets,
            first[rows.at :],
            sums[0, :, rows.at :],
            sums[1, :, rows.at :],
            keys[:, rows.at :],
            len(rows.offsets),
            rows.width,
            rows.x.stride(-1),
            keys.shape[1],
            ZERO=rows.zero,
            WIDE=rows.wide(),
            ROWS=MEASURED,
        )

    @staticmethod
    def pack(operand: Operand, rows: Rows, end: int, shift: Tensor, scale: Tensor) -> None:
        n = len(rows.offsets)
        _launch(
            kernels.pack_kernel,
            (cdiv(n, kernels.PACKED_ROWS), cdiv(end - rows.at, kernels.COLUMNS)),
            operand.values,
            operand.deep,
            rows.x,
            rows.offsets,
            shift,
            scale,
            n,
            rows.width,
            rows.at,
            end,
            rows.x.stride(-1),
            n * operand.padded,
            operand.padded,
            operand.deep.shape[1],
            ZERO=rows.zero,
            WIDE=rows.wide(),
            SPLIT=len(operand.values) > 1,
        )

    @staticmethod
    def multiply(
        sums: Tensor, tiles: Tensor, x: Operand, y: Operand, span: int, mixed: bool, deep: bool
    ) -> None:
        _launch(
            kernels.multiply_kernel,
            (sums.shape[1], sums.shape[0]),
            sums,
            tiles,
            x.values,
            y.values,
            x.deep,
            y.deep,
            x.values.shape[-2],
            span,
            x.padded,
            y.padded,
            x.deep.shape[1],
            y.deep.shape[1],
            MIXED=mixed,
            DEEP=deep,
            WIDTH=sums.shape[-1],
            UPCAST=sums.device.type == "cpu",
            options=kernels.TENSOR_CORES,
        )

    @staticmethod
    def merge(
        products: Tensor, sums: Tensor, tiles: Tensor, x: Tensor, y: Tensor, first: bool
    ) -> None:
        _launch(
            kernels.merge_kernel,
            (sums.shape[1], TILE // kernels.MERGED_ROWS),
            products,
            sums,
            tiles,
            x,
            y,
            len(sums),
            x.shape[1],
            y.shape[1],
            WIDTH=sums.shape[-1],
            TRIANGLE=x is y,
            FIRST=first,
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
