"""study_adapters: what the task vectors of several adapters are like, and what a merge kept."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from . import factors
from .adapter import Adapter, Factors
from .files import load_adapter
from .merge import Given

OP = "study_adapters"


@dataclass(frozen=True)
class ModuleStudy:
    """Of the n task vectors of one weight [out, in]; None or NaN where an adapter has none, or 0.

    spectra: singular values above rounding, each in descending order. columns, rows [n, n]: the
    mean squared cosines of the principal angles between their column spaces, what they write to,
    and between their row spaces, what they read. kept: |merged|_F / |sum of the task vectors|_F,
    NaN where the sum is 0 or rounding alone. lost: what a truncation left out, as the merged
    adapter says.
    """

    size: tuple[int, int]
    spectra: list[list[float] | None]
    columns: Tensor
    rows: Tensor
    kept: float | None
    lost: float | None


@dataclass(frozen=True)
class Study:
    """By module, in order of depth."""

    modules: dict[str, ModuleStudy]

    def columns(self) -> Tensor:
        """[n, n], the means over those modules where both have a task vector."""
        return torch.stack([m.columns for m in self.modules.values()]).nanmean(0)

    def rows(self) -> Tensor:
        """The same of rows."""
        return torch.stack([m.rows for m in self.modules.values()]).nanmean(0)

    def chance(self, side: int) -> float:
        """The mean alignment of spaces of these ranks drawn at random; side 0: columns, 1: rows."""
        found = [
            max(len(s), len(t)) / m.size[side]
            for m in self.modules.values()
            for s, t in itertools.combinations([s for s in m.spectra if s], 2)
        ]
        return statistics.mean(found) if found else math.nan

    def plain(self) -> dict[str, Any]:
        """For JSON: None for what is not there."""
        return {
            "columns": _plain(self.columns()),
            "rows": _plain(self.rows()),
            "modules": {
                name: {
                    "singular_values": m.spectra,
                    "columns": _plain(m.columns),
                    "rows": _plain(m.rows),
                    "kept": None if m.kept is None or math.isnan(m.kept) else m.kept,
                    "lost": m.lost,
                }
                for name, m in self.modules.items()
            },
        }


def study_adapters(adapters: Sequence[Given], merged: Adapter | None = None) -> Study:
    """Spectra and alignment of task vectors d_i = scale_i b_i a_i, and |merged|_F / |sum_i d_i|_F.

    With d_i = u_i diag(s_i) v_i^T, of rank r_i, the alignment of i and j is
    |u_i^T u_j|_F^2 / min(r_i, r_j) in columns, and the same of v in rows: 1 where the smaller space
    lies in the larger, 0 where they are orthogonal, and on average max(r_i, r_j) / out (or in) for
    spaces that have nothing to do with each other.

    Shapes: adapters: folders of PEFT or `Adapter` objects, of any ranks and modules, whose weights
    have one shape where they share a name. merged: what was made of them.
    Result: float64, from factors: no matrix of a weight's size. A singular value is off by the
    float64 rounding of |b_i| |a_i|; those below that are left out, as directions of no meaning.
    Cost: for each task vector two QR, of [out, r] and [in, r], and an SVD of [r, r]; for each pair
    two products of [r, out] and [r, in].
    Raises: ArgumentError where there is no module, shapes differ, a factor holds NaN or infinities,
    or `merged` has a module that no adapter has; CheckpointError as `load_adapter`.
    Source: principal angles by Björck and Golub, 1973; the subspaces of task vectors as in Iso-C
    (Marczak et al., 2502.04959).

    >>> import torch
    >>> b, rows = torch.ones(2, 1), (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    >>> two = [Adapter({"fc": Factors(a, b, shape=(2,))}) for a in rows]
    >>> found = study_adapters(two).modules["fc"]
    >>> [round(s, 4) for (s,) in found.spectra]
    [1.4142, 2.8284]
    >>> found.columns[0, 1].round(decimals=6), found.rows[0, 1].round(decimals=6)
    (tensor(1., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    loaded = [x if isinstance(x, Adapter) else load_adapter(x) for x in adapters]
    names = sorted({name for a in loaded for name in a.modules}, key=_by_depth)
    if not names:
        raise ArgumentError.of(OP, "there are no task vectors", "none", "adapters with modules")
    if merged is not None and (others := sorted({*merged.modules} - {*names})):
        raise ArgumentError.of(
            OP, "merged has other modules", ", ".join(others), "those of adapters"
        )
    return Study(
        {name: _module(name, [a.modules.get(name) for a in loaded], merged) for name in names}
    )


def _by_depth(name: str) -> list[str | int]:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", name)]


def _module(name: str, given: Sequence[Factors | None], merged: Adapter | None) -> ModuleStudy:
    there = [f for f in given if f is not None]
    if len(sizes := {(len(f.b), f.shape, f.embedding) for f in there}) > 1:
        got = ", ".join(sorted(map(str, sizes)))
        raise ArgumentError.of(OP, f"{name} differs in shape", got, "the same in all adapters")
    found = [None if f is None else _decomposed(name, i, f) for i, f in enumerate(given)]
    kept = lost = None
    if merged is not None and name in merged.modules:
        whole = _norm(there)
        kept = _norm([merged.modules[name]]) / whole if whole else math.nan
        lost = merged.lost.get(name)
    return ModuleStudy(
        (len(there[0].b), there[0].a.shape[1]),
        [None if d is None else d.s.tolist() for d in found],
        _alignment([None if d is None else d.u for d in found]),
        _alignment([None if d is None else d.v for d in found]),
        kept,
        lost,
    )


class _Decomposed(NamedTuple):
    """u diag(s) v^T, with the r singular values above rounding."""

    u: Tensor  # [out, r]
    s: Tensor
    v: Tensor  # [in, r]


def _decomposed(name: str, i: int, f: Factors) -> _Decomposed:
    for x in (f.a, f.b):
        check.finite(OP, f"{name} of adapter {i}", x)
    us, vh, _ = factors.truncated(*factors.sum_of([f], [1.0]), None)
    s = torch.linalg.vector_norm(us, dim=0)
    return _Decomposed(us / s, s, vh.T)


def _norm(given: Sequence[Factors]) -> float:
    """|sum of the task vectors|_F, that of the product of two triangles; 0 if rounding made it."""
    b, a = factors.sum_of(given, [1.0] * len(given))
    r, t = torch.linalg.qr(b).R, torch.linalg.qr(a.T).R
    norm, one, other = (float(torch.linalg.vector_norm(x)) for x in (r @ t.T, r, t))
    return norm if norm > len(a) * torch.finfo(torch.float64).eps * one * other else 0.0


def _alignment(bases: Sequence[Tensor | None]) -> Tensor:
    """[n, n], of orthonormal columns; NaN where there are none."""
    n = len(bases)
    found = torch.full((n, n), math.nan, dtype=torch.float64)
    for i, x in enumerate(bases):
        for j, y in enumerate(bases):
            if x is not None and y is not None and (least := min(x.shape[1], y.shape[1])):
                found[i, j] = (x.T @ y).square().sum() / least
    return found


def _plain(matrix: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(x) else x for x in row] for row in matrix.tolist()]
