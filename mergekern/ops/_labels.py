"""Labels: which group of the result a feature goes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError


class Labels(NamedTuple):
    """The group of every feature of every model."""

    parts: list[Tensor]  # int64
    counts: np.ndarray  # features of each group


class Part(NamedTuple):
    """Tensors, the factor of each, and the labels of their axes."""

    xs: list[Tensor]
    factors: list[float]
    labels: dict[int, Labels]


def read_labels(op: str, name: str, given: Any, sizes: list[int], device: torch.device) -> Labels:
    """One vector over all models, or a list with one of each; every group has a feature."""
    if isinstance(given, Sequence) and not all(isinstance(v, int | np.integer) for v in given):
        if len(given) != len(sizes):
            raise ArgumentError.of(op, f"{name} has the wrong length", len(given), len(sizes))
        vectors = [check.integers(op, f"{name}[{i}]", v).cpu() for i, v in enumerate(given)]
        for i, (vector, size) in enumerate(zip(vectors, sizes, strict=True)):
            if len(vector) != size:
                what = f"{name}[{i}] does not fit xs[{i}]"
                raise ArgumentError.of(op, what, f"{len(vector)} labels", f"{size} features")
        flat = torch.cat(vectors)
    else:
        flat = check.integers(op, name, given).cpu()
        if len(flat) != sum(sizes):
            what, expected = f"{name} does not add up to the sizes", " + ".join(map(str, sizes))
            raise ArgumentError.of(op, what, f"{len(flat)} labels", f"{expected} features")
    return Labels([*torch.split(flat.to(device), sizes)], _counts(op, name, flat.numpy()))


def _counts(op: str, name: str, labels: np.ndarray) -> np.ndarray:
    if not len(labels):
        return np.zeros(0, np.int64)
    low, high = labels.min(), labels.max()
    if low < 0 or high >= len(labels):
        what, expected = f"{name} has a label out of range", f"0 to {len(labels) - 1}"
        raise ArgumentError.of(op, what, f"{low} to {high}", expected)
    counts = np.bincount(labels)
    if not counts.all():
        what, expected = f"{name} leaves a group without a feature", f"one in each of 0 to {high}"
        raise ArgumentError.of(op, what, f"none in group {counts.argmin()}", expected)
    return counts


def blocks(op: str, whole: Part, groups: int) -> list[Part]:
    """A grouped convolution as one part for each of its groups of channels.

    Such a part takes all groups of channels of the models whose labels lie in it; labels that
    would tear one apart are refused.
    """
    rows, cols = whole.labels[0], whole.labels[1]
    for name, of in (("rows", rows), ("cols", cols)):
        if len(of.counts) % groups:
            what = f"{name} do not give groups of channels of one size"
            raise ArgumentError.of(
                op, what, f"{len(of.counts)} features", f"a multiple of {groups}"
            )
    height, width = len(rows.counts) // groups, len(cols.counts) // groups
    parts = [
        Part([], [], {0: Labels([], r), 1: Labels([], c)})
        for r, c in zip(rows.counts.reshape(groups, -1), cols.counts.reshape(groups, -1))
    ]
    for i, (x, factor) in enumerate(zip(whole.xs, whole.factors, strict=True)):
        pieces = (torch.tensor_split(t, groups) for t in (x, rows.parts[i], cols.parts[i]))
        for b, (piece, r, c) in enumerate(zip(*pieces, strict=True)):
            homes = sorted({*(r // height).tolist(), *(c // width).tolist()})
            if len(homes) > 1:
                what = "rows and cols do not move groups of channels as blocks"
                got = f"group {b} of xs[{i}] in groups {homes}"
                raise ArgumentError.of(op, what, got, "all of it in one group")
            for home in homes:
                part = parts[home]
                part.xs.append(piece)
                part.factors.append(factor)
                part.labels[0].parts.append(r - home * height)
                part.labels[1].parts.append(c - home * width)
    return parts
