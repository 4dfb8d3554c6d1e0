"""What a trim keeps of the task vectors of one tensor, whole or slice by slice.

By magnitude: the elements between two ranks. A tensor in memory asks `kth_magnitudes`; slices count
digits, in a pass each, and where equal magnitudes are divided pass once more for their places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import bits, check
from ..keep import NOTHING, Band, Bernoulli, Keep, Mask, Threshold, from_index
from ..ops.kth_magnitude import WholeModel, kth_magnitudes
from ..ops.merge_deltas import l1_factor, l1_norms
from . import host_masks, slices
from .passes import Passes, Study
from .registry import Inputs, Parameter, ever

# From so many elements on tensors are not joined: a search of one tensor takes 95 us, the sort of
# many 0.27 us an element, measured on a core of Zen 5.
JOINED = 256

Ranks = list[tuple[int, int]]  # per model: keep up to the first, without those up to the second


@dataclass(frozen=True)
class Trim:
    """How a method chooses what to keep: parameters beside density, and the ranks they give."""

    doc: str
    parameters: tuple[Parameter, ...]
    ranks: Callable[..., Ranks] | None  # None: at random

    def rules(self, inputs: Inputs, density: list[float], **special: Any) -> list[Keep]:
        """Of tensors in memory whole."""
        if self.ranks is None:
            return at_random(inputs, density)
        if inputs.sizes is not None:
            each = [self.ranks(n, inputs.host, density, **special) for n in inputs.sizes]
            return _ranked_end_to_end(inputs, density, each)
        ranks = self.ranks(inputs.total, inputs.host, density, **special)
        return _ranked(inputs, density, ranks)


class Kept(NamedTuple):
    """What was measured of the slices: rules of the whole tensor, what restores the norms."""

    rules: list[Keep] | None
    factors: list[float] | None

    def keep(self, inputs: Inputs, density: list[float]) -> list[Keep]:
        """The rules for a slice."""
        if self.rules is None:
            return at_random(inputs, density)
        return [from_index(k, inputs.offset) for k in self.rules]


# ---- ranks -----------------------------------------------------------------------------------


def largest(total: int, host: str | None, density: list[float]) -> Ranks:
    """int(density * numel) of the largest magnitudes of each x - base, at least one.

    sd-mecha keeps those not below the smallest of the rest, and so at least one more.
    """
    if host == "sd_mecha":
        return [(total + 1 - max(1, int((1 - d) * total)), 0) for d in density]
    least = 0 if host == "peft" else 1
    return [(max(least, int(d * total)) if d > 0 else 0, 0) for d in density]


def without_outliers(
    total: int, host: str | None, density: list[float], gamma: list[float]
) -> Ranks:
    """int(density * numel) magnitudes below the int(gamma * numel) largest ones.

    Fewer outliers go where the rest would not be enough.
    """
    ranks = []
    for d, g in zip(density, gamma, strict=True):
        target = int(d * total)
        last = total - max(0, total - target - int(g * total))
        ranks.append((last, last - target))
    return ranks


def _searched(density: list[float], ranks: Ranks, total: int) -> tuple[list[Keep], dict[int, list]]:
    """The rules that need no search, and per model the ranks to search for."""
    keep: list[Keep] = [None] * len(density)
    chosen = {}
    for i, (d, (last, outliers)) in enumerate(zip(density, ranks, strict=True)):
        if last <= outliers:
            keep[i] = NOTHING
        elif d < 1 and total:
            chosen[i] = [r for r in (last, outliers) if r]
    return keep, chosen


def _rule(thresholds: Sequence[Threshold]) -> Keep:
    return Band(*thresholds) if len(thresholds) == 2 else thresholds[0]


def _ranked(inputs: Inputs, density: list[float], ranks: Ranks) -> list[Keep]:
    keep, chosen = _searched(density, ranks, inputs.total)
    if chosen:
        found = kth_magnitudes(
            [inputs.xs[i] for i in chosen],
            list(chosen.values()),
            base=inputs.base,
            rounded=inputs.host == "mergekit",
            backend=inputs.backend,
        )
        for i, thresholds in zip(chosen, found, strict=True):
            if inputs.host == "sd_mecha":  # every tie stays
                thresholds = [t._replace(cut=inputs.total) for t in thresholds]
            keep[i] = _rule(thresholds)
    return keep


def _ranked_end_to_end(inputs: Inputs, density: list[float], ranks: list[Ranks]) -> list[Keep]:
    """Of tensors that lie end to end, each with its ranks: the same elements, by one sort."""
    assert inputs.sizes is not None
    assert inputs.base is not None
    device = inputs.xs[0].device
    sizes = np.array(inputs.sizes)
    of = np.repeat(np.arange(len(sizes)), sizes)  # the tensor of each element
    place = np.arange(len(of)) - (np.cumsum(sizes) - sizes)[of]
    bounds = np.array(ranks).reshape(len(sizes), len(density), 2)[of]
    tensor = torch.from_numpy(of).to(device)
    keep: list[Keep] = []
    for i, d in enumerate(density):
        if d >= 1 and all(last > outliers for last, outliers in (r[i] for r in ranks)):
            keep.append(None)
            continue
        x, acc = inputs.xs[i], check.accumulator(inputs.xs[i].dtype)
        order = (x.to(acc) - inputs.base.to(acc)).abs().sort(descending=True, stable=True).indices
        order = order[tensor[order].sort(stable=True).indices]
        last, outliers = bounds[:, i].T
        kept = torch.empty_like(tensor, dtype=torch.bool)
        kept[order] = torch.from_numpy((outliers <= place) & (place < last)).to(device)
        keep.append(Mask(bits.pack(kept)))
    return keep


def at_random(inputs: Inputs, density: list[float]) -> list[Keep]:
    """Each element with probability density."""
    if inputs.host is None:
        key = inputs.seed, inputs.name
        return [Bernoulli(d, *key, i, inputs.offset) for i, d in enumerate(density)]
    return [
        None if d >= 1 else host_masks.bernoulli(x, d)
        for x, d in zip(inputs.xs, density, strict=True)
    ]


# ---- slice by slice --------------------------------------------------------------------------


def cut_of(trim: Trim | None) -> Callable[..., str | None]:
    """Masks from torch's generator and norms as mergekit sums them are of whole tensors."""

    def cut(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> str | None:
        if trim is not None and host is not None and any(d < 1 for d in arguments["density"]):
            summed = host == "mergekit" and arguments.get("rescale")
            if trim.ranks is None or summed:
                return None
        return "elements"

    return cut


def needs_of(trim: Trim | None) -> Callable[..., bool]:
    def needs(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> bool:
        if trim is None or all(d >= 1 for d in arguments["density"]):
            return False
        return trim.ranks is not None or _restores(arguments, host)

    return needs


def joins_of(trim: Trim | None) -> Callable[..., int]:
    """Draws are keyed by the name, and norms are of one tensor: these are not joined."""
    if trim is None:
        return ever

    def joins(arguments: Mapping[str, Any]) -> int:
        return 0 if trim.ranks is None or _restores(arguments, None) else JOINED

    return joins


def _restores(arguments: Mapping[str, Any], host: str | None) -> bool:
    """Whether L1 norms are summed; PEFT divides by the probability."""
    return bool(arguments.get("rescale")) and host != "peft"


def measure_of(trim: Trim) -> Study:
    return Study(lambda gather: _Measure(trim).passes())


class _Measure:
    """The passes over the slices of one tensor."""

    def __init__(self, trim: Trim) -> None:
        self._trim = trim
        self._rules: list[Keep] | None = None
        self._wholes: dict[int, WholeModel] = {}
        self._cuts: dict[int, list[int]] = {}
        self._norms: list[tuple[float, float]] = []
        self._total, self._host, self._restores = 0, "", False

    def passes(self) -> Passes:
        if self._trim.ranks is not None:
            yield from self._thresholds()
        if self._trim.ranks is None or self._restores:
            yield self._sum
        return Kept(self._rules, [l1_factor(*n) for n in self._norms] or None)

    def _thresholds(self) -> Passes:
        yield self._count
        while unfinished := [w for w in self._wholes.values() if w.unfinished]:
            for whole in unfinished:
                whole.end_pass()
            if any(w.unfinished for w in unfinished):
                yield self._count
        found = {i: whole.thresholds for i, whole in self._wholes.items()}
        if self._host != "sd_mecha" and any(w.splits_ties for w in self._wholes.values()):
            self._cuts = {i: [0] * len(ts) for i, ts in found.items()}
            yield self._place
        assert self._rules is not None
        for i, thresholds in found.items():
            cuts = self._cuts.get(i, [self._total] * len(thresholds))
            self._rules[i] = _rule(
                [t._replace(cut=cut) for t, cut in zip(thresholds, cuts, strict=True)]
            )

    def _count(self, inputs: Inputs, *, density: list[float], **others: Any) -> None:
        if self._rules is None:
            self._begin(inputs, density, others)
        for i, whole in self._wholes.items():
            if whole.unfinished:
                whole.update([inputs.xs[i]], inputs.base, inputs.shared)

    def _begin(self, inputs: Inputs, density: list[float], others: dict[str, Any]) -> None:
        assert self._trim.ranks is not None
        special = {p.name: others[p.name] for p in self._trim.parameters}
        ranks = self._trim.ranks(inputs.total, inputs.host, density, **special)
        self._rules, chosen = _searched(density, ranks, inputs.total)
        self._total, self._host = inputs.total, inputs.host or ""
        self._restores = _restores(others, inputs.host)
        for i, ks in chosen.items():
            fixed = [functools.partial(_constant, k) for k in ks]
            rounded = inputs.host == "mergekit"
            self._wholes[i] = WholeModel(fixed, inputs.backend, rounded=rounded)

    def _place(self, inputs: Inputs, **_: Any) -> None:
        """Equal magnitudes are kept by index: up to the last one that is."""
        for i, whole in self._wholes.items():
            for j, rule in enumerate(whole.rules([inputs.xs[i]], inputs.base)):
                if rule.cut:
                    self._cuts[i][j] = inputs.offset + rule.cut

    def _sum(self, inputs: Inputs, *, density: list[float], **others: Any) -> None:
        if _restores(others, inputs.host):
            keep = Kept(self._rules, None).keep(inputs, density)
            self._norms = _added(self._norms, inputs, keep)


def _constant(k: int, total: int) -> int:
    return k


def _added(
    norms: list[tuple[float, float]], inputs: Inputs, keep: list[Keep]
) -> list[tuple[float, float]]:
    """The norms with those of one more slice."""
    more = l1_norms(inputs.xs, keep, base=inputs.base, backend=inputs.backend)
    if not norms:
        return more
    return [(a + c, b + d) for (a, b), (c, d) in zip(norms, more, strict=True)]


def factors(inputs: Inputs, keep: list[Keep]) -> list[float]:
    """What restores the L1 norms of tensors in memory whole, summed by the slice."""
    norms: list[tuple[float, float]] = []
    for one in slices.parts(inputs, "elements"):
        rules = keep if one is inputs else [from_index(k, one.offset) for k in keep]
        norms = _added(norms, one, rules)
    return [l1_factor(*n) for n in norms]
