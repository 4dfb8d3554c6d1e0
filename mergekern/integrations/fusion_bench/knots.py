"""KnOTS' subspaces: FusionBench has its first step, a function, and no algorithm of that name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...adapters.low_rank import svd_above


def subspace_alignment(
    delta_weights: Sequence[Tensor], svd_dtype: Any = torch.float64, eps: float = 1e-4
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(U, S, V_i^T of each task) of U S [V_1^T V_2^T ...], the task vectors side by side.

    Singular values up to `eps` are left out. Computed in float64, whatever `svd_dtype` says; what
    comes out has the dtype of the task vectors.
    Cost: of k singular values about 5 products [O, nI] x [nI, k + 64] (`svd_above`).
    """
    first = delta_weights[0]
    u, s, vh = (x.to(first.dtype) for x in svd_above(torch.cat(list(delta_weights), 1), eps))
    return u, s, torch.split(vh, first.shape[1], 1)
