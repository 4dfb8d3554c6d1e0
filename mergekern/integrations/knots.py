"""KnOTS' merging by mergekern: `install()` with a checkout of KnOTS on sys.path, then its scripts.

Replaced are `topk_values_mask`, `ties_merging` in `merging_functions`; `topk_values_mask`,
`ties_masking`, `masked_merge` in `masking_ops`, and where `task_merger` has bound them; and
`SVDMerger.apply_svd`. `uninstall` puts KnOTS' own back.

Masks, signs and merged vectors are KnOTS' to the bit, with its rules: a share K keeps int(K d) + 1
elements and every tie, K = 1 and more than 100 keep all, only `weights[0]` counts. Its steps are
taken in pieces that stay in cache, and thresholds are selected instead of sorted out. `apply_svd`
gives its singular values and vectors but for float32's rounding and the signs of pairs, which no
decomposition settles. What these functions print is not printed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..adapters.low_rank import svd_above
from ..errors import ArgumentError
from ..ops.kth_magnitude import kth_magnitude
from ._swaps import Swaps, host_module, require_parameters, within

_CUT = 1e-5  # of singular values, absolute
_PIECE = 1 << 14  # elements of each vector
_ROWS = 10000  # vectors that are summed at a time
_installed: list[Swaps] = []


def install() -> None:
    """Replace KnOTS' functions; does nothing where that is done already.

    Raises: BackendError if KnOTS is not on sys.path, or its functions have other parameters.
    """
    if _installed:
        return
    with Swaps() as swaps:
        modules = ("merging_functions", "masking_ops", "task_merger")
        merging, masking, tasks = (host_module("KnOTS", name) for name in modules)
        replaced = {}
        for owner, name, new in (
            (merging, "topk_values_mask", topk_values_mask),
            (merging, "ties_merging", ties_merging),
            (masking, "topk_values_mask", _masking_topk),
            (masking, "ties_masking", ties_masking),
            (masking, "masked_merge", masked_merge),
            (getattr(tasks, "SVDMerger", None), "apply_svd", apply_svd),
        ):
            require_parameters("KnOTS", owner, name, new)
            replaced[swaps.attribute(owner, name, new)] = new
        for name, value in [*vars(tasks).items()]:
            if inspect.isfunction(value) and value in replaced:
                swaps.attribute(tasks, name, replaced[value])
        _installed.append(swaps)


def uninstall() -> None:
    """Put KnOTS' own functions back; does nothing where they are."""
    while _installed:
        _installed.pop().take_back()


@contextmanager
def accelerated() -> Iterator[None]:
    """KnOTS by mergekern inside the block, as it was before afterwards."""
    with within(_installed, install, uninstall):
        yield


# ---- the decomposition -----------------------------------------------------------------------


def apply_svd(
    self: Any, ft_params: Sequence[dict[str, Tensor]], concat_across_output: bool = True
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[dict[str, Tensor]], dict[str, Any]]:
    """(U, ones, diag(s) V of each task, all of it) of the matrices of all tasks side by side.

    Singular values up to 1e-5 are dropped, in float64; what comes out is float32, on the CPU.
    Cost: of k singular values about 5 products [O, nI] x [nI, k + 64] (`svd_above`).
    """
    matrices = self.dict_of_concat_matrices(
        ft_params, dim=1, concat_across_output=concat_across_output
    )
    basis: dict[str, Tensor] = {}
    ones: list[dict[str, Tensor]] = [{} for _ in ft_params]
    parts: list[dict[str, Tensor]] = [{} for _ in ft_params]
    everything: dict[str, Any] = {}
    for key, x in matrices.items():
        u, s, v = (t.float() for t in svd_above(x, _CUT))
        everything[key] = {"U": u, "s": s.clone(), "V": v}
        s[s <= _CUT] = 0  # as float32, one may be
        basis[key] = u.cpu()
        for i, part in enumerate(torch.split(v, v.shape[1] // len(ft_params), 1)):
            ones[i][key] = (s / s).cpu()
            parts[i][key] = (s[:, None] * part).cpu()
    return basis, ones, parts, everything


# ---- masks and merges ------------------------------------------------------------------------


def topk_values_mask(M: Tensor, K: float = 0.7, return_mask: bool = False) -> tuple[Tensor, ...]:
    """(M with what is dropped times 0, share kept of each row, the mask if it is asked for).

    Kept: the int(K d) + 1 largest magnitudes of each row and all that equal the least of them.
    """
    kept, mask, share = _masking_topk(M, K)
    return (kept, share, mask) if return_mask else (kept, share)


def _masking_topk(M: Tensor, K: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """The same in the order of masking_ops."""
    rows = M.unsqueeze(0) if M.dim() == 1 else M
    least = _least(rows, K)
    if least is None:
        return M, torch.ones_like(M), torch.ones_like(M).mean(dim=-1)
    mask, kept = torch.empty(rows.shape, dtype=torch.bool, device=M.device), torch.empty_like(rows)
    for at in _columns(rows):
        mask[:, at] = rows[:, at].abs() >= least
        kept[:, at] = rows[:, at] * mask[:, at]
    if M.shape == rows.squeeze().shape:
        mask, kept = mask.squeeze(), kept.squeeze()
    return kept, mask, mask.float().mean(dim=-1)


def ties_masking(
    vectors: Sequence[Tensor],
    topK: float = 100,
    sign_resolve_mode: str = "sum_of_values",
    **kwargs: Any,
) -> Tensor:
    """What of each vector is kept: the largest magnitudes, where they have the elected sign."""
    rows = torch.vstack(list(vectors))
    least = _least(rows, topK)
    signs = _signs(rows, least, sign_resolve_mode)
    # Of a share that keeps all, KnOTS' mask is of numbers.
    mask = torch.empty_like(rows, dtype=rows.dtype if least is None else torch.bool)
    for at in _columns(rows):
        mask[:, at] = _agreeing(rows[:, at], least, signs[at])
    return mask


def ties_merging(
    vectors: Sequence[Tensor],
    topK: float = 10,
    merging_type: str = "mean",
    weights: Sequence[float] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(merged vector, what agrees with the elected sign, what the trim kept)."""
    _check_type("ties_merging", merging_type)
    rows = torch.vstack(list(vectors))
    least = _least(rows, topK)
    signs = _signs(rows, least, "sum_of_values")
    agreeing = torch.empty_like(rows, dtype=torch.bool)
    mask = torch.ones_like(rows) if least is None else torch.empty_like(agreeing)
    merged = []
    for at in _columns(rows):
        if least is not None:
            mask[:, at] = rows[:, at].abs() >= least
        agreeing[:, at] = _agreeing(rows[:, at], least, signs[at])
        selected = rows[:, at] * agreeing[:, at]
        if weights is not None:
            selected *= weights[0]
        combined = _combined(selected, merging_type)
        merged.append(combined * signs[at] if merging_type == "max" else combined)
    return torch.cat(merged, -1), agreeing, mask


def masked_merge(
    vectors: Tensor, merge_func: str, weights: Sequence[float] | None = None
) -> Tensor:
    """The vectors times weights[0], which they stay, as their mean over those that are not 0, sum
    or largest magnitude."""
    _check_type("masked_merge", merge_func)
    if weights is not None:
        vectors *= weights[0]
    if merge_func == "unmerged":
        return vectors
    rows = vectors.reshape(len(vectors), -1)
    merged = [_combined(rows[:, at], merge_func) for at in _columns(rows)]
    return torch.cat(merged).view(vectors.shape[1:])


def _check_type(op: str, merge_func: str) -> None:
    if merge_func not in ("mean", "sum", "max", "unmerged"):
        known = "mean, sum, max, unmerged"
        raise ArgumentError.of(op, "unknown merging type", repr(merge_func), known)


def _least(rows: Tensor, share: float) -> Tensor | None:
    """The least magnitude kept of each row [n, 1]; None: all is kept."""
    share = share / 100 if share > 1 else share
    if share >= 1:
        return None
    k = int(rows.shape[1] * share) + 1
    found = [kth_magnitude(row, k).value for row in rows]
    return torch.tensor(found, dtype=rows.dtype, device=rows.device)[:, None]


def _columns(rows: Tensor) -> list[slice]:
    """Pieces that stay in cache with what is computed of them; on a GPU one."""
    size = rows.shape[1]
    step = _PIECE if rows.device.type == "cpu" else max(1, size)
    return [slice(at, min(at + step, size)) for at in range(0, max(1, size), step)]


def _pruned(rows: Tensor, least: Tensor | None) -> Tensor:
    return rows if least is None else rows * (rows.abs() >= least)


def _signs(rows: Tensor, least: Tensor | None, mode: str) -> Tensor:
    """Of each element's sum; where that is 0, the sign that most of all elements have."""
    if mode not in ("sum_of_values", "sum_of_signs"):
        raise ArgumentError.of(
            "ties_masking", "unknown mode", repr(mode), "sum_of_values or sum_of_signs"
        )
    signs = torch.empty_like(rows[0])
    for at in _columns(rows):
        pruned = _pruned(rows[:, at], least)
        votes = pruned if mode == "sum_of_values" else torch.sign(pruned)
        signs[at] = torch.sign(votes.sum(dim=0))
    if mode == "sum_of_values":
        signs[signs == 0] = torch.sign(signs.sum())
    return signs


def _agreeing(rows: Tensor, least: Tensor | None, signs: Tensor) -> Tensor:
    """What the trim keeps of the sign that is elected; a vote that is not positive is negative."""
    turned = rows * torch.where(signs > 0, 1, -1).to(rows.dtype)
    return turned > 0 if least is None else (turned > 0) & (turned >= least)


def _combined(rows: Tensor, merge_func: str) -> Tensor:
    if merge_func == "unmerged":
        return rows
    if merge_func == "max":
        return rows.abs().max(dim=0)[0]
    total = torch.zeros_like(rows[0])
    count = torch.zeros_like(rows[0])
    for some in torch.split(rows, _ROWS):
        total += some.sum(dim=0)
        if merge_func == "mean":
            count += (some != 0).sum(dim=0)
    return total if merge_func == "sum" else total / count.float().clamp(min=1)


__all__ = [
    "accelerated",
    "apply_svd",
    "install",
    "masked_merge",
    "ties_masking",
    "ties_merging",
    "topk_values_mask",
    "uninstall",
]
