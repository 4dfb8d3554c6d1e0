"""How many programs a GPU takes along each axis of a grid."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.sass import nvidia_tools

ROWS = 40_000_000
MOST = (2**31 - 1, 65_535, 65_535)


def test_rows_of_covariance_go_along_the_axis_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_tools()  # skips without triton
    from mergekern.backends.moments import MEASURED
    from mergekern.backends.triton import covariance

    grids = []

    def launch(kernel: Any, grid: tuple[int, ...], *_: Any, **__: Any) -> None:
        grids.append(grid)

    monkeypatch.setattr(covariance, "_launch", launch)
    one = torch.ones(1, 1)
    offsets = torch.zeros(1, dtype=torch.int64).expand(ROWS)
    rows: Any = SimpleNamespace(
        x=one, offsets=offsets, width=1, at=0, zero=False, wide=lambda: False
    )
    blocks = -(-ROWS // MEASURED)
    covariance._Kernels.measure(rows, one, one[None].expand(2, 1, 1), one.expand(blocks, 1))
    operand: Any = SimpleNamespace(values=one[None], deep=one, padded=128)
    covariance._Kernels.pack(operand, rows, 128, one, one)
    assert len(grids) == 2
    for grid in grids:
        assert all(programs <= most for programs, most in zip(grid, MOST)), grid
        assert max(grid) > 65_535
